# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# The job scripts share this file: it reads arguments, runs commands on the job's nodes, and stops and continues a job.
#
#   sbatch slurm/extend.sh [RECIPE.yaml ...] [-- FLAG ...]     FLAGs go to the command, over the recipe
#   bash slurm/extend.sh --dry-run [...]                       show the commands, run nothing
#
# A script sources it in the repository's root, with its own arguments.
set -euo pipefail
source slurm/env.sh

say() { echo "[$(date '+%F %T')] $*"; }
fail() {
    echo "${SLURM_JOB_NAME:-${0##*/}}: $*" >&2
    exit 2
}

recipes=() flags=() dry_run=
while (($#)); do
    case $1 in
    --dry-run) dry_run=yes ;;
    --)
        # shellcheck disable=SC2034  # the scripts read it
        flags=("${@:2}")
        break
        ;;
    -*) fail "unknown option $1; flags of the command itself go behind --" ;;
    *) recipes+=("$1") ;;
    esac
    shift
done
((${#recipes[@]})) || read -ra recipes <<<"$HYDRA_RECIPE"
for recipe in "${recipes[@]}"; do
    [[ -f $recipe ]] || fail "no recipe $recipe in $PWD"
done

# Pyxis takes a name for a file if it begins with / or a dot. It looks for others in a registry, even for image.sqsh.
if [[ -f $HYDRA_CONTAINER ]]; then
    HYDRA_CONTAINER=$(realpath --no-symlinks "$HYDRA_CONTAINER")
elif [[ $HYDRA_CONTAINER == [./]* || $HYDRA_CONTAINER == *.sqsh ]]; then
    fail "no file $HYDRA_CONTAINER (HYDRA_CONTAINER) in $PWD; enroot import makes it (docs/container.md)"
elif [[ $HYDRA_CONTAINER && ! $dry_run ]]; then
    say "HYDRA_CONTAINER=$HYDRA_CONTAINER is no file: every step imports it again;" \
        "enroot import makes one (docs/container.md)"
fi
container=()
[[ -z $HYDRA_CONTAINER ]] || container=(
    --container-image="$HYDRA_CONTAINER" --container-mounts="$PWD:$PWD${HYDRA_MOUNTS:+,$HYDRA_MOUNTS}"
    --container-workdir="$PWD"
)

# has SECTION: whether the recipe has a section for a command. Python reads the recipe, in the job's container if there
# is one. Outside of a job no container can be asked. Then the answer is yes, and the job itself finds out.
has() {
    local answer step=()
    if [[ $HYDRA_CONTAINER ]]; then
        [[ ${SLURM_JOB_ID:-} && ! $dry_run ]] || return 0
        step=(srun --nodes=1 --ntasks=1 "${container[@]}")
    fi
    if ! answer=$("${step[@]}" "$HYDRA_PYTHON" -m hydra_mcore.recipe has "$1" "${recipes[@]}"); then
        [[ $answer == broken ]] || fail "$HYDRA_PYTHON (HYDRA_PYTHON) cannot read recipes; run make env or name another"
        exit 2
    fi
    [[ $answer == yes ]]
}

# alone ARGUMENT...: one Python process on the first node
alone() { launch srun --nodes=1 --ntasks=1 "${container[@]}" "$HYDRA_PYTHON" "$@"; }

# ranks ARGUMENT...: torchrun on every node. The ranks meet on the first one.
ranks() {
    local address=FIRST_NODE port=FREE_PORT
    if [[ ${SLURM_JOB_ID:-} ]]; then
        address=$(scontrol show node "$(scontrol show hostnames | head -n 1)" -o | sed 's/.* NodeAddr=\([^ ]*\).*/\1/')
        # Each job has its own port, so that jobs on one node do not meet. It is below the ports that systems assign.
        port=$((20000 + SLURM_JOB_ID % 10000))
        while timeout 5 bash -c ": </dev/tcp/$address/$port" 2>/dev/null; do port=$((port + 101)); done
    fi
    # The ranks of a node are children of one task. So that task must not be bound to one core.
    launch srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 "${container[@]}" bash slurm/node.sh \
        "$HYDRA_PYTHON" -m hydra_mcore.torchrun --nnodes="${SLURM_NNODES:-NODES}" --master-addr="$address" \
        --master-port="$port" --rdzv-id="${SLURM_JOB_ID:-JOB}.${SLURM_RESTART_COUNT:-0}" --rdzv-conf=timeout=900 \
        --max-restarts=0 "$@"
}

# launch COMMAND...: run a step of the job. It does not return if the job must stop:
#   on USR1 (the time limit is near, or scancel --batch --signal=USR1) the job saves and requeues itself
#   on TERM it saves and ends (scancel; after preemption, scontrol requeue or a lost node SLURM starts it again)
launch() {
    local status=0 stop=
    if [[ $dry_run ]]; then
        echo "$*"
        return
    fi
    [[ ${SLURM_JOB_ID:-} ]] || fail "this is no SLURM job: submit it with sbatch, or see its commands with --dry-run"
    say "$*"
    "$@" &
    local step=$!
    trap 'stop=USR1; say "asked to stop and go on later: saving"; kill -USR1 "$step" || true' USR1
    trap 'stop=TERM; say "asked to end: saving"; kill -USR1 "$step" || true' TERM
    while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
    wait "$step" || status=$?
    trap - USR1 TERM
    [[ $stop != TERM ]] || exit 143
    [[ $stop != USR1 ]] || requeue
    ((status == 0)) || exit "$status"
}

# requeue: put the job back into the queue. It continues from its last complete checkpoint.
requeue() {
    ((${SLURM_RESTART_COUNT:-0} < HYDRA_MAX_RESTARTS)) || fail "not requeued again after $SLURM_RESTART_COUNT times"
    say "requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID" || say "SLURM refuses; submit the job again to go on"
    exit 1
}
