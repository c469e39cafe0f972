#!/usr/bin/env bash
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
# Make the teacher, the head map and the student: the sections import, select and hybridize of the recipe. What exists
# is not made again.
#SBATCH --job-name=select
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
[[ -f slurm/common.sh ]] || { echo "select: start it in the repository's root, or with sbatch --chdir" >&2; exit 2; }
source slurm/common.sh
! has import || alone tools/convert.py import --config "${recipes[@]}" --skip-existing
! has select || ranks tools/select_heads.py --config "${recipes[@]}" --skip-existing "${flags[@]}"
! has hybridize || alone tools/convert.py hybridize --config "${recipes[@]}" --skip-existing
