#!/usr/bin/env bash
# CIFAR-10 at 32 px: fine-tune the MAE teacher of runs/distill_cifar10.sh with labels, then let a student learn its final
# tokens, with the budget of the students there (MAE, D-MAE, D2-MAE, attention alone).
set -e
data="--data ${DATA:-cifar10} --workers 1 --log-every 39 --seed ${SEED:-0}"
out=out/tokens_cifar10
python finetune.py $data --recipe small --model vit_midi --init results/distill-cifar10/teacher/encoder.pt --epochs 3 \
  --eval-every 1 --out $out/teacher
python distill.py $data --distill tokens --teacher $out/teacher/best.pt --model vit_mini --img-size 32 --patch-size 4 \
  --batch-size 256 --blr 1e-3 --epochs ${EPOCHS:-4} --warmup-epochs 1 --min-crop 0.2 --probe-every 1 --out $out/student
for run in teacher/best.pt student/encoder.pt; do
  python probe.py $out/$run $data --protocol knn --pool avg --out $out/knn-${run%%/*}
done
