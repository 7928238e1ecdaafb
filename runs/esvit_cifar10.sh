#!/usr/bin/env bash
# Small images: CIFAR-10 at 32 px, a fifth of it, EsViT on swin_mini: views alone, then views and regions. Patches of 2
# leave 16 regions of a global crop and 4 of a local one.
set -e
same="--data ${DATA:-cifar10} --fraction 0.2 --model swin_mini --img-size 32 --patch-size 2 --local-crops 4
      --local-size 16 --local-scale 0.15 0.5 --batch-size 64 --prototypes 512 --head-hidden 512 --bottleneck 128
      --epochs ${EPOCHS:-5} --blr 4e-3 --momentum 0.98 --teacher-temp 0.04 --freeze-last-layer 0 --workers 1
      --log-every 39 --probe-every 1 --seed ${SEED:-0}"
python esvit.py $same --region-weight 0 --out out/esvit_cifar10/views
python esvit.py $same --region-weight 0.5 --out out/esvit_cifar10/regions
