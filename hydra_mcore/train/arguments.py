# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""From a recipe and a command line to the flags that Megatron parses, checked before anything is built."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.training.arguments import add_megatron_arguments

from hydra_mcore.config import CARD_NAME, ConfigError, ModelCard, StageOptions, add_stage_flags
from hydra_mcore.corpus.manifest import dataset_names, expand_blend
from hydra_mcore.files import check_writable
from hydra_mcore.heads import HeadLayout
from hydra_mcore.kinds import KINDS
from hydra_mcore.model.checkpoints import TRACKER, latest_iteration, trainings
from hydra_mcore.model.precision import fast_bf16
from hydra_mcore.model.te_layers import FP8_MULTIPLE
from hydra_mcore.recipe import Recipe
from hydra_mcore.sequence import SequencePart
from hydra_mcore.stages import STAGES, check_named, default_flags
from hydra_mcore.train.checkpoint_care import difference, resumable
from hydra_mcore.train.flags import FlagParser, check_values, check_without_gpu
from hydra_mcore.train.recipe_model import model_card

# Our layer brings its own modules, so Megatron's local implementation serves around it; the optimizer format is
# the only one that reshards when ranks hold different numbers of heads.
ENGINE: dict[str, Any] = {
    "transformer-impl": "local",
    "fp8-recipe": "tensorwise",
    "use-distributed-optimizer": True,
    "dist-ckpt-optim-fully-reshardable": True,
    "exit-signal-handler": True,
    "async-strategy": "mcore",
    "use-persistent-ckpt-worker": True,  # without it, Megatron switches async-save off
    "no-persist-layer-norm": True,
    "no-rope-fusion": True,
    "no-masked-softmax-fusion": True,
    "no-gradient-accumulation-fusion": True,
    "no-check-for-nan-in-loss-and-grad": True,  # ours lets all ranks stop together, with one line (train.anomalies)
    "hidden-dropout": 0.0,  # Megatron's default is 0.1
    "micro-batch-size": 1,
    "eval-iters": 0,
    "eval-interval": 1000,
    "save-interval": 500,
    "log-interval": 10,
    "tensorboard-log-interval": 1,
    "profile-step-start": 2,  # steps 3 and 4: the first ones also build and warm up
    "profile-step-end": 4,
    "profile-ranks": [0],
    "distributed-timeout-minutes": 30,
}
# The writer is a process of its own that copies tensors off the GPU while training waits, then writes them while it
# goes on. On a CPU it shares the cores and doubles a rank's memory, so saves are synchronous unless asked for.
ENGINE_GPU: dict[str, Any] = {"async-save": True}
# Where Transformer Engine loads, which it never does on a CPU (compat).
ENGINE_TE: dict[str, Any] = {"transformer-impl": "transformer_engine"}
ENGINE_CPU: dict[str, Any] = {
    "distributed-backend": "gloo",
    "num-workers": 0,
    "no-bias-swiglu-fusion": True,
    "no-bias-dropout-fusion": True,
    "disable-jit-fuser": True,
}

# In the run folder, for all stages: Megatron's indices of the data, which it would else write beside the data.
CACHE = "cache"
EARLY = {"tensorboard", "wandb", CARD_NAME + ".partial"}  # what a run that was stopped at its very start may leave


@dataclass(frozen=True)
class ResolvedStage:
    """A stage resolved: its options, the card of the model it trains, where it starts and writes, all flags.

    ``assumed`` says where the card of a dry run comes from while there is nothing to start from; ``config`` names the
    recipe's files.
    """

    options: StageOptions
    card: ModelCard
    start: Path
    save: Path
    resume: bool
    finished: bool
    flags: list[str]
    assumed: str
    config: list[str]


def resolve(argv: list[str]) -> ResolvedStage:
    """Lay command line over model card over recipe over stage defaults, and check what can be checked now.

    Raises:
        ConfigError: an unknown key or flag, a layout that does not fit the model, a missing or broken checkpoint,
            an output folder that holds another run.
    """
    parser, recipe, options = recipe_flags(argv, with_gpu=torch.cuda.is_available())
    config = parser.parse_known_args(argv)[0].config or []
    _check_folders(options)
    start = Path(options.start_from or Path(options.run_dir) / STAGES[options.stage].starts_from)
    card, assumed = _starting_card(options, start, config)
    card = _card_of_stage(card, options)
    save = Path(options.run_dir) / options.stage
    resume = None if assumed else _check_output(save, card)
    recipe = recipe.over(_places(options, start, save))
    ranks = options.world_size or int(os.environ.get("WORLD_SIZE", "1"))
    known, flags = model_flags(parser, recipe, argv, card, ranks)
    if torch.cuda.is_available() or not options.dry_run:  # a dry run may stand for another machine, with a GPU
        _check_transformer_engine(known)
    if not (options.dry_run or torch.cuda.is_available()):
        check_without_gpu(parser, known)
    _check_writable(known, save)
    flags += ["--save", str(save)] + (["--load", str(save)] if resume else [])
    card = dataclasses.replace(card, stages=[*([] if assumed else trainings(card, start)), _this_stage(known)])
    finished = resume is not None and int(resume.name.removeprefix("iter_")) >= known.train_iters
    return ResolvedStage(
        options,
        card,
        start,
        save,
        resume is not None,
        finished,
        _without_missing_wandb(known, flags + _shard_flags(known)),
        assumed,
        config,
    )


def _card_of_stage(start: ModelCard, options: StageOptions) -> ModelCard:
    """The card of what the stage trains, from that of the checkpoint it starts from."""
    card = dataclasses.replace(start, stage=options.stage)
    if options.fa_position == "as_before":
        return card
    return dataclasses.replace(card, options=dataclasses.replace(card.options, fa_position=options.fa_position))


def recipe_flags(argv: list[str], with_gpu: bool) -> tuple[argparse.ArgumentParser, Recipe, StageOptions]:
    """What is asked for before the model is known: the parser, the recipe over its defaults, the options of recipe and
    command line.

    Raises:
        ConfigError: an unknown key or flag, one that does nothing here, or no stage.
    """
    parser = add_stage_flags(add_megatron_arguments(FlagParser(prog="python -m hydra_mcore.train", allow_abbrev=False)))
    first = FlagParser(allow_abbrev=False, add_help=False)
    first.add_argument("--stage", choices=tuple(STAGES), required=True)
    first.add_argument("--config", nargs="+")
    chosen, _ = first.parse_known_args(argv)
    recipe = Recipe.load(chosen.config, chosen.stage) if chosen.config else Recipe("command line")
    engine = ENGINE | (ENGINE_TE if HAVE_TE else {}) | (ENGINE_GPU if with_gpu else ENGINE_CPU)
    recipe = recipe.over(engine | default_flags(chosen.stage))
    known = parser.parse_args(recipe.to_flags(parser) + argv)
    options = StageOptions(**{field.name: getattr(known, field.name) for field in dataclasses.fields(StageOptions)})
    if options.dtype == "auto" and (with_gpu or fast_bf16()):
        recipe = recipe.over({"bf16": True})
    return parser, recipe, options


def model_flags(
    parser: argparse.ArgumentParser, recipe: Recipe, argv: list[str], card: ModelCard, ranks: int
) -> tuple[argparse.Namespace, list[str]]:
    """All flags of a stage on so many ranks, the model's own among them: parsed, and as they are.

    Raises:
        ConfigError: settings that no stage trains with, or that do not fit the model or the ranks.
    """
    shape = Recipe(CARD_NAME, card.shape.to_recipe())
    flags = recipe.over(shape.values).to_flags(parser) + argv
    known = parser.parse_args(flags)
    check_values(parser, known, parser.parse_args(shape.to_flags(parser)), shape.values)
    check_settings(known, card, ranks)
    return known, [*flags, "--max-position-embeddings", str(max(known.seq_length, card.shape.native_length))]


def _starting_card(options: StageOptions, start: Path, config: list[str]) -> tuple[ModelCard, str]:
    """The card of the checkpoint that a stage starts from; for a dry run before it is there, the card that it will
    have, and where that comes from.

    Raises:
        ConfigError: it is not there yet.
    """
    if not (start / TRACKER).is_file() and options.dry_run:
        return model_card(config, options)
    before = STAGES[options.stage].starts_from
    if not (options.start_from or (start / TRACKER).is_file()):
        maker = f"stage {before}" if before in STAGES else "tools/convert.py hybridize"
        raise ConfigError(
            f"stage {options.stage} starts from {start}, which holds no complete checkpoint; run {maker} first, or set"
            " start-from"
        )
    latest_iteration(start)
    return ModelCard.load(start), ""


def _places(options: StageOptions, start: Path, save: Path) -> dict[str, Any]:
    """Megatron's flags for the folders that a stage reads and writes by default, all below the run folder."""
    places = {"tensorboard-dir": str(save / "tensorboard"), "data-cache-path": str(Path(options.run_dir) / CACHE)}
    if (start / "tokenizer").is_dir():
        places |= {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": str(start / "tokenizer")}
    return places


def _this_stage(known: argparse.Namespace) -> dict[str, Any]:
    """The entry that the model card's list of trainings gets for this stage."""
    planned = {
        "sequence_length": known.seq_length,
        "batch_size": known.global_batch_size,
        "iterations": known.train_iters,
        "datasets": dataset_names(known.train_data_path or known.data_path or []),
    }
    return {"stage": known.stage, **planned}


def _check_folders(options: StageOptions) -> None:
    check_named(options.stage, options.run_dir, options.teacher)
    if STAGES[options.stage].needs_teacher and not options.dry_run:
        ModelCard.load(options.teacher)


def _check_output(save: Path, card: ModelCard) -> Path | None:
    """The checkpoint of this very run in the output folder to go on from; raises ConfigError when it holds another run.

    Rank 0 alone judges the folder: others may look while it, or the logger of the last rank, already writes there.
    """
    if os.environ.get("RANK", "0") == "0":
        if (save / CARD_NAME).is_file():
            if found := difference(ModelCard.load(save), card):
                raise ConfigError(f"{save} already holds another run ({found}); choose another run-dir")
        elif save.exists() and any(path.name not in EARLY for path in save.iterdir()):
            raise ConfigError(f"{save} is not empty and no run of ours; choose another run-dir or empty it")
    return resumable(save)


def _check_writable(known: argparse.Namespace, save: Path) -> None:
    """Raise ConfigError for a folder that training could not write to."""
    for name, folder in (
        ("run-dir", save),
        ("data-cache-path", known.data_cache_path),
        ("tensorboard-dir", known.tensorboard_dir),
        ("wandb-save-dir", known.wandb_project and known.wandb_save_dir),
    ):
        if folder:
            check_writable(folder, name, ConfigError)


def check_settings(known: argparse.Namespace, card: ModelCard, ranks: int) -> None:
    """Raise ConfigError for what Megatron would not notice, or say less clearly."""
    _check_layout(known, card, ranks)
    _check_fp8(known, card)
    if known.packed_documents and known.micro_batch_size != 1:
        raise ConfigError(
            f"packed documents are rows of their own: set micro-batch-size 1 instead of {known.micro_batch_size}"
        )
    if known.calculate_per_token_loss and STAGES[known.stage].fits_layers:
        raise ConfigError(
            f"the {known.stage} loss is a mean over rows, not over tokens; leave calculate-per-token-loss to the other"
            " stages"
        )
    decay_iters = known.lr_decay_iters or known.train_iters
    if known.lr_warmup_iters >= decay_iters:
        raise ConfigError(
            f"lr-warmup-iters {known.lr_warmup_iters} must be fewer than the {decay_iters} steps of the schedule"
        )
    start, end = known.profile_step_start, known.profile_step_end
    if known.profile and not 0 <= start < end <= known.train_iters:
        raise ConfigError(
            f"profile-step-start {start} to profile-step-end {end} is no window of the {known.train_iters} steps of"
            " training"
        )


def _check_layout(known: argparse.Namespace, card: ModelCard, ranks: int) -> None:
    tp_size, pp_size, cp_size = (
        known.tensor_model_parallel_size,
        known.pipeline_model_parallel_size,
        known.context_parallel_size,
    )
    HeadLayout(card.head_map.layers[0], card.shape.num_kv_groups, tp_size)
    uneven = (
        known.pipeline_model_parallel_layout
        or known.decoder_first_pipeline_num_layers
        or known.decoder_last_pipeline_num_layers
    )
    if card.shape.num_layers % pp_size and not uneven:
        raise ConfigError(f"pipeline parallel size {pp_size} does not divide {card.shape.num_layers} layers")
    if ranks % (tp_size * pp_size * cp_size):
        raise ConfigError(
            f"tensor {tp_size} x pipeline {pp_size} x context parallel {cp_size} does not divide {ranks} ranks"
        )
    part = SequencePart(known.seq_length, cp_size).num_tokens
    if cp_size > 1 and known.seq_length % (2 * cp_size):
        raise ConfigError(f"seq-length {known.seq_length} must divide by twice the context parallel size {cp_size}")
    if known.sequence_parallel and part % tp_size:
        raise ConfigError(
            f"sequence parallelism: {part} tokens a rank do not divide by tensor parallel size {tp_size}; change"
            " seq-length"
        )
    for kind in KINDS.values():
        if cp_size > 1 and part < (looked_at := kind.looks_back(card.options)):
            raise ConfigError(
                f"{part} tokens a context-parallel rank are fewer than the {looked_at} that {kind.label} heads look"
                " back"
            )


def _check_transformer_engine(known: argparse.Namespace) -> None:
    """Raise ConfigError for what only Transformer Engine's layers can do, where they are not used."""
    with_te = known.transformer_impl == "transformer_engine"
    if with_te and not HAVE_TE:
        raise ConfigError("transformer-impl transformer_engine needs Transformer Engine and a GPU; use local")
    asked = {
        "fp8-format": known.fp8,
        "no-gradient-accumulation-fusion false": known.gradient_accumulation_fusion,
        "no-rope-fusion false": known.apply_rope_fusion,
    }
    if not with_te and (needs := [name for name, value in asked.items() if value]):
        raise ConfigError(f"{needs[0]} needs transformer-impl transformer_engine, not local; leave it out")


def _check_fp8(known: argparse.Namespace, card: ModelCard) -> None:
    """Raise ConfigError for sizes that products in FP8 do not take, and for settings that need or exclude FP8."""
    if not known.fp8:
        of_fp8 = {
            "teacher-fp8": known.teacher_fp8,
            "first-last-layers-bf16": known.first_last_layers_bf16,
            "num-layers-at-start-in-bf16": known.num_layers_at_start_in_bf16 != 1,
            "num-layers-at-end-in-bf16": known.num_layers_at_end_in_bf16 != 1,
        }
        if needs := [name for name, value in of_fp8.items() if value]:
            raise ConfigError(f"{needs[0]} says where FP8 is used; set fp8-format, or leave it out")
        return
    if "layernorm" in (known.recompute_modules or []):
        raise ConfigError("fp8-format keeps the inputs that recompute-modules layernorm drops; leave layernorm out")
    tokens = SequencePart(known.seq_length, known.context_parallel_size).num_tokens * known.micro_batch_size
    ranks = known.tensor_model_parallel_size
    sizes = {
        "the model's width": card.shape.hidden_size,
        "the size of a head": card.shape.head_dim,
        "the MLP's width on a tensor-parallel rank": card.shape.ffn_hidden_size / ranks,
        "a rank's number of tokens (seq-length x micro-batch-size)": tokens / (ranks if known.sequence_parallel else 1),
    }
    for what, size in sizes.items():
        if size % FP8_MULTIPLE:
            raise ConfigError(f"fp8-format: {what} is {size:g}, no multiple of {FP8_MULTIPLE}; leave fp8-format out")


def _shard_flags(known: argparse.Namespace) -> list[str]:
    """The data paths again, prepared data replaced by all of its shards."""
    flags = []
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        if given := getattr(known, name):
            flags += ["--" + name.replace("_", "-"), *expand_blend(given)]
    return flags


def _without_missing_wandb(known: argparse.Namespace, flags: list[str]) -> list[str]:
    """Training goes on without Weights & Biases where it is not installed."""
    if known.wandb_project and importlib.util.find_spec("wandb") is None:
        _say_that_wandb_is_missing()
        return [*flags, "--wandb-project", ""]
    return flags


@functools.cache  # once, though a stage resolves its flags again when it has its folder
def _say_that_wandb_is_missing() -> None:
    print("wandb is not installed: logging to the console and TensorBoard only")
