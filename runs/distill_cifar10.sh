#!/usr/bin/env bash
# CIFAR-10 at 32 px, the same budget for all: a wider teacher, then students by MAE, D-MAE, D2-MAE, the teacher alone.
set -e
same="--data ${DATA:-cifar10} --img-size 32 --patch-size 4 --batch-size 256 --blr 1e-3 --epochs ${EPOCHS:-4}
      --warmup-epochs 1 --workers 1 --log-every 39 --probe-every 100 --seed ${SEED:-0}"
out=out/distill_cifar10
python mae.py $same --model vit_midi --out $out/teacher
python mae.py $same --model vit_mini --out $out/mae &
python mae.py $same --model vit_mini --out $out/d-mae --distill-teacher $out/teacher/encoder.pt
wait $!
python mae.py $same --model vit_mini --out $out/d2-mae --distill-teacher $out/teacher/encoder.pt --distill decoupled &
python distill.py $same --model vit_mini --out $out/alone --teacher $out/teacher/encoder.pt --min-crop 0.2 \
  --interpolation bicubic
wait $!
