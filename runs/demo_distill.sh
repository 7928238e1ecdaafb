#!/usr/bin/env bash
# Distillation on drawn shapes, minutes on a CPU: a wider teacher, an MAE without it, the same MAE with it (D2-MAE), and
# a student that has the teacher alone. Each ends with a k-NN and a linear probe.
set -euo pipefail
out=${OUT:-out/demo-distill}
python mae.py --demo --model vit_midi --epochs 8 --warmup-epochs 1 --blr 2e-3 --out $out/teacher
python mae.py --demo --out $out/plain
python mae.py --demo --distill-teacher $out/teacher/encoder.pt --distill decoupled --out $out/decoupled
python distill.py --demo --teacher $out/teacher/encoder.pt --out $out/alone
for run in teacher plain decoupled alone; do
    echo "$run: $(grep knn $out/$run/log.jsonl | tail -1)"
done
