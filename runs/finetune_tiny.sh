#!/usr/bin/env bash
# MAE-Lite's improved recipe for ViT-Tiny: 300 epochs, batch 1024 on 8 GPUs. INIT is any encoder: MAE, D-MAE, D2-MAE; for
# MoCo-v3's add --recipe moco; without --init the same command trains from scratch. Published: 78.0 from MAE, 75.8 without.
torchrun --standalone --nproc_per_node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
  finetune.py --data imagenet --init "${INIT:-out/mae_tiny/encoder.pt}" --out out/finetune_tiny "$@"
