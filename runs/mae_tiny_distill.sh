#!/usr/bin/env bash
# D-MAE: MAE-Lite's ViT-Tiny with a frozen MAE ViT-B/16 as teacher. TEACHER is its file.
torchrun --standalone --nproc_per_node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
  mae.py --data imagenet --model vit_tiny --distill-teacher "${TEACHER:-out/mae_base/encoder.pt}" \
  --out out/mae_tiny_distill --keep-every 100 "$@"
