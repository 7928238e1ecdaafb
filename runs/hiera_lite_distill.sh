#!/usr/bin/env bash
# The same with a frozen Hiera-B as teacher of attention. TEACHER is the official mae_hiera_base_224.pth. Published: 78.9.
torchrun --standalone --nproc_per_node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 -m \
  more.hiera_mae --data imagenet --model hiera_lite --distill-teacher "${TEACHER:-mae_hiera_base_224.pth}" \
  --out out/hiera_lite_distill --keep-every 100 "$@"
