#!/usr/bin/env bash
# MAE-Lite's recipe for the 6.7 million Hiera: 400 epochs, batch 4096 on 8 GPUs, 40% of the units hidden. Published: 78.5 after
# fine-tuning (finetune.py --init out/hiera_lite/encoder.pt). The same command goes on after an interruption.
torchrun --standalone --nproc_per_node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 -m \
  more.hiera_mae --data imagenet --model hiera_lite --out out/hiera_lite --keep-every 100 "$@"
