#!/usr/bin/env bash
# Swin-Lite (7 M) on one GPU: 100 epochs, batch 256. Ours, not published.
python esvit.py --data imagenet --model swin_lite --out out/esvit_lite --keep-every 25 "$@"
