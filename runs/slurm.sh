#!/usr/bin/env bash
#SBATCH --nodes=1 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00 --requeue
#SBATCH --signal=B:USR1@120 --open-mode=append
# Two minutes before the time limit SLURM sends USR1: the run saves itself, the job goes back into the queue and goes on.
# torchrun must be told to forward USR1: by default it dies of it and leaves its workers behind.
trap 'kill -USR1 $run; wait $run; scontrol requeue $SLURM_JOB_ID' USR1
torchrun --standalone --nproc_per_node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
  mae.py --data imagenet --out "out/mae_$SLURM_JOB_NAME" "$@" &
run=$!
wait $run
