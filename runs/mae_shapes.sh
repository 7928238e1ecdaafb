#!/usr/bin/env bash
# The picture at the head of the README: an MAE trained on drawn shapes, half an hour on two cores. It predicts plain
# pixels, so that nothing on the sheet is borrowed from what was hidden.
set -euo pipefail
python mae.py --data shapes --model vit_mini --img-size 64 --patch-size 8 --decoder-dim 128 --decoder-depth 2 \
    --mask-ratio 0.6 --no-norm-pix --min-crop 0.6 --batch-size 128 --epochs 60 --warmup-epochs 3 --blr 2e-3 \
    --workers 1 --picture-every 5 --log-every 78 --out out/mae-shapes "$@"
