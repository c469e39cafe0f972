#!/usr/bin/env bash
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
#
# Makes .venv ready: finds Python 3.12 or newer, installs the package, lm-eval and the tests with the versions of
# constraints.txt.  Does nothing when that is done already; setup.py or constraints.txt changing makes it run again.
# PYTHON=/path/to/python chooses the interpreter.
#
#   tools/setup_env.sh                  everything, from the package index that pip knows
#   tools/setup_env.sh --cpu            with torch's build for CPUs, a third of the size; pip must find that build:
#                                       name PyTorch's own index in PIP_EXTRA_INDEX_URL, or a folder that holds the
#                                       wheel in PIP_FIND_LINKS
#   tools/setup_env.sh --download DIR   put all wheels into a folder, to be carried to a machine without a network
#   tools/setup_env.sh --from DIR       install from that folder alone
set -euo pipefail

usage() {
    echo "error: $1; usage: tools/setup_env.sh [--cpu] [--download DIR | --from DIR]" >&2
    exit 2
}

cpu='' download='' from=''
while [ $# -gt 0 ]; do
    case $1 in
        --cpu) cpu=+cpu ;;
        --download | --from)
            [ $# -gt 1 ] || usage "$1 needs a folder"
            [ "$1" = --from ] && from=$2 || download=$2
            shift
            ;;
        *) usage "unknown argument $1" ;;
    esac
    shift
done
[ -z "$download" ] || [ -z "$from" ] || usage "--download and --from exclude each other"
if [ -n "$from" ]; then
    from=$(cd "$from" 2>/dev/null && pwd) || usage "--from: no such folder"
    export PIP_NO_INDEX=1 PIP_FIND_LINKS=$from # also for what pip starts to build the package
fi
[ -z "$download" ] || download=$(mkdir -p "$download" && cd "$download" && pwd)
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

torch=torch$(sed -n 's/^torch\(==[^ ]*\).*/\1/p' constraints.txt)$cpu
wanted=('.[eval,gguf,test]' "$torch")
apart=(transformer-engine fla-core einops)

failed() {
    [ -z "$cpu" ] || echo "error: if pip found no $torch, name PyTorch's index of CPU builds in PIP_EXTRA_INDEX_URL" \
        "or a folder with that wheel in PIP_FIND_LINKS" >&2
    echo "error: the $1 failed; run this again to continue it" >&2
    exit 1
}

download_all() { # wheels only, so that nothing has to be compiled where they are installed
    "$venv/bin/python" -m pip wheel --quiet --wheel-dir "$download" "${wanted[@]}" setuptools \
        --constraint constraints.txt &&
        "$venv/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$download" "${apart[@]}" \
            --constraint constraints.txt
    local status=$?
    rm -rf build # setuptools builds there
    return $status
}

install_apart() { # $1: a folder of the environment that is on no path, then packages for tests that put it there
    "$venv/bin/python" -m pip install --quiet --no-compile --no-deps --upgrade --target "$venv/$1" "${@:2}" \
        --constraint constraints.txt
}

install_kernels() { # torch's build for CPUs comes without Triton, which they need
    ! "$venv/bin/python" -c 'import triton' 2>/dev/null || install_apart kernels fla-core einops
}

if command -v flock >/dev/null; then # one at a time: `make test` and `make demo` may start together
    exec 9>.venv.lock
    flock 9
fi
if [ -n "$download" ]; then
    fits "$venv/bin/python" || make_venv
    download_all || failed download
    echo "$download: $(find "$download" -name '*.whl' | wc -l) wheels, $(du -sh "$download" | cut -f 1)B; on the other" \
        "machine: make env WHEELS=DIR"
    exit 0
fi
if [ -e "$stamp" ] && fits "$venv/bin/python"; then
    exit 0
fi
rm -f "$venv"/.stamp-*
fits "$venv/bin/python" || make_venv
echo "installing (a few minutes and about $([ -n "$cpu" ] && echo 2 || echo 6) GB the first time, nothing the next)"
# Compiling all of torch and transformers would take as long as the rest.  Importing what we use compiles that much,
# also where the environment forbids it, and shows that the installation works.
used='from hydra_mcore import compat; compat.install()
import datasets, hypothesis, lm_eval.models.huggingface, matplotlib.pyplot, megatron.core.tokenizers.text, pytest
import torch.utils.tensorboard, wandb
from transformers import AutoTokenizer, Qwen3ForCausalLM'
if ! "$venv/bin/python" -m pip install --quiet --no-compile --editable "${wanted[@]}" --constraint constraints.txt ||
    ! env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -W ignore -c "$used" ||
    ! install_apart te transformer-engine einops || ! install_kernels; then
    failed installation
fi
touch "$stamp"
