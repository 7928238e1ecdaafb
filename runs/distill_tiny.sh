#!/usr/bin/env bash
# The ablation: ViT-Tiny from the teacher's attention alone, without pixels.
torchrun --standalone --nproc_per_node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
  distill.py --data imagenet --model vit_tiny --teacher "${TEACHER:-out/mae_base/encoder.pt}" \
  --out out/distill_tiny --keep-every 100 "$@"
