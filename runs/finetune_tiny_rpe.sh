#!/usr/bin/env bash
# MAE-Lite's longest recipe: relative positions, 1000 epochs (79.0 from MAE; with --recipe rpe_d2 79.4 from D2-MAE).
torchrun --standalone --nproc_per_node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
  finetune.py --data imagenet --recipe rpe --init "${INIT:-out/mae_tiny/encoder.pt}" --out out/finetune_tiny_rpe "$@"
