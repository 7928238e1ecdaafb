#!/usr/bin/env bash
# Hiera's MAE beside a ViT's at equal parameters (0.84 and 0.80 million), on a tenth of CIFAR-10 at 32 px, 60% hidden, about as
# long: a step of Hiera takes 1.25 times as long as one of the ViT, so it gets 8 epochs instead of 10. SEED is the seed.
set -e
common="--data cifar10 --fraction 0.1 --img-size 32 --batch-size 256 --blr 1e-3 --mask-ratio 0.6 --decoder-dim 64
  --decoder-depth 1 --decoder-heads 4 --min-crop 0.2 --interpolation bicubic --picture-every 0 --workers 0 --log-every 19
  --seed ${SEED:-0}"
python mae.py $common --model vit_mini --epochs 10 --warmup-epochs 1 --probe-every 10 --out out/mae_cifar10_short "$@"
python -m more.hiera_mae $common --model hiera_mini --epochs 8 --warmup-epochs 0.8 --probe-every 8 \
  --out out/hiera_cifar10 "$@"
