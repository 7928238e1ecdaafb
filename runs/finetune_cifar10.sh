#!/usr/bin/env bash
# CIFAR-10 at 32 px, the same budget: from the MAE encoder of runs/mae_cifar10.sh, and from scratch; all labels, a tenth.
# Layer decay is for pre-trained blocks, so scratch has none. FULL= leaves the runs with all labels out.
set -e
same="--data ${DATA:-cifar10} --recipe small --workers 0 --log-every 39 --seed ${SEED:-0}"
out=out/finetune_cifar10/seed${SEED:-0}
pre="--init ${INIT:-results/mae-cifar10/encoder.pt}"
scratch="--model vit_mini --img-size 32 --layer-decay 1"
tenth="--fraction 0.1 --epochs 15 --eval-every 5"
[ -z "${FULL-yes}" ] || python finetune.py $same $pre --epochs 3 --eval-every 1 --out $out-mae &
[ -z "${FULL-yes}" ] || python finetune.py $same $scratch --epochs 3 --eval-every 1 --out $out-scratch
wait
python finetune.py $same $pre $tenth --out $out-mae-tenth &
python finetune.py $same $scratch $tenth --out $out-scratch-tenth
wait
