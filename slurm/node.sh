#!/usr/bin/env bash
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
# Run torchrun on one node of a job, and pass a stop signal on to its ranks.
#
#   srun bash slurm/node.sh TORCHRUN ARGUMENT...
#
# On USR1 or TERM only the ranks get TERM: they save and end. SLURM may send a signal to all processes of a node. A TERM
# would then end data loaders, too, and torchrun, which kills its ranks half a minute later. So a job sends USR1, which
# torchrun and its children ignore.
set -uo pipefail

source slurm/gpus.sh
ranks=$(one_a_gpu ranks) || exit
export PET_NPROC_PER_NODE=$ranks           # as --nproc-per-node
export PET_NODE_RANK=$SLURM_NODEID         # as --node-rank
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600 # if torchrun gets a TERM all the same, SLURM's KillWait decides
(
    trap '' USR1
    exec "$@"
) &
torchrun=$!
# a signal that arrives before the ranks have started waits for them
trap 'until pkill -TERM -P "$torchrun" || ! kill -0 "$torchrun"; do sleep 1; done' USR1 TERM
while kill -0 "$torchrun" 2>/dev/null; do wait "$torchrun"; done
wait "$torchrun"
