#!/bin/bash
#SBATCH --job-name=mmgen
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
# A training as a Slurm job: sbatch examples/slurm.sh train-imm --data imagenet256-latents/ --preset imagenet256-imm-xl
#
# Five minutes before the end mmgen is told to save (SIGTERM); the same command submitted again goes on. Other numbers of machines:
# sbatch --nodes=4 examples/slurm.sh ...
set -euo pipefail
export NODES=$SLURM_NNODES
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER
export SCRIPT=${SCRIPT:-examples/multi_node.sh}
# shellcheck disable=SC2016
exec srun --kill-on-bad-exit=1 bash -c 'NODE=$SLURM_NODEID exec bash "$SCRIPT" "$@"' mmgen "$@"
