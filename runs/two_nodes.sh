#!/usr/bin/env bash
# Two nodes of 8 GPUs: start this on both, with HOST the first one's name. --out must be a folder that both see.
torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint="${HOST:?name of the first node}:29400" \
  --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 mae.py --data imagenet --out out/mae_two_nodes "$@"
