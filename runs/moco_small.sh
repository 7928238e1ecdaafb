#!/usr/bin/env bash
# The official recipe for ViT-Small (Base: --model vit_base): 300 epochs, batch 4096, a frozen patch projection. Where
# memory is short, --accum 2 and more: the numbers stay the same.
torchrun --standalone --nproc_per_node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
  moco_v3.py --data imagenet --model vit_small --out out/moco_small --keep-every 100 "$@"
