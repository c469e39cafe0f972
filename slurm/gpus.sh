# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# Count the processes that a node starts: one for each of its GPUs. Scripts that run on a node source this file.

# one_a_gpu NAME: print the number of processes. NAME says what they are, for the log. Return 2 if there is no GPU.
one_a_gpu() {
    local gpus number
    gpus=$(count_gpus)
    number=${HYDRA_RANKS_PER_NODE:-${gpus%% *}}
    [[ $number != 0 || ${HYDRA_GPUS_PER_NODE:-} != 0 ]] || number=1
    if ! [[ $number =~ ^[1-9][0-9]*$ ]]; then
        echo "${0##*/}: $number $1 for ${HOSTNAME:-this node} (GPUs: $gpus); ask for GPUs (source slurm/env.sh before" \
            "sbatch, or sbatch --gres=gpu:8), set HYDRA_RANKS_PER_NODE, or HYDRA_GPUS_PER_NODE=0 to do without" >&2
        return 2
    fi
    [[ $SLURM_NODEID != 0 ]] || echo "${0##*/}: $1 on ${HOSTNAME:-this node}: $number (GPUs: $gpus)" >&2
    echo "$number"
}

# count_gpus: print "NUMBER by SOURCE": the GPUs that this node gives the job. The nodes of a job may differ.
count_gpus() {
    local name
    if [[ ${CUDA_VISIBLE_DEVICES+set} ]]; then # CUDA sees no other
        echo "$(listed "$CUDA_VISIBLE_DEVICES") by CUDA_VISIBLE_DEVICES"
        return
    fi
    # It depends on SLURM's version and on the request which of them is set. "h100:4,a100:2" is six.
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
    # On some sites it lists the whole node.
    if nvidia-smi -L &>/dev/null; then
        echo "$(nvidia-smi -L | grep -c '^GPU ') by nvidia-smi"
    else
        echo "$(compgen -G "/dev/nvidia[0-9]*" | wc -l) by /dev"
    fi
}
# listed LIST: print how many GPUs it names
listed() { tr , '\n' <<<"$1" | grep -cE '^ *([0-9]+|GPU-.+|MIG-.+)$'; }
