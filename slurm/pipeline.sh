#!/usr/bin/env bash
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
# Submit all jobs from the text to the evaluation. Each job starts after the one before it has succeeded.
#
#   bash slurm/pipeline.sh [--dry-run] [RECIPE.yaml ...] [-- FLAG ...]     FLAGs go to all three stages, over the recipe
#
# The same command continues a pipeline that failed. It ends at once if everything exists.
[[ -f slurm/common.sh ]] || { echo "pipeline: start it in the repository's root" >&2; exit 2; }
source slurm/common.sh
[[ $dry_run ]] || command -v sbatch >/dev/null || fail "no sbatch here: run it on the cluster, or with --dry-run"

# A pipeline that is submitted twice runs one job at a time: singleton compares names.
name=$(basename "$(dirname "${recipes[0]}")")-$(cksum <<<"${recipes[*]}" | cut -c 1-4)
jobs=()

# what node.sh will count on nodes that have what is asked for
per_node=${HYDRA_RANKS_PER_NODE:-$((HYDRA_GPUS_PER_NODE > 0 ? HYDRA_GPUS_PER_NODE : 1))}

# submit SCRIPT OPTION...: submit it to start after the job before it
submit() {
    local script=$1 job words=("${recipes[@]}")
    [[ $script != @(align|distill|extend) || ${#flags[@]} == 0 ]] || words+=(-- "${flags[@]}")
    local command=(
        sbatch --parsable --job-name="$script-$name" --output="$HYDRA_LOGS/%x-%j.out" --kill-on-invalid-dep=yes
        --dependency="singleton${jobs[*]:+,afterok:${jobs[-1]}}" --signal="B:USR1@$HYDRA_SAVE_SECONDS" "${@:2}"
        "slurm/$script.sh" "${words[@]}"
    )
    if [[ $script == prepare && ${SBATCH_CPUS_PER_GPU:-}${SBATCH_GPUS_PER_NODE:-} ]]; then # it has no GPUs to count by
        command=(env -u SBATCH_CPUS_PER_GPU -u SBATCH_GPUS_PER_NODE "${command[@]}")
    fi
    if [[ $dry_run ]]; then
        local -x SLURM_NNODES=1 # as the job will have it
        local option
        for option in "${@:2}"; do [[ $option != --nodes=* ]] || SLURM_NNODES=${option#*=}; done
        echo "${command[*]}"
        bash "slurm/$script.sh" --dry-run "${words[@]}" | sed 's/^/    /'
        [[ $script == prepare ]] ||
            echo "    nodes: $SLURM_NNODES, ranks on each: $per_node, ranks: $((SLURM_NNODES * per_node))"
        job=ID_OF_${script^^}
    else
        job=$("${command[@]}")
        echo "$script: job ${job%%;*}, output $HYDRA_LOGS/$script-$name-${job%%;*}.out"
    fi
    jobs+=("${job%%;*}")
}

# shellcheck disable=SC2086  # several words
! has prepare || submit prepare --gres=none $HYDRA_PREPARE_OPTIONS
if has import || has select || has hybridize; then submit select --gres="$SBATCH_GRES"; fi
for stage in align distill extend; do
    submit "$stage" --nodes="$HYDRA_NODES" --gres="$SBATCH_GRES"
done
! has evaluate || submit evaluate --gres="$SBATCH_GRES"
if [[ $dry_run ]]; then
    set_here=()
    for variable in "${!SBATCH_@}"; do set_here+=("$variable=${!variable}"); done
    echo "environment for sbatch: ${set_here[*]:-no SBATCH_ variable is set}"
    for stage in align distill extend; do
        echo "check $stage: $HYDRA_PYTHON -m hydra_mcore.train --stage $stage --config ${recipes[*]} --dry-run" \
            "--world-size $((HYDRA_NODES * per_node))" "${flags[@]}"
    done
    exit
fi
cat <<END
watch: squeue --jobs=$(IFS=, && echo "${jobs[*]}") --format='%.10i %.30j %.10T %.12M %R'
       tail -F $HYDRA_LOGS/*-$name-*.out
stop:  scancel ${jobs[*]}
END
