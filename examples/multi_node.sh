#!/bin/bash
# One training on several machines: start this on each of them, with its own NODE, from 0 on.
#
#   NODES=2 NODE=0 MASTER=10.0.0.1 examples/multi_node.sh train-imm --data imagenet256-latents/ --preset imagenet256-imm-xl
#
# All machines need the same mmgen, the same data, and one folder for the run (--out on a shared file system). LAUNCH takes more options
# for accelerate, such as LAUNCH="--use_fsdp --fsdp_version 2". GPUS=0 trains on CPUs, one process a machine.
set -euo pipefail
: "${NODES:?how many machines there are}" "${NODE:?the number of this machine, from 0 on}" "${MASTER:?the address of machine 0}"
PORT=${PORT:-29500}
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)} # of each machine

if [ "$GPUS" = 0 ]; then
    exec python -m torch.distributed.run --nnodes "$NODES" --node_rank "$NODE" --master_addr "$MASTER" --master_port "$PORT" \
        --nproc_per_node 1 -m mmgen "$@" --device cpu
fi
# shellcheck disable=SC2086
exec accelerate launch --multi_gpu --num_machines "$NODES" --machine_rank "$NODE" --main_process_ip "$MASTER" \
    --main_process_port "$PORT" --num_processes "$((NODES * GPUS))" --mixed_precision no --dynamo_backend no ${LAUNCH:-} -m mmgen "$@"
