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

source slurm/gpus.sh
ranks=$(one_a_gpu ranks) || exit
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
