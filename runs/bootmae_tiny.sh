#!/usr/bin/env bash
# BootMAE's ViT-Tiny, 400 epochs, batch 2048 on 8 GPUs; but for the epochs the recipe is ViT-Base's. The same command goes
# on after an interruption.
torchrun --standalone --nproc_per_node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 -m \
  more.bootmae --data imagenet --model vit_tiny --out out/bootmae_tiny --keep-every 100 "$@"
