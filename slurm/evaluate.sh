#!/usr/bin/env bash
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
# The evaluation, and the export to Hugging Face if the recipe has that section. Neither is made twice.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
[[ -f slurm/common.sh ]] || { echo "evaluate: start it in the repository's root, or with sbatch --chdir" >&2 && exit 2; }
source slurm/common.sh
alone tools/evaluate.py --config "${recipes[@]}" --skip-existing "${flags[@]}"
! has export || alone tools/convert.py export --config "${recipes[@]}" --skip-existing
