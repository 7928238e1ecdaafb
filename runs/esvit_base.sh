#!/usr/bin/env bash
# EsViT's Swin-B: 200 epochs of views, then regions as well. --window 14 is the largest published: k-NN 79.3, linear
# 81.3; window 7: 78.9 and 80.4.
torchrun --standalone --nproc_per_node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
  esvit.py --data imagenet --model swin_base --accum 2 --out out/esvit_base --keep-every 20 "$@"
