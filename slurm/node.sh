#!/usr/bin/env bash
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
# One node of a job: torchrun, and the way for a stop signal to its ranks.
#
#   srun bash slurm/node.sh TORCHRUN ARGUMENT...
#
# On USR1 or TERM the ranks, and nobody else, get TERM: they save and end. SLURM may send a signal to a node's whole tree
# of processes, where TERM would end data loaders too, and torchrun, which kills its ranks half a minute later. So what a
# job sends is USR1, to which torchrun and all below it are deaf.
set -uo pipefail

# count_ranks: one for each GPU that this node gives the job, by whoever knows; the nodes of a job may differ
count_ranks() {
    local gpus=${SLURM_GPUS_ON_NODE:-}
    if [[ ${HYDRA_RANKS_PER_NODE:-} ]]; then
        gpus=$HYDRA_RANKS_PER_NODE
    elif [[ ${CUDA_VISIBLE_DEVICES+set} ]]; then
        gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cE '^ *([0-9]+|GPU-.+|MIG-.+)$') # CUDA sees no other
    elif [[ ! $gpus =~ ^[0-9]+$ ]]; then
        # SLURM sets it only where it deals out the GPUs itself
        gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || gpus=$(compgen -G "/dev/nvidia[0-9]*" | wc -l)
    fi
    [[ $gpus != 0 || ${HYDRA_GPUS_PER_NODE:-} != 0 ]] || gpus=1
    echo "$gpus"
}
PET_NPROC_PER_NODE=$(count_ranks) # torchrun's --nproc-per-node
if ! [[ $PET_NPROC_PER_NODE =~ ^[1-9][0-9]*$ ]]; then
    echo "node.sh: ${PET_NPROC_PER_NODE:-no} ranks for ${HOSTNAME:-this node}, where no GPU is seen;" \
        "set HYDRA_RANKS_PER_NODE, or HYDRA_GPUS_PER_NODE=0 to do without" >&2
    exit 2
fi
export PET_NPROC_PER_NODE
export PET_NODE_RANK=$SLURM_NODEID         # torchrun's --node-rank
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600 # where torchrun gets a TERM all the same, SLURM's KillWait is to decide, not torchrun
(
    trap '' USR1
    exec "$@"
) &
torchrun=$!
# a signal that comes before the ranks waits for them
trap 'until pkill -TERM -P "$torchrun" || ! kill -0 "$torchrun"; do sleep 1; done' USR1 TERM
while kill -0 "$torchrun" 2>/dev/null; do wait "$torchrun"; done
wait "$torchrun"
