#!/usr/bin/env bash
# MAE-Lite's MoCo v3: ViT-Tiny, 400 epochs, batch 1024 on 8 GPUs. The same command goes on after an interruption.
torchrun --standalone --nproc_per_node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
  moco_v3.py --data imagenet --model vit_tiny --out out/moco_tiny --keep-every 100 "$@"
