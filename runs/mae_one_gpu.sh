#!/usr/bin/env bash
# ViT-Tiny on one GPU: the same 4096 images per step in 8 passes.
python mae.py --data imagenet --model vit_tiny --accum 8 --workers 16 --out out/mae_one_gpu "$@"
