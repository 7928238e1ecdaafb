#!/usr/bin/env bash
# Small sets at 32 px from the MAE encoder of runs/mae_cifar10.sh, and from scratch, the same budget. DATA is a folder of
# sets, each with train/ and val/.
set -e
same="--recipe small --batch-size 64 --lr ${LR:-1e-3} --epochs 30 --workers 0 --log-every 50 --seed ${SEED:-0}"
scratch="--model vit_mini --img-size 32 --layer-decay 1"
for set in ${SETS:-caltech100_mini_a dtd10_a signdigits_a}; do
  out=out/small_sets/$set-seed${SEED:-0}
  python finetune.py $same --data "${DATA:-data}/$set" --out $out-mae --init "${INIT:-results/mae-cifar10/encoder.pt}" &
  python finetune.py $same --data "${DATA:-data}/$set" --out $out-scratch $scratch
  wait $!
done
