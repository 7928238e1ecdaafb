#!/usr/bin/env bash
# The official MAE recipe for ViT-B: 100 epochs, batch 1024. Published: 83.6 from mae_pretrain_vit_base.pth.
torchrun --standalone --nproc_per_node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
  finetune.py --data imagenet --init "${INIT:-mae_pretrain_vit_base.pth}" --accum 4 \
  --out out/finetune_base "$@"
