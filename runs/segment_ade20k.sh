#!/usr/bin/env bash
# ViT-Tiny with Semantic-FPN on ADE20K, the published recipe: 160,000 steps of 16 images. Published: 39.0 mIoU from D2-MAE's
# weights (INIT), 42.8 from these fine-tuned with relative positions. Not run yet. ADE20K is the folder ADEChallengeData2016.
torchrun --standalone --nproc_per_node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
  -m dense.segment --data ade20k --init "${INIT:-out/mae_tiny_decoupled/encoder.pt}" --out out/segment_ade20k "$@"
