#!/usr/bin/env bash
# CIFAR-10 at 32 px in about the same time: MAE, SimMIM, MaskFeat, BootMAE; then a sweep of linear heads, k-NN, and
# fine-tuning with all labels and with a tenth. EPOCHS: SimMIM's; networks that see fewer patches make more of them.
set -e
set="--data ${DATA:-cifar10} --img-size 32 --batch-size 256 --workers 1 --seed ${SEED:-0}" out=out/simmim_cifar10
same="$set --model vit_mini --patch-size 4 --warmup-epochs 1 --blr 1e-3 --min-crop 0.2 --log-every 39" e=${EPOCHS:-8}
python mae.py $same --epochs ${MAE_EPOCHS:-$((2 * e))} --out $out/mae
python -m more.simmim $same --epochs $e --out $out/simmim
python -m more.simmim $same --epochs $e --target hog --out $out/maskfeat
python -m more.bootmae $same --epochs ${BOOT_EPOCHS:-$e} --out $out/bootmae
for m in mae simmim maskfeat bootmae; do
  for p in knn sweep; do python probe.py $out/$m/encoder.pt --data ${DATA:-cifar10} --protocol $p; done
  python finetune.py $set --init $out/$m/encoder.pt --epochs 10 --out $out/$m-tuned
  python finetune.py $set --init $out/$m/encoder.pt --epochs 50 --fraction 0.1 --out $out/$m-tuned-tenth; done
