#!/usr/bin/env bash
# MAE-Lite's baseline: ViT-Tiny, 400 epochs, batch 4096 on 8 GPUs. The same command goes on after an interruption.
torchrun --standalone --nproc_per_node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
  mae.py --data imagenet --model vit_tiny --out out/mae_tiny --keep-every 100 "$@"
