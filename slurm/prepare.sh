#!/usr/bin/env bash
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
# Turn text into token shards: the section prepare of the recipe. A job that was stopped continues.
#SBATCH --job-name=prepare
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
[[ -f slurm/common.sh ]] || { echo "prepare: start it in the repository's root, or with sbatch --chdir" >&2; exit 2; }
source slurm/common.sh
if has prepare; then
    alone tools/prepare_data.py --config "${recipes[@]}" --skip-existing "${flags[@]}"
else
    say "the recipe has no section prepare: nothing to do"
fi
