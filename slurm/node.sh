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

# count_gpus: "NUMBER by SOURCE": the GPUs that this node gives the job, by whoever knows; the nodes of a job may differ
count_gpus() {
    local name
    if [[ ${CUDA_VISIBLE_DEVICES+set} ]]; then # CUDA sees no other
        echo "$(listed "$CUDA_VISIBLE_DEVICES") by CUDA_VISIBLE_DEVICES"
        return
    fi
    # Which of them SLURM sets depends on its version and on how the GPUs were asked for. "h100:4,a100:2" is six.
    for name in SLURM_GPUS_ON_NODE SLURM_GPUS_PER_NODE; do
        if [[ ${!name:-} =~ ^([^,]*:)?[0-9]+(,([^,]*:)?[0-9]+)*$ ]]; then
            echo "$(($(tr , '\n' <<<"${!name}" | sed 's/.*://' | paste -sd +))) by $name"
            return
        fi
    done
    for name in SLURM_STEP_GPUS SLURM_JOB_GPUS; do
        if [[ ${!name:-} ]]; then
            echo "$(listed "${!name}") by $name"
            return
        fi
    done
    # It lists, on some sites, the whole node
    if nvidia-smi -L &>/dev/null; then
        echo "$(nvidia-smi -L | grep -c '^GPU ') by nvidia-smi"
    else
        echo "$(compgen -G "/dev/nvidia[0-9]*" | wc -l) by /dev"
    fi
}
# listed LIST: how many GPUs it names
listed() { tr , '\n' <<<"$1" | grep -cE '^ *([0-9]+|GPU-.+|MIG-.+)$'; }

gpus=$(count_gpus)
ranks=${HYDRA_RANKS_PER_NODE:-${gpus%% *}}
[[ $ranks != 0 || ${HYDRA_GPUS_PER_NODE:-} != 0 ]] || ranks=1
if ! [[ $ranks =~ ^[1-9][0-9]*$ ]]; then
    echo "node.sh: $ranks ranks for ${HOSTNAME:-this node} (GPUs: $gpus); ask for GPUs (source slurm/env.sh before sbatch, or" \
        "sbatch --gres=gpu:8), set HYDRA_RANKS_PER_NODE, or HYDRA_GPUS_PER_NODE=0 to do without" >&2
    exit 2
fi
[[ $SLURM_NODEID != 0 ]] || echo "node.sh: ranks on ${HOSTNAME:-this node}: $ranks (GPUs: $gpus)" >&2
export PET_NPROC_PER_NODE=$ranks           # torchrun's --nproc-per-node
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
