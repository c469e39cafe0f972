# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# This is the one file that a site edits. Each line is a default: a variable that is already set wins. Lines that begin
# with #: are examples. Remove the two signs to use one. SBATCH_* are sbatch's own variables: they win over the #SBATCH
# lines of a script, and options of the command line win over them. pipeline.sh reads this file. Before an sbatch of
# your own, run `source slurm/env.sh`.
set -a

# where jobs run
#: "${SBATCH_PARTITION:=gpu}"
#: "${SBATCH_ACCOUNT:=my-project}"
#: "${SBATCH_QOS:=normal}"
#: "${SBATCH_TIMELIMIT:=24:00:00}"
#: "${SBATCH_CONSTRAINT:=h100}"
: "${HYDRA_SAVE_SECONDS:=300}"             # before the time limit: a job saves and requeues itself
: "${HYDRA_NODES:=1}"                      # of the three stages; other jobs run on one
: "${HYDRA_GPUS_PER_NODE:=8}"              # 0: no GPU
: "${HYDRA_GRES:=gpu}"                     # SLURM's name of the GPUs, with a type where the site asks for one: gpu:h100
#: "${HYDRA_RANKS_PER_NODE:=2}"            # where it is not one a GPU; of serve.sh the copies
: "${HYDRA_PREPARE_OPTIONS:=}"             # for prepare, which needs no GPU: --partition=cpu --cpus-per-task=32

# how much of a node a job takes: all of it, unless a site shares nodes or counts memory
#: "${SBATCH_EXCLUSIVE:=oversubscribe}"    # share the node with other jobs, or with your own alone: user
#: "${SBATCH_CPUS_PER_GPU:=12}"            # of a shared node
#: "${SBATCH_MEM_PER_NODE:=900G}"          # where --mem=0, all memory, is refused

# network of the ranks, where NCCL does not find it by itself (docs/slurm.md)
#: "${NCCL_SOCKET_IFNAME:=ib0}"            # the interface over which ranks meet (`ip -brief address` lists them)
#: "${GLOO_SOCKET_IFNAME:=ib0}"
#: "${NCCL_IB_HCA:=mlx5}"                  # InfiniBand adapters to use, by the beginning of their names (`ibstat -l`)
#: "${NCCL_IB_GID_INDEX:=3}"               # RoCE instead of InfiniBand
#: "${NCCL_IB_TIMEOUT:=22}"                # of a large fabric; NCCL's default is 20
#: "${NCCL_IB_DISABLE:=1}"                 # TCP alone, to find out whether InfiniBand is the problem
#: "${NCCL_DEBUG:=INFO}"                   # NCCL says what it has found
#: "${SLURM_MPI_TYPE:=none}"               # where srun asks for another MPI type than the site has

# what they run in
: "${HYDRA_PYTHON:=.venv/bin/python}"      # made by `make env`; in the container /opt/hydra/bin/python
: "${HYDRA_CONTAINER:=}"                   # image file for Pyxis/Enroot, imported once (docs/container.md); empty: none
: "${HYDRA_MOUNTS:=}"                      # folders it needs beside this repository: /data:/data,/models:/models
: "${HYDRA_SERVING_PYTHON:=.venv/serving/bin/python}" # of serve.sh, where vLLM and serving/ are installed
: "${HYDRA_SERVING_PORT:=8000}"
#module load cuda

# what they work on
# recipe files, used where a command line names none
: "${HYDRA_RECIPE:=examples/qwen3-1.7b/recipe.yaml}"
: "${HYDRA_LOGS:=runs/logs}"               # folder of the jobs' output
: "${HYDRA_MAX_RESTARTS:=100}"             # a job that was requeued so often is not requeued again
#: "${WANDB_MODE:=offline}"                # compute nodes without network: `wandb sync` the run later

# What sbatch reads. If only --gpus-per-node is allowed: SBATCH_GRES=none SBATCH_GPUS_PER_NODE=$HYDRA_GPUS_PER_NODE
SBATCH_GRES=$HYDRA_GRES:$HYDRA_GPUS_PER_NODE
SBATCH_OUTPUT=$HYDRA_LOGS/%x-%j.out
# SLURM makes no folder, and a job that cannot write its output fails without a message
[[ -d $HYDRA_LOGS ]] || mkdir -p "$HYDRA_LOGS"
set +a
