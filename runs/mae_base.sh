#!/usr/bin/env bash
# The official recipe for ViT-Base: 800 epochs (pass --epochs 1600 for the released length), batch 4096 = 8 x 256 x 2.
torchrun --standalone --nproc_per_node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
  mae.py --data imagenet --model vit_base --accum 2 --out out/mae_base --keep-every 200 "$@"
