#!/usr/bin/env bash
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
#
# Makes .venv ready: finds Python 3.12 or newer, installs the package, lm-eval and the tests with the versions of
# constraints.txt.  Does nothing when that is done already; setup.py or constraints.txt changing makes it run again.
# PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/.stamp-$(cat setup.py constraints.txt | cksum | tr ' ' '-')

fits() { # can the Python $1 make our environment? $2 is the first minor version that is too new
    "$1" -c "import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info < (3, ${2:-99}))" >/dev/null 2>&1
}

candidates() {
    local name root
    for name in python3.12 python3.13 python3.14 python3 python; do
        command -v "$name" || true
    done
    root=${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")}
    for name in "$root"/versions/3.1[2-9]*/bin/python; do
        echo "$name"
    done
}

make_venv_with() { # $1: the first minor version that is too new
    local python
    while read -r python; do
        if fits "$python" "$1"; then
            echo "setting up $venv with $("$python" --version) ($python)"
            "$python" -m venv --clear "$venv"
            return
        fi
    done < <(if [ -n "${PYTHON:-}" ]; then echo "$PYTHON"; else candidates; fi)
    return 1
}

make_venv() {
    # Megatron-Core has wheels for 3.12 and 3.13; a newer Python has to compile it, so it comes last.
    make_venv_with 14 && return
    if [ -z "${PYTHON:-}" ] && command -v uv >/dev/null; then
        echo "setting up $venv with uv"
        uv venv --quiet --clear --seed --python 3.12 "$venv" && return
    fi
    make_venv_with 99 && return
    if [ -n "${PYTHON:-}" ]; then
        echo "error: PYTHON=$PYTHON is not Python 3.12 or newer with the venv module" >&2
    else
        echo "error: no Python 3.12 or newer found on PATH, in pyenv or through uv: install one, or set PYTHON" >&2
    fi
    exit 2
}

install_apart() { # $1: a folder of the environment that is on no path, then packages for tests that put it there
    "$venv/bin/python" -m pip install --quiet --no-compile --no-deps --upgrade --target "$venv/$1" "${@:2}" \
        --constraint constraints.txt
}

if command -v flock >/dev/null; then # one at a time: `make test` and `make demo` may start together
    exec 9>.venv.lock
    flock 9
fi
if [ -e "$stamp" ] && fits "$venv/bin/python"; then
    exit 0
fi
rm -f "$venv"/.stamp-*
fits "$venv/bin/python" || make_venv
echo "installing (a few minutes and about 6 GB the first time, nothing the next)"
# Compiling all of torch and transformers would take as long as the rest.  Importing what we use compiles that much,
# also where the environment forbids it, and shows that the installation works.
used='from hydra_mcore import compat; compat.install()
import datasets, hypothesis, lm_eval.models.huggingface, matplotlib.pyplot, megatron.core.tokenizers.text, pytest
import torch.utils.tensorboard, wandb
from transformers import AutoTokenizer, Qwen3ForCausalLM'
if ! "$venv/bin/python" -m pip install --quiet --no-compile --editable '.[eval,gguf,test]' --constraint constraints.txt ||
    ! env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -W ignore -c "$used" ||
    ! install_apart te transformer-engine einops || ! install_apart kernels fla-core einops; then
    echo "error: the installation failed; run this again to continue it" >&2
    exit 1
fi
touch "$stamp"
