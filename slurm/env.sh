# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# The one file that a site edits. Each line is a default: a variable that is set already wins.
# SBATCH_* are sbatch's own variables. pipeline.sh reads this file; before an sbatch of your own, `source slurm/env.sh`.
set -a

# where jobs run
#: "${SBATCH_PARTITION:=gpu}"
#: "${SBATCH_ACCOUNT:=my-project}"
#: "${SBATCH_QOS:=normal}"
#: "${SBATCH_TIMELIMIT:=24:00:00}"
: "${HYDRA_SAVE_SECONDS:=300}"            # before the time limit: a job saves and requeues itself
: "${HYDRA_NODES:=1}"                      # of the three stages; the other jobs run on one
: "${HYDRA_GPUS_PER_NODE:=8}"              # 0: no GPU
#: "${HYDRA_RANKS_PER_NODE:=2}"            # where it is not one a GPU

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
: "${HYDRA_LOGS:=runs/logs}"               # folder of pipeline.sh's jobs' output
: "${HYDRA_MAX_RESTARTS:=100}"             # a job that was requeued so often is not requeued again
#: "${WANDB_MODE:=offline}"                # compute nodes without network: `wandb sync` the run later

set +a
