#!/usr/bin/env bash
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
# Start vLLM's server on the node of a serving job, with a copy of the model on each GPU.
#
#   srun bash slurm/serve_node.sh PYTHON FLAG...
set -uo pipefail
source slurm/gpus.sh
copies=$(one_a_gpu copies) || exit
exec "$1" -m vllm.entrypoints.openai.api_server --data-parallel-size "$copies" "${@:2}"
