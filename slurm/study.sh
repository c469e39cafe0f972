#!/usr/bin/env bash
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
# Run a study (docs/studies.md). Without an array the job makes what all variants share. In an array each task runs one
# variant with one seed.
#
#   shared=$(sbatch --parsable slurm/study.sh STUDY.yaml)
#   sbatch --dependency=afterok:$shared --array=0-5 slurm/study.sh STUDY.yaml
#
# The same two commands continue a study that was stopped. `tools/study.py run STUDY.yaml --dry-run` says how long the
# array is.
#SBATCH --job-name=study
#SBATCH --nodes=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
[[ -f slurm/common.sh ]] || { echo "study: start it in the repository's root, or with sbatch --chdir" >&2; exit 2; }
source slurm/common.sh
((${#recipes[@]} == 1)) || fail "give one study's file"
export WANDB_RUN_GROUP=${WANDB_RUN_GROUP:-$(basename "${recipes[0]}" .yaml)} # as tools/study.py run sets it
step=()
[[ ! $HYDRA_CONTAINER || ! ${SLURM_JOB_ID:-} ]] || step=(srun --nodes=1 --ntasks=1 "${container[@]}")
job=${SLURM_ARRAY_TASK_ID:-shared}
steps=$("${step[@]}" "$HYDRA_PYTHON" tools/study.py steps "${recipes[0]}" --job "$job") || exit 2
mapfile -t steps <<<"$steps"
for step in "${steps[@]}"; do
    eval "$step" # "alone" or "ranks" of common.sh, and the words of a command, quoted
done
