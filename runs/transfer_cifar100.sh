#!/usr/bin/env bash
# MAE-Lite's transfer recipe, the only one that is public: CIFAR-100 at 224 px, SGD, 50 epochs, one GPU.
python finetune.py --data cifar100 --download --recipe transfer --init "${INIT:-out/mae_tiny/encoder.pt}" \
  --out out/transfer_cifar100 "$@"
