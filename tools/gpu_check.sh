#!/usr/bin/env bash
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
#
# The GPU suite, meant for 10 minutes on one Hopper GPU (not yet run on one): all tests marked gpu, then the benchmark's sections
# delta-rule, attention, layer and step. Needs a Python with torch for that GPU, transformers, tensorboard, matplotlib, pytest and its plug-in
# for time-outs; no network where the rest is carried along.
#
#   tools/gpu_check.sh --fetch wheels            where there is a network: what such a Python lacks, into a folder (4 MB)
#   WHEELS=wheels tools/gpu_check.sh             on the GPU's machine: install from there, run everything
#   tools/gpu_check.sh --dry-run                 say what would run
#   HYDRA_TEST_DEVICE=cpu tools/gpu_check.sh     a rehearsal without a GPU: the same commands, short; tests marked gpu are skipped
#
# On Hopper flash-linear-attention refuses a backward pass with Triton 3.4 to 3.7.0, which computes wrong gradients there. Where torch
# came with one of these, fetch a better one too (198 MB): tools/gpu_check.sh --fetch wheels triton==3.7.1
#
# PYTHON chooses the interpreter (python3). OUT is the folder for results (gpu-check-DATE): machine.json with date, GPU and versions,
# tests.txt, and for every section a table (.md), all measured times (.json) and a figure (.png). Exit status 1 when anything failed; the rest still ran.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
device=${HYDRA_TEST_DEVICE:-gpu}
out=${OUT:-gpu-check-$(date -u +%Y-%m-%dT%H%M%S)}
packages="megatron-core flash-linear-attention fla-core einops wonderwords"

fetch() { # $1: folder, then further packages as pip names them
    local name version folder=$1
    local wanted=("${@:2}")
    for name in $packages; do
        version=$(sed -n "s/^$name==\([^ ]*\).*/\1/p" constraints.txt)
        wanted+=("$name==$version")
    done
    # the GPU's machine may be another one than this: Linux, x86-64, and the Python below
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "${PYTHON_VERSION:-3.12}" \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
        --dest "$folder" "${wanted[@]}"
    du -sh "$folder"
}

failed=()
run() { # $1: seconds at most, $2: file for its output, then the command
    local limit=$1 log=$2
    shift 2
    echo "+ $*"
    [ "$dry" = yes ] && return
    timeout "$limit" "$@" 2>&1 | tee "$out/$log" || failed+=("$log")
}

dry=no
case "${1:-}" in
"") ;;
--dry-run) dry=yes ;;
--fetch)
    if [ $# -lt 2 ]; then
        echo "usage: tools/gpu_check.sh --fetch FOLDER [PACKAGE==VERSION ...]" >&2
        exit 2
    fi
    fetch "${@:2}"
    exit
    ;;
*)
    sed -n '5,20s/^# \{0,1\}//p' "$0"
    [ "$1" = --help ] && exit
    exit 2
    ;;
esac

if [ -n "${WHEELS:-}" ] && [ "$dry" = no ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HYDRA_TEST_DEVICE=$device PYTHONUNBUFFERED=1
if [ "$dry" = no ]; then
    facts=$("$python" tools/gpu_facts.py "$device")
    mkdir -p "$out"
    tee "$out/machine.json" <<<"$facts"
fi

# lengths that together take minutes: the layer to 512K tokens, where all heads FA need some 10 s a repeat
delta_rule="--heads 12 --lengths 2048 16384 131072 --slow-limit 0 --repeats 5"
layer="--lengths 2048 4096 8192 16384 32768 131072 524288 --repeats 3"
attention="--lengths 16384 131072 --repeats 3"
step="--lengths 2048 8192 --repeats 5"
if [ "$device" = cpu ]; then
    delta_rule="--lengths 128 256 --slow-limit 0 --repeats 1 --accuracy-length 64"
    layer="--lengths 128 256 --hidden 128 --repeats 1"
    attention="--lengths 64 --repeats 1"
    step="--lengths 64 --repeats 1 --layers 1 --hidden 64 --ffn 64 --vocabulary 512"
fi
run 200 tests.txt "$python" -m pytest -m gpu tests/gpu -p no:cacheprovider -ra --durations=10
# shellcheck disable=SC2086 # flags are words
{
    run 60 delta-rule.md "$python" tools/benchmark.py delta-rule $delta_rule --json "$out/delta-rule.json" --figure "$out/delta-rule.png"
    run 60 attention.md "$python" tools/benchmark.py attention $attention --json "$out/attention.json"
    run 180 layer.md "$python" tools/benchmark.py layer $layer --json "$out/layer.json" --figure "$out/layer.png"
    run 100 step.md "$python" tools/benchmark.py step $step --json "$out/step.json" --figure "$out/step.png"
}
if [ ${#failed[@]} -gt 0 ]; then
    echo "gpu-check: failed: ${failed[*]} (outputs in $out)" >&2
    exit 1
fi
[ "$dry" = yes ] || echo "gpu-check: all well; results in $out"
