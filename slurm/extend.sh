#!/usr/bin/env bash
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
# Run stage 3, extend: the student learns to predict the next token at long context.
#SBATCH --job-name=extend
#SBATCH --nodes=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
[[ -f slurm/common.sh ]] || { echo "extend: start it in the repository's root, or with sbatch --chdir" >&2; exit 2; }
source slurm/common.sh
ranks -m hydra_mcore.train --stage extend --config "${recipes[@]}" "${flags[@]}"
