#!/usr/bin/env bash
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
# Check the nodes of a job: tools/doctor.py runs on each of them, in the environment that training will have. The first
# node prints for all. The job fails if a check fails. FLAGs go to doctor.
#
#   sbatch --nodes=2 slurm/doctor.sh [-- FLAG ...]
#SBATCH --job-name=doctor
#SBATCH --nodes=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=00:15:00
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.out
[[ -f slurm/common.sh ]] || { echo "doctor: start it in the repository's root, or with sbatch --chdir" >&2; exit 2; }
source slurm/common.sh
launch srun --ntasks-per-node=1 --cpu-bind=none "${container[@]}" \
    "$HYDRA_PYTHON" tools/doctor.py --run-dir runs "${flags[@]}"
