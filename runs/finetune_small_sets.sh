#!/usr/bin/env bash
# Small sets at 32 px from the MAE encoder of runs/mae_cifar10.sh, and from scratch, the same budget. DATA is a folder of sets,
# each with train/ and val/.
set -e
for set in ${SETS:-caltech100_mini_a dtd10_a signdigits_a}; do
  same="--data ${DATA:-data}/$set --recipe small --batch-size 64 --lr ${LR:-1e-3} --epochs 30 --workers 0 --log-every 50
        --seed ${SEED:-0} --out out/small_sets/$set"
  python finetune.py $same-mae-seed${SEED:-0} --init ${INIT:-results/mae-cifar10/encoder.pt} &
  python finetune.py $same-scratch-seed${SEED:-0} --model vit_mini --img-size 32 --layer-decay 1
  wait $!
done
