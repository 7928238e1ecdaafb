#!/usr/bin/env bash
# DINO's ViT-S/16 by its defaults: 100 epochs, batch 512. Published: k-NN 69.3, linear 74.0. Boosted, 73.3 and 76.0:
# --epochs 300 --batch-size 1024 --teacher-temp 0.07 --teacher-temp-epochs 30 --no-norm-last-layer
torchrun --standalone --nproc_per_node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
  esvit.py --data imagenet --model vit_small --out out/dino_small --keep-every 50 "$@"
