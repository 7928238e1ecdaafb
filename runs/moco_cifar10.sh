#!/usr/bin/env bash
# Small images: CIFAR-10 at 32 px, MoCo v3, and MAE for about as long: six of its epochs take the time of one.
set -e
same="--data ${DATA:-cifar10} --model vit_mini --img-size 32 --patch-size 4 --batch-size 256 --workers 1 --log-every 39
      --seed ${SEED:-0}"
python moco_v3.py $same --epochs ${EPOCHS:-5} --warmup-epochs 0.5 --blr 1e-3 --min-crop 0.2 --probe-every 1 \
  --out out/moco_cifar10/moco
python mae.py $same --epochs ${MAE_EPOCHS:-32} --warmup-epochs 3 --blr 1e-3 --probe-every 4 --out out/moco_cifar10/mae
