#!/usr/bin/env bash
# What the small CIFAR-10 encoders of results/ have learned, against each other and against a supervised network.
set -e
data="--data ${DATA:-cifar10} --workers 1" out=out/analyze esvit=results/esvit-cifar10
mae=results/moco-cifar10/mae/encoder.pt moco=results/moco-cifar10/moco/encoder.pt
dmae=results/distill-cifar10/d-mae/encoder.pt
judge=results/finetune-cifar10/scratch/encoder.pt
python analyze.py cka $mae $judge --names MAE supervised $data --out $out/mae
python analyze.py cka $dmae $judge --names D-MAE supervised $data --out $out/d-mae
python analyze.py cka $moco $judge --names "MoCo v3" supervised $data --out $out/moco
python analyze.py cka $esvit/regions/encoder.pt $judge --names EsViT supervised $data --out $out/esvit
python analyze.py attention $mae $moco $judge --names MAE "MoCo v3" supervised $data --out $out
python analyze.py correspond $esvit/views/encoder.pt $esvit/regions/encoder.pt --names views "views and regions" $data --out $out
python analyze.py layers $mae --data ${DATA:-cifar10} --fractions 0.4 --out $out/layers -- --epochs 1 --workers 1
python analyze.py layers $mae --data ${DATA:-cifar10} --fractions 0.02 --out $out/layers -- --epochs 15 --workers 1
