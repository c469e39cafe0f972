#!/usr/bin/env bash
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
# Serve an export with vLLM: one copy on each GPU of a node, all behind one address (docs/serving.md). FLAGs go to vLLM.
#
#   sbatch slurm/serve.sh -- --model runs/a/hf [FLAG ...]
#SBATCH --job-name=serve
#SBATCH --nodes=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.out
[[ -f slurm/common.sh ]] || { echo "serve: start it in the repository's root, or with sbatch --chdir" >&2; exit 2; }
source slurm/common.sh
((${#flags[@]})) || fail "name the export: sbatch slurm/serve.sh -- --model EXPORT_DIR"
[[ $dry_run ]] || say "serving at http://$(hostname):$HYDRA_SERVING_PORT/v1"
launch srun --nodes=1 --ntasks=1 --cpu-bind=none "${container[@]}" bash slurm/serve_node.sh "$HYDRA_SERVING_PYTHON" \
    --host 0.0.0.0 --port "$HYDRA_SERVING_PORT" "${flags[@]}"
