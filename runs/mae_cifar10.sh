#!/usr/bin/env bash
# Small images: CIFAR-10 at 32 px as folders train/ and test/ of classes; k-NN and linear probe on the way.
python mae.py --data cifar10 --model vit_mini --img-size 32 --patch-size 4 --batch-size 256 --blr 1e-3 \
  --epochs 8 --warmup-epochs 1 --probe-every 2 --picture-every 2 --workers 1 --log-every 50 --out out/mae_cifar10 "$@"
