#!/usr/bin/env bash
# CamVid (DATA: train/, trainannot/, val/, valannot/) at a quarter of its size, the same steps for each: from scratch, from an
# MAE, from a D-MAE; a linear head on frozen features, and all weights. Numbers are of the last step: none is chosen on val/.
set -e
same="--data ${DATA:-camvid} --img-size 64 --short-side 90 --channels 32 --steps ${STEPS:-600} --eval-every 0"
same="$same --workers 1 --log-every 50 --seed ${SEED:-0}"
for how in "" --frozen; do
  out=out/camvid-seed${SEED:-0}$how
  python -m dense.segment $same $how --model vit_mini --layer-decay 1 --out $out-scratch
  python -m dense.segment $same $how --init results/mae-cifar10/encoder.pt --out $out-mae
  python -m dense.segment $same $how --init results/distill-cifar10/d-mae/encoder.pt --out $out-d-mae
done
