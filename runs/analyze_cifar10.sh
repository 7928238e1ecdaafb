#!/usr/bin/env bash
# What the small CIFAR-10 encoders of results/ have learned. The set is in the order of its classes, so nearly all of it.
set -e
set="--data ${DATA:-cifar10} --workers 1" most="--images 9984" out=out/analyze r=results judge=results/finetune-cifar10/scratch/encoder.pt
mae=$r/moco-cifar10/mae/encoder.pt moco=$r/moco-cifar10/moco/encoder.pt views=$r/esvit-cifar10/views/encoder.pt regions=$r/esvit-cifar10/regions/encoder.pt
python -m tools.analyze cka $mae $judge --names MAE supervised $set $most --out $out/mae
python -m tools.analyze cka $moco $judge --names "MoCo v3" supervised $set $most --out $out/moco
python -m tools.analyze cka $regions $judge --names EsViT supervised $set $most --out $out/esvit
python -m tools.analyze cka $r/distill-cifar10/mae/encoder.pt $judge --names "MAE, 4 epochs" supervised $set $most --out $out/mae-4
python -m tools.analyze cka $r/distill-cifar10/d-mae/encoder.pt $judge --names "D-MAE, 4 epochs" supervised $set $most --out $out/d-mae
python -m tools.analyze attention $mae $moco $judge --names MAE "MoCo v3" supervised $set $most --out $out
python -m tools.analyze correspond $views $regions --names views "views and regions" $set --out $out
python -m tools.analyze correspond $mae $moco --images 2000 $set --out $out/vit
python -m tools.analyze layers $mae --data ${DATA:-cifar10} --fractions 0.4 --out $out/layers -- --epochs 1 --workers 1
python -m tools.analyze layers $mae --data ${DATA:-cifar10} --fractions 0.02 --out $out/layers -- --epochs 15 --workers 1
