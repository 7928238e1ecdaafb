#!/usr/bin/env bash
# D2-MAE: 13 blocks, pixels from the 8th, the teacher's attention at the 13th; encoder.pt has the first 12.
torchrun --standalone --nproc_per_node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
  mae.py --data imagenet --model vit_tiny --distill decoupled \
  --distill-teacher "${TEACHER:-out/mae_base/encoder.pt}" --out out/mae_tiny_decoupled --keep-every 100 "$@"
