# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Megatron's flags as the stages take them: which ones do nothing here, what values they may have, which one a refusal
means.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import linecache
import re
import traceback
from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Any, NoReturn

from hydra_mcore.config import ConfigError
from hydra_mcore.files import LARGEST_INT

# Flags that the model and the stages do not ask, or that would break them silently: why, and which. Names without
# dashes, with wildcards; a title in brackets stands for Megatron's whole argument group. The first line that matches
# gives the reason.
UNUSED = {
    "each layer has one dense MLP": (
        """
        [moe] moe-* *expert-* use-grouped-gemm-* overlap-moe-* overlap-dispatch-* ep-overlap-* high-priority-a2a-*
        ckpt-fully-parallel-*-process-group"""
    ),
    "the layer splits a sequence among ranks in its own way": (
        """
        hybrid-context-parallel hierarchical-context-parallel-sizes max-seqlen-per-dp-cp-rank cp-comm-type"""
    ),
    "attention and recurrence are HydraHead's; their choices are made with tools/convert.py hybridize": (
        """
        [mla] [experimental_attention_variant] multi-latent-attention experimental-attention-variant *dsa-* linear-*
        mamba-*
        disable-mamba-* is-hybrid-model hybrid-* attention-output-gate attention-backend attention-softmax-in-fp32
        flash-attention-version use-flash-attn fp32-residual-connection softmax-type
        qk-l2-norm qk-clip* window-* apply-query-key-layer-scaling test-mode"""
    ),
    "the model's form and its rotary angles come from the card of the checkpoint": (
        """
        [heterogeneous architecture] rotary-interleaved rotary-percent rotary-seq-len-* use-rotary-* use-rope-scaling
        rope-* no-rope-freq
        no-position-embedding *yarn-* relative-attention-* mrope-section max-position-embeddings openai-gelu
        squared-relu quick-geglu
        glu-linear-offset activation-func-clamp-value apply-layernorm-1p apply-residual-* encoder-num-layers
        decoder-num-layers
        padded-vocab-size no-pad-vocab-size vocab-extra-ids bert-* no-bias-gelu-fusion onnx-safe mtp-* use-mup mup-*
        spec yaml-cfg"""
    ),
    "weights come from a checkpoint": "init-method-* embedding-init-method-std data-parallel-random-init",
    "HydraHead's layers use nothing of this": (
        """
        [Transformer-Engine] *fp8* *fp4* no-stream-ckpt-dequant tp-comm-*
        no-tp-comm-*
        delay-wgrad-compute use-te-* te-rng-tracker use-transformer-engine-* *kitchen-* symmetric-ar-type
        fused-residual-rmsnorm
        use-fused-weighted-* cpu-offloading-* fine-grained-* offload-modules min-offloaded-* delay-offload-*
        delta-offload-*
        activation-offload-* log-max-attention-logit *cuda-graph cuda-graph-*"""
    ),
    "fp16 is not supported, the losses carry no loss scale; use bf16": (
        "fp16 fp16-lm-cross-entropy *loss-scale *loss-scale-window hysteresis"
    ),
    "the losses are fused with the output layer": "cross-entropy-* defer-embedding-* wgrad-deferral-limit",
    "training does not generate text; see tools/evaluate.py": (
        """
        [inference] inference-* nccl-all-reduce-for-prefill mlp-chunks-for-prefill flash-decode batch-invariant-mode"""
    ),
    "this command trains the stages align, distill and extend on packed text, nothing else": (
        """
        [rl] [sft] [biencoder] [vision] [Logits Distillation] fim-* mask-prob short-seq-prob sample-rate
        encoder-seq-length
        decoder-seq-length skip-train freeze-all-layers"""
    ),
    "a stage counts in steps; use train-iters, lr-decay-iters and lr-warmup-iters": (
        """
        train-samples lr-decay-samples lr-warmup-samples lr-wsd-decay-samples phase-transition-iterations"""
    ),
    "global-batch-size is always set; use rampup-batch-size": "step-batch-size-schedule",
    "a stage that goes on follows the schedule of its flags anyway": "override-opt*param-scheduler",
    "checkpoints lie below run-dir, a stage goes on by itself, and start-from names another start": (
        """
        save load pretrained-checkpoint finetune ckpt-step override-ckpt-iteration exit-on-missing-checkpoint
        use-checkpoint-args
        use-mp-args-* no-use-tokenizer-model-* auto-detect-ckpt-format ckpt-convert-* dist-ckpt-save-pre-* use-dist-ckpt
        dist-ckpt-format ckpt-fully-parallel-save non-persistent-* replication* load-main-params-from-ckpt
        no-strict-fsdp-*"""
    ),
    "it deletes checkpoints unsafely; use keep-last and keep-every": "save-retain-interval",
    "Megatron does not take it with distributed checkpoints": "overlap-param-gather-with-optimizer-step",
    "only the writer of nvidia-resiliency-ext does it, and the stages use Megatron's own": "async-ckpt-use-cpu-shm",
    "parameters are whole on each rank, their optimizer's state is sharded": (
        """
        use-megatron-fsdp use-torch-fsdp2 megatron-fsdp-* fsdp-* torch-fsdp2-* *-sharding-strategy
        enable-full-sharding-in-hsdp
        init-model-with-meta-device suggested-communication-unit-size create-all-gather-group
        tensor-parallel-num-weight-shards"""
    ),
    "the data set asks only split, seed, packed-documents, eod-mask-loss, data-cache-path and its number of threads": (
        """
        per-dataset-sequences-path dataloader-* no-create-attention-mask-* object-storage-cache-path
        mid-level-dataset-surplus
        allow-ambiguous-pad-tokens mock-data"""
    ),
    "it does not reach recurrent heads; use packed-documents": "reset-position-ids reset-attention-mask",
    "there is one validation set, read in rows of micro-batch-size for eval-iters steps": (
        "full-validation multiple-validation-sets validation-set-names eval-micro-batch-size"
    ),
    "text becomes tokens before training; see tools/prepare_data.py": (
        """
        chat-template tokenizer-hf-no-* tokenizer-sentencepiece-legacy no-tokenizer-sentencepiece-*
        tiktoken-pattern"""
    ),
    "the optimizer is Adam": "muon-* lion-* sgd-* no-use-layer-wise-param-layout",
    "Adam keeps its state in float32, beside the parameters; checkpoints of another state are not proven": (
        """
        use-precision-aware-optimizer main-grads-dtype main-params-dtype exp-avg-dtype exp-avg-sq-dtype
        optimizer-cpu-offload optimizer-offload-fraction use-torch-optimizer-for-cpu-offload
        overlap-cpu-optimizer-* no-pin-cpu-*"""
    ),
    "weight decay is for matrices; no vector has it, nor have the norms of queries and keys": (
        "apply-wd-to-qk-layernorm no-weight-decay-cond-type"
    ),
    "no step measures its products and its data for it": "[straggler]",
    "profile records with a profiler of its own": "use-pytorch-profiler pytorch-profiler-*",
    "exit-signal saves before it stops": "exit-signal-handler-for-*",
    "a process makes its groups at once": "lazy-mpu-init",
    "torch has no such exchange": "use-ring-exchange-p2p",
    "model.json and settings.json say how a model was built": "config-logger-dir",
    "Megatron looks at its own linear layers alone": "save-activations-interval save-dgrads-interval",
    "one distributed optimizer serves all data-parallel ranks": "num-distributed-optimizer-instances",
    "Megatron knows the name but reads it nowhere": (
        "check-for-spiky-loss enable-experimental no-gradient-reduce-div-fusion use-mcore-models"
    ),
    "Megatron gave the name up; use micro-batch-size, tensor-model-parallel-size, lr-warmup-iters, recompute-*": (
        "batch-size model-parallel-size warmup checkpoint-activations"
    ),
    "jobs are started again by SLURM, and logs go to the console, TensorBoard and Weights & Biases": (
        """
        [In-process restart] [ft_package] [autoresume] [one logger] [workload inspector] [fault injector] [msc]
        fake-process-group"""
    ),
    "code that comes with a tokenizer is not run": "trust-remote-code tokenizer-metadata",
}
# Flags that have a meaning here, with fewer values than Megatron's: the values of what they set, and why.
SUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "optimizer": (("adam",), "no other was tried"),
    "ckpt-format": (("torch_dist",), "its checkpoints load on every layout"),
    "dist-ckpt-optim-fully-reshardable": ((True,), "ranks hold different numbers of heads"),
    "async-strategy": (("mcore",), "a kill during its saves leaves the last checkpoint whole"),
    "use-persistent-ckpt-worker": ((True,), "without it Megatron switches async-save off"),
    "dataloader-type": (("single", "cyclic"), "data come from data-path"),
    "tokenizer-type": (
        (
            *("HuggingFaceTokenizer", "NullTokenizer", "TikTokenizer", "GPT2BPETokenizer"),
            *("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"),
        ),
        "others are not for text that is read from left to right",
    ),
    "recompute-modules": (("core_attn", "layernorm", "mlp"), "the layers have no other modules of that kind"),
    "no-check-for-nan-in-loss-and-grad": ((False,), "all ranks stop together, with one line, at what is not finite"),
    "no-persist-layer-norm": ((True,), "the norms are HydraHead's"),
    "no-masked-softmax-fusion": ((False,), "attention is HydraHead's"),
    "transformer-impl": (("local", "transformer_engine"), "layers are made in these two ways"),
    "fp8-format": (("hybrid", "e4m3"), "Transformer Engine has these"),
    "fp8-recipe": (("tensorwise", "blockwise"), "delayed waits for all ranks, which hold unequal numbers of layers"),
}
# Flags that only code for GPUs reads. They are refused where there is none, except by a dry run.
NEEDS_GPU = frozenset(
    """
    pipeline-model-parallel-comm-backend use-sharp sharp-enabled-group use-nccl-ub disable-symmetric-registration
    high-priority-stream-groups nccl-communicator-config-path flight-recorder-dump-path
    flight-recorder-trace-buffer-size no-flight-recorder-dump-on-timeout flight-recorder-include-stack-trace
    no-flight-recorder-include-only-active no-flight-recorder-extra-dump-on-exec empty-unused-memory-level
    gpu-sniff-test-interval record-memory-history memory-snapshot-path record-shapes nvtx-ranges log-energy
    log-device-memory-used""".split()
)

OURS = "hydra_mcore"  # how the titles of our groups of flags begin
MAX_SEQUENCES = 2**31 - 1  # of a stage: Megatron lists all of them, in memory, before the first step
POSITIVE = (
    "seq-length train-iters *-size *-interval *-minutes *-mins *-instances *-layers *-per-* *-threads *-count"
    " ddp-num-buckets".split()
)
RANGES = {  # where it is not from 0, or 1 for what is positive, to 2**53; that of a list is of each item
    "adam-beta1": (0, 1 - 1e-12),
    "adam-beta2": (0, 1 - 1e-12),
    "adam-eps": (1e-300, 1),
    "data-timeout": (1e-3, 1e9),
    "distributed-timeout-minutes": (1, 10**6),
    "distributed-timeout-seconds-after-init": (1, 10**8),
    "lr": (0, 1e37),
    "lr-warmup-fraction": (0, 1),
    "min-lr": (0, 1e37),
    "num-dataset-builder-threads": (1, 1024),
    "num-workers": (0, 1024),
    "seed": (1, 2**31 - 1),
}


class FlagParser(argparse.ArgumentParser):
    """A parser whose errors are ConfigErrors, without Megatron's hundreds of lines of usage, and that refuses what does
    nothing here.
    """

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            near = difflib.get_close_matches(unknown.split()[0], list(self._option_string_actions), n=1)
            message = f"unknown flag {unknown.split()[0]}" + (f"; did you mean {near[0]}?" if near else "")
        raise ConfigError(message if len(message) <= 300 else message[:297] + "...")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if reason := unused(action):
            raise argparse.ArgumentError(action, f"cannot be used here ({reason}); leave it out")
        return super()._get_values(action, arg_strings)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except KeyError:  # the name of an enum's member
            names = ", ".join(choice.name for choice in action.choices)
            raise argparse.ArgumentError(action, f"invalid choice: {arg_string!r} (choose from {names})") from None


def unused(action: argparse.Action) -> str:
    """Why a flag does nothing in the stages, or breaks them; empty if it does what Megatron says."""
    title = action.container.title
    return "" if title.startswith(OURS) else _reason(flag_name(action), title)


@functools.cache
def _reason(name: str, title: str) -> str:
    for reason, patterns in UNUSED.items():
        names = re.sub(r"\[.*?\]", "", patterns).split()
        if f"[{title}]" in patterns or any(fnmatchcase(name, pattern) for pattern in names):
            return "" if name in SUPPORTED else reason
    return ""


def flag_name(action: argparse.Action) -> str:
    """A flag as recipes write it."""
    return action.option_strings[0].removeprefix("--")


def _setting(action: argparse.Action) -> str:
    """What a flag sets, as a recipe may write it: of a switch its own name may say the opposite."""
    return action.dest.replace("_", "-") if action.nargs == 0 else flag_name(action)


def check_values(
    parser: argparse.ArgumentParser, known: argparse.Namespace, card: argparse.Namespace, fixed: Collection[str]
) -> None:
    """Refuse values that no stage can train with, before anything is computed from them.

    Args:
        parser: knows every flag.
        known: the parsed flags.
        card: the flags of the model's card alone, parsed.
        fixed: the names of those.

    Raises:
        ConfigError: naming the flag.
    """
    for action in parser._actions:
        if not action.option_strings or action.dest == "help":
            continue
        name, value = flag_name(action), getattr(known, action.dest)
        if name in fixed and value != getattr(card, action.dest):
            raise ConfigError(
                f"{_setting(action)} is {str(value)[:40]}, and the card of the model says"
                f" {getattr(card, action.dest)}; leave it out"
            )
        _check_supported(name, action, value if isinstance(value, list) else [value])
        if value is not None and action.nargs != 0 and action.type in (int, float) and not unused(action):
            _check_range(name, action, value if isinstance(value, list) else [value])
    _check_split(known.split)
    if known.train_iters * known.global_batch_size > MAX_SEQUENCES:
        raise ConfigError(
            f"train-iters {known.train_iters} x global-batch-size {known.global_batch_size} are more than"
            f" {MAX_SEQUENCES} sequences, whose list would fill the memory; lower train-iters"
        )


def _check_supported(name: str, action: argparse.Action, values: list[Any]) -> None:
    supported, why = SUPPORTED.get(name, (values, ""))
    for value in values:
        if value is not None and value not in supported:
            taken = " or ".join(map(str, supported))
            raise ConfigError(f"{_setting(action)} is {str(value)[:40]}; the stages train with {taken} ({why})")


def check_without_gpu(parser: argparse.ArgumentParser, known: argparse.Namespace) -> None:
    """Refuse what a training without a GPU would not heed, or fall over.

    Raises:
        ConfigError: naming the flag.
    """
    for action in parser._actions:
        if action.option_strings and flag_name(action) in NEEDS_GPU and getattr(known, action.dest) != action.default:
            raise ConfigError(f"{flag_name(action)} needs a GPU, and torch sees none here; leave it out")
    if known.distributed_backend != "gloo":
        raise ConfigError(f"distributed-backend {known.distributed_backend} needs a GPU, and torch sees none; use gloo")


def _check_range(name: str, action: argparse.Action, values: list[float]) -> None:
    default = action.default if isinstance(action.default, int | float) else None
    ours = action.container.title.startswith(OURS)  # StageOptions says which of ours may be 0
    positive = default != 0 and not ours and any(fnmatchcase(name, pattern) for pattern in POSITIVE)
    low, high = RANGES.get(name, (default if default and default < 0 else int(positive), LARGEST_INT))
    for value in values:
        if not low <= value <= high:  # so written, NaN is refused too
            raise ConfigError(f"{name} is {str(value)[:40]}; it must be a number of at least {low} and at most {high}")


def _check_split(split: str | None) -> None:
    parts = (split or "1").replace(" ", "").split(",")
    numbers = [float(part) for part in parts if re.fullmatch(r"\d+\.?\d*|\.\d+", part)]
    if len(numbers) != len(parts) or len(parts) > 3 or not 0 < numbers[0] <= sum(numbers) < 1e9:
        raise ConfigError(
            f"split is {str(split)[:40]!r}; it must be up to three numbers with commas, the first one more than 0"
            " (training)"
        )


def refusal(error: Exception, args: argparse.Namespace) -> ConfigError:
    """Megatron's refusal of settings in one line that names the flags: those that its words or its failed condition
    name.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    condition = _condition(frame.filename, frame.lineno or 0)
    said = " ".join(str(error).split()) or condition or type(error).__name__
    named = re.findall(r"(?:args|self|config)\.(\w+)", condition)
    values = {name: getattr(args, name) for name in named if hasattr(args, name)}
    shown = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in values.items())
    return ConfigError(f"Megatron refuses these settings: {said[:300]}" + (f" ({shown[:300]})" if shown else ""))


def _condition(path: str, line: int) -> str:
    """The condition in the source that ended in an error on this line, of an assert or of the ``if`` around a raise;
    else the line.
    """
    source = "".join(linecache.getlines(path))
    around = [
        node
        for node in ast.walk(ast.parse(source))
        if getattr(node, "lineno", line + 1) <= line <= getattr(node, "end_lineno", 0)
    ]
    tests = [node.test for node in around if isinstance(node, ast.Assert | ast.If)]  # walked from the outside in
    if tests and any(isinstance(node, ast.Assert | ast.Raise) for node in around):
        return " ".join(ast.unparse(tests[-1]).split())
    return linecache.getline(path, line).strip()
