# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What becomes of each of Megatron's flags, as docs/flags.md says it."""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

from megatron.training.arguments import add_megatron_arguments

from hydra_mcore.compat import MEGATRON_VERSION
from hydra_mcore.errors import InputError
from hydra_mcore.files import write_text
from hydra_mcore.shape import ModelShape
from hydra_mcore.stages import STAGES, default_flags
from hydra_mcore.train.arguments import ENGINE, ENGINE_CPU, ENGINE_GPU, ENGINE_TE
from hydra_mcore.train.flags import NEEDS_GPU, SUPPORTED, FlagParser, flag_name, unused

# Flags that were judged to do in all stages what Megatron says, on a CPU too.
WORKS = frozenset(
    """
    tensor-model-parallel-size pipeline-model-parallel-size sequence-parallel context-parallel-size
    no-initialization use-cpu-initialization bf16 deterministic-mode overlap-p2p-communication-warmup-flush
    microbatch-group-size-per-virtual-pipeline-stage account-for-embedding-in-pipeline-split
    account-for-loss-in-pipeline-split hidden-dropout calculate-per-token-loss
    disable-bf16-reduced-precision-matmul recompute-granularity recompute-method recompute-num-layers
    distribute-saved-activations no-clone-scatter-output-in-embedding mlp-chunks-for-training weight-decay
    clip-grad adam-beta1 adam-beta2 adam-eps profile profile-step-start profile-step-end profile-ranks
    micro-batch-size global-batch-size rampup-batch-size decrease-batch-size-if-needed
    check-weight-hash-across-dp-replicas-interval train-sync-interval train-iters exit-interval
    exit-duration-in-mins exit-signal-handler exit-signal manual-gc manual-gc-interval no-manual-gc-eval
    iterations-to-skip recompute-activations check-for-large-grads result-rejected-tracker-filename
    no-bias-swiglu-fusion no-bias-dropout-fusion dump-param-to-param-group-map seed lr-decay-style
    lr-wsd-decay-style lr-decay-iters lr-wsd-decay-iters lr-warmup-fraction lr-warmup-iters lr-warmup-init
    use-checkpoint-opt_param-scheduler start-weight-decay end-weight-decay weight-decay-incr-style lr min-lr
    decoupled-lr decoupled-min-lr save-interval save-params-interval save-wgrads-interval
    no-ckpt-fully-parallel-save async-save async-ckpt-cpu-priority async-ckpt-io-priority
    ckpt-fully-parallel-load ckpt-fully-parallel-load-exchange-algo ckpt-assume-constant-structure
    no-ckpt-load-validate-sharding-integrity dist-ckpt-strictness distrib-optim-fully-reshardable-mem-efficient
    verify-integrity no-save-optim no-save-rng no-load-optim no-load-rng dist-ckpt-workers grad-reduce-in-bf16
    accumulate-allreduce-grads-in-fp32 distributed-backend distributed-timeout-minutes no-align-grad-reduce
    local-rank use-tp-pp-dp-mapping disable-gloo-process-groups distributed-timeout-seconds-after-init
    disable-jit-fuser decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers
    pipeline-model-parallel-layout num-layers-per-virtual-pipeline-stage num-virtual-stages-per-pipeline-rank
    no-overlap-p2p-communication overlap-grad-reduce ddp-num-buckets ddp-bucket-size
    ddp-pad-buckets-for-high-nccl-busbw ddp-reduce-scatter-with-fp32-accumulation
    ddp-param-name-patterns-for-fp32-local-accumulation ddp-average-in-collective overlap-param-gather
    no-align-param-gather use-distributed-optimizer eval-iters eval-interval start-eval-at-iter
    eval-global-batch-size data-path split train-data-path valid-data-path test-data-path data-args-path
    per-split-data-args-path data-cache-path no-mmap-bin-files seq-length num-workers eod-mask-loss
    num-dataset-builder-threads vocab-file merge-file tokenizer-model tokenizer-special-tokens
    tiktoken-num-special-tokens null-tokenizer-eod-id null-tokenizer-pad-id log-interval log-params-norm
    log-throughput log-progress timing-log-level timing-log-option tensorboard-dir tensorboard-log-interval
    tensorboard-queue-size log-timers-to-tensorboard no-log-loss-scale-to-tensorboard
    log-validation-ppl-to-tensorboard log-memory-to-tensorboard log-memory-interval log-num-zeros-in-grad
    no-barrier-with-level-1-timing log-world-size-to-tensorboard wandb-project wandb-exp-name wandb-save-dir
    wandb-entity logging-level error-injection-rate error-injection-type rerun-mode""".split()
)
# The same, by Transformer Engine's layers.
WORKS_WITH_TE = frozenset(
    """
    no-gradient-accumulation-fusion no-rope-fusion first-last-layers-bf16 num-layers-at-start-in-bf16
    num-layers-at-end-in-bf16""".split()
)
SIZES = {"num_layers": 1, "hidden_size": 1, "num_heads": 1, "num_kv_groups": 1, "head_dim": 1, "ffn_hidden_size": 1}
CARD = ModelShape(**SIZES, vocab_size=1, native_length=1).to_recipe()

PAGE = """\
# Megatron's flags

This page says what each flag of Megatron-Core {version} does in the stages of training. `python -m hydra_mcore.train
--help` lists the flags of the stages themselves.

- **works**: the flag does what Megatron says, on a CPU as well. Some flags act only where another flag is set:
  `--profile-ranks` with `--profile`, `--rerun-mode` and `--error-injection-rate` with `--check-for-large-grads`,
  `--dist-ckpt-workers` with `--async-save` and `--ckpt-assume-constant-structure`.
- **works on a GPU**: only code for GPUs reads the flag. Without a GPU a dry run takes it, and training refuses it. None
  of them has been run on a GPU yet.
- **works with Transformer Engine**: only its layers read the flag ([Transformer Engine](transformer_engine.md)), so
  training refuses it with `--transformer-impl local`. None of them has been run on a GPU yet. A dry run takes it
  without Transformer Engine too, except `--no-rope-fusion`: Megatron asks for that kernel at once.
- **from the card**: the model's `model.json` sets it; another value is refused.
- **only ...**: other values are refused, and the words after the colon say why.
- **refused**: any value is refused. The flag would have no effect on HydraHead's layers or on the stages, or would
  break them.

A refusal is one line that names the flag, the reason and what to do, with exit status 2. It comes before anything is
built or written. In a recipe a flag has no dashes in front. `true` switches on a flag that takes no value, and `false`
takes back what the stage would switch on. Settings that Megatron does not take together are refused in its own words.

`tests/unit/train/test_flag_table.py` checks this page. It gives each flag a value other than its default and does what
`--dry-run` does with a tiny student, up to Megatron's own validation. It compares what was taken with this page, and
fails if Megatron has a flag that nobody has judged. Short trainings of the three stages then record which settings are
read by code that trains, not only by code that checks or prints them. Of the flags that work on a CPU all but six are
read there. One of the six is passed to torch at the check, and five belong to tokenizers that the tests do not have.
This proves that a flag is taken and read. Whether it has the right effect is proven only for the flags that other tests
are about, such as those of layouts, checkpoints and logs.

This page is made by `python tools/flag_table.py --out docs/flags.md` from the tables that refuse flags.

## Values that the stages set
The first column of values is Megatron's default. A recipe or the command line may set another value where the verdict
allows it.

| flag | Megatron | here |
|:--|:--|:--|
{defaults}

{groups}
"""


def run(args: argparse.Namespace) -> None:
    """Write the page to ``args.out``, or print it."""
    text = page()
    if args.out is None:
        sys.stdout.write(text)
    else:
        write_text(args.out, text)


def megatron_flags() -> dict[str, argparse.Action]:
    """Megatron's flags by their names in recipes, in its own order."""
    parser = add_megatron_arguments(FlagParser(allow_abbrev=False))
    return {flag_name(action): action for action in parser._actions if action.option_strings and action.dest != "help"}


def verdict(action: argparse.Action) -> str:
    """What becomes of a flag; raises InputError for one that nobody has judged."""
    name = flag_name(action)
    if reason := unused(action):
        return f"refused: {reason}"
    if name in CARD:
        return "from the card"
    if name in SUPPORTED:
        values, why = SUPPORTED[name]
        setting = f"{action.dest.replace('_', '-')} " if action.nargs == 0 else ""
        return f"only {setting}{' or '.join(map(_shown, values))}: {why}"
    if name in NEEDS_GPU:
        return "works on a GPU"
    if name in WORKS_WITH_TE:
        return "works with Transformer Engine"
    if name in WORKS:
        return "works"
    raise InputError(f"--{name} was never judged; put it into WORKS, or into UNUSED or SUPPORTED of train/flags.py")


def page() -> str:
    """The text of docs/flags.md."""
    by_group = itertools.groupby(megatron_flags().values(), key=lambda action: action.container.title)
    by_title: dict[str, list[argparse.Action]] = {}
    for title, actions in by_group:
        by_title.setdefault(title, []).extend(actions)
    groups = "\n\n".join(_group(title, actions) for title, actions in by_title.items())
    return PAGE.format(version=MEGATRON_VERSION, defaults="\n".join(_defaults()), groups=groups)


def _group(title: str, actions: list[argparse.Action]) -> str:
    """A table of verdicts, what works first and what is refused last."""
    rows: dict[str, list[str]] = {}
    for action in actions:
        rows.setdefault(verdict(action), []).append(f"`--{flag_name(action)}`")
    ranks = ("works", "from", "only", "refused")
    order = sorted(rows, key=lambda row: [row.startswith(rank) for rank in ranks].index(True))
    return "\n".join(
        [f"## {title}", "| verdict | flags |", "|:--|:--|", *(f"| {row} | {' '.join(rows[row])} |" for row in order)]
    )


def _defaults() -> list[str]:
    """Rows of what the stages set: for all, by stage, with a GPU or without."""
    here: dict[str, str] = {name: _shown(value) for name, value in ENGINE.items()}
    stages = {stage: default_flags(stage) for stage in STAGES}
    for name in stages["align"]:
        values = {stage: _shown(flags[name]) for stage, flags in stages.items()}
        same = len(set(values.values())) == 1
        here[name] = values["align"] if same else ", ".join(f"{value} in {stage}" for stage, value in values.items())
    places = (("with a GPU", ENGINE_GPU), ("with Transformer Engine", ENGINE_TE), ("without a GPU", ENGINE_CPU))
    for where, flags in places:
        here |= {name: f"{_shown(value)} {where}" for name, value in flags.items()}
    defaults = {name: _default(action) for name, action in megatron_flags().items()}
    return [f"| `--{name}` | {defaults[name]} | {value} |" for name, value in here.items() if value != defaults[name]]


def _default(action: argparse.Action) -> str:
    """Megatron's default of a flag, as a recipe would write it."""
    if action.nargs == 0:
        return _shown(action.default == action.const)
    return "" if action.default is None else _shown(action.default)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
