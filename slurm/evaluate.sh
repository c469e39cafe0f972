#!/usr/bin/env bash
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
# Evaluate on all GPUs of a node. Then export to Hugging Face if the recipe has that section. What exists is not made
# again. An evaluation that was stopped continues with the next piece.
#SBATCH --job-name=evaluate
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
[[ -f slurm/common.sh ]] || { echo "evaluate: start it in the repository's root, or with sbatch --chdir" >&2; exit 2; }
source slurm/common.sh
ranks tools/evaluate.py --config "${recipes[@]}" --skip-existing "${flags[@]}"
! has export || alone tools/convert.py export --config "${recipes[@]}" --skip-existing
