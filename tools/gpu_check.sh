#!/usr/bin/env bash
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
#
# The GPU suite, for 8 minutes on one Hopper GPU at most (not yet run on one). Its parts come in the order of what would be
# found: single kernels, layers and commands, stages, Transformer Engine, then what is fast. Each has its own time limit; a
# part that fails or runs out of time leaves the others alone. Needs a Python with torch for that GPU, transformers,
# tensorboard, matplotlib, pytest and its plug-in for time-outs; no network where the rest is carried along.
#
#   tools/gpu_check.sh --fetch wheels            where there is a network: what such a Python lacks, into a folder (5 MB)
#   WHEELS=wheels tools/gpu_check.sh             on the GPU's machine: install from there, run everything
#   tools/gpu_check.sh --dry-run                 say what would run, with the limit of each part in seconds
#   HYDRA_TEST_DEVICE=cpu tools/gpu_check.sh     a rehearsal without a GPU: the same commands, short; tests marked gpu are skipped
#
# On Hopper flash-linear-attention refuses a backward pass with Triton 3.4 to 3.7.0, which computes wrong gradients there. Where torch
# came with one of these, fetch a better one too (198 MB): tools/gpu_check.sh --fetch wheels triton==3.7.1
#
# PYTHON chooses the interpreter (python3). OUT is the folder for results (gpu-check-DATE): results.tar.gz holds all of them.
# results.md has the date, the GPU, versions, and how each part ended and how long it took, then what each part said;
# .json all measured times. Exit status 1 when anything failed; the rest still ran.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
device=${HYDRA_TEST_DEVICE:-gpu}
out=${OUT:-gpu-check-$(date -u +%Y-%m-%dT%H%M%S)}
packages="megatron-core flash-linear-attention fla-core einops wonderwords pytest-xdist execnet"

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
skipped=()
run() { # $1: seconds at most, $2: name of the part, then the command
    local limit=$1 part=$2 start=$SECONDS status=0
    shift 2
    echo "+ $part ($limit s): $*"
    [ "$dry" = yes ] && return
    [ "$device" = gpu ] || limit=$((4 * limit)) # of whatever machine is at hand
    timeout --kill-after=3 "$limit" "$@" >"$out/$part.md" 2>&1 || status=$?
    tail -n 15 "$out/$part.md"
    case $status in
    0 | 5) if grep -qE '^[0-9]+ skipped' "$out/$part.md"; then how="all skipped"; else how=well; fi ;;
    124 | 137) how="out of time" ;;
    *) how="status $status" ;;
    esac
    case $how in
    well) ;;
    "all skipped") skipped+=("$part") ;; # nothing is known of it
    *) failed+=("$part") ;;
    esac
    echo "| $part | $how | $((SECONDS - start)) | $limit |" >>"$out/parts.md"
}

join() { # one file that says everything, and one that holds everything
    {
        echo "# GPU check"
        printf '\n```json\n%s\n```\n\n| part | ended | seconds | limit |\n|---|---|---:|---:|\n' "$facts"
        cat "$out/parts.md"
        while IFS=' |' read -r part _; do
            printf '\n## %s\n```\n' "$part"
            tail -n 200 "$out/$part.md"
            printf '```\n'
        done <<<"$(sed 's/^| //' "$out/parts.md")"
    } >"$out/results.md"
    tar -czf "$out.tar.gz" -C "$out" . && mv "$out.tar.gz" "$out/results.tar.gz"
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
    sed -n '5,23s/^# \{0,1\}//p' "$0"
    [ "$1" = --help ] && exit
    exit 2
    ;;
esac

if [ -n "${WHEELS:-}" ] && [ "$dry" = no ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    timeout 30 "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HYDRA_TEST_DEVICE=$device PYTHONUNBUFFERED=1
if [ "$dry" = no ]; then
    facts=$(timeout 20 "$python" tools/gpu_facts.py "$device")
    mkdir -p "$out"
    tee "$out/machine.json" <<<"$facts"
fi

# Lengths that together take a minute; every number of heads is tuned anew, so that a layer is measured at one ratio.
delta_rule="--heads 12 --lengths 2048 16384 131072 --slow-limit 0 --repeats 5"
layer="--ratios 3:1 --lengths 2048 4096 8192 16384 32768 131072 --repeats 3"
attention="--lengths 16384 65536 --repeats 3"
step="--lengths 2048 8192 --repeats 5"
workers=8 # most of the time goes into compiling kernels, a core each
if [ "$device" = cpu ]; then
    delta_rule="--lengths 128 256 --slow-limit 0 --repeats 1 --accuracy-length 64"
    layer="--ratios 3:1 --lengths 128 256 --hidden 128 --repeats 1"
    attention="--lengths 64 --repeats 1"
    step="--lengths 64 --repeats 1 --layers 1 --hidden 64 --ffn 64 --vocabulary 512"
    workers=0
fi
tests() { # $1: seconds at most, $2: name of the part, then its files in tests/gpu
    run "$1" "$2" "$python" -m pytest -m gpu -p no:cacheprovider -ra --durations=10 --numprocesses=$workers "${@:3}"
}
tests 100 kernels tests/gpu/test_fla_kernels_gpu.py tests/gpu/test_recurrences_gpu.py
tests 50 layers tests/gpu/test_{layers,evaluation,selection,hf_model}_gpu.py
tests 60 stages tests/gpu/test_{stages,profile}_gpu.py
tests 70 transformer-engine tests/gpu/test_transformer_engine_gpu.py
# shellcheck disable=SC2086 # flags are words
{
    run 50 delta-rule "$python" tools/benchmark.py delta-rule $delta_rule --json "$out/delta-rule.json" --figure "$out/delta-rule.png"
    run 20 attention "$python" tools/benchmark.py attention $attention --json "$out/attention.json"
    run 50 layer "$python" tools/benchmark.py layer $layer --json "$out/layer.json" --figure "$out/layer.png"
    run 30 step "$python" tools/benchmark.py step $step --json "$out/step.json" --figure "$out/step.png"
}
[ "$dry" = yes ] && exit
join
if [ ${#failed[@]} -gt 0 ]; then
    echo "gpu-check: failed: ${failed[*]} (results in $out/results.md)" >&2
    exit 1
fi
[ ${#skipped[@]} -eq 0 ] || echo "gpu-check: nothing was run of: ${skipped[*]} (why: $out/results.md)"
echo "gpu-check: all well; results in $out/results.md"
