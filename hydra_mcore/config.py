# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Typed settings: the layer's options, a model's shape, the card beside a checkpoint, the options of a stage.

The dataclasses whose fields carry a docstring become Megatron argument groups (``hydra_mcore.train``).
Source marks: [paper] arXiv 2606.20097, [HALO] arXiv 2601.22156, [ours] where neither says.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hydra_mcore.errors import ConfigError, InputError
from hydra_mcore.files import checked, from_fields, is_name, read_json, shown, write_json
from hydra_mcore.heads import HeadMap
from hydra_mcore.kinds import KINDS
from hydra_mcore.shape import ModelShape

CARD_NAME = "model.json"
CARD_FORMAT = 2


@dataclass(kw_only=True, frozen=True)
class FusionOptions:
    """The options that all kinds of heads of a layer have in common."""

    qkv: Literal["separate", "shared"] = "separate"
    """K/V projections: separate for each kind of heads, or one for all kinds. Shared keys and values come by kv group,
    whatever gdn_kv and the like say [paper: separate].
    """
    gate_activation: Literal["sigmoid", "silu"] = "sigmoid"
    """Activation of the output gates [HALO: sigmoid]."""
    gate_order: Literal["before_norm", "after_norm"] = "before_norm"
    """Whether output gates act before or after the per-head norm [ours: before]."""
    fusion: Literal["scale", "norm", "none", "competition"] = "scale"
    """What joins the heads. 'scale' is a norm and a learned scale for each head, 'norm' the norm only, 'none' neither.
    'competition' is norm, scale and a softmax over heads [paper: scale].
    """
    fusion_norm_weight: Literal["branch", "none"] = "branch"
    """Learned weight of the fusion norm: one vector for each branch, or none [ours: branch]."""


@dataclass(kw_only=True, frozen=True)
class HydraOptions(FusionOptions, *(kind.options for kind in reversed(KINDS.values()))):
    """How a HydraHead layer computes: every choice the paper leaves open, and every ablation it reports.

    Each kind of heads brings its own options (``hydra_mcore/kinds``); the first kind's stand first.
    """

    def __post_init__(self) -> None:
        for name, hint in _literal_choices(type(self)).items():
            if getattr(self, name) not in hint:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(map(repr, hint))}")
        for kind in KINDS.values():
            kind.check(self)

    @classmethod
    def teacher(cls) -> HydraOptions:
        """The options under which an all-FA model is the pretrained one."""
        return cls(fa_position="rope", fa_log_scale="never", fa_gate="none", fusion="none")

    def log_scale_in(self, stage: str) -> bool:
        """Whether FA queries are scaled in a stage (align, distill, extend) or at "inference"."""
        return self.fa_log_scale == "always" or (self.fa_log_scale == "extend" and stage in ("extend", "inference"))


@dataclass(kw_only=True, frozen=True)
class ModelCard:
    """What stands in ``model.json`` beside a checkpoint: all that is needed to build its model.

    ``fingerprint`` names the pretrained weights the model descends from (sha256 over names, shapes and
    values in Hugging Face order), so a head map made for another teacher is noticed. ``source`` is what only the
    Hugging Face directory knew and an export needs again: its config.json, the dtypes of its tensors, its name,
    revision and licence. ``stages`` are the trainings so far: stage, sequence_length, batch_size (sequences),
    iterations, datasets.
    """

    shape: ModelShape
    head_map: HeadMap
    options: HydraOptions
    fingerprint: str
    stage: str = "teacher"
    source: dict[str, Any] = field(default_factory=dict, compare=False)
    stages: list[dict[str, Any]] = field(default_factory=list, compare=False)

    @property
    def longest_trained(self) -> int:
        """Tokens of the longest sequences that the model was trained on, by its teacher's makers or by a stage."""
        return max(self.shape.native_length, *(stage["sequence_length"] for stage in self.stages), 1)

    def save(self, checkpoint_dir: str | Path) -> None:
        write_json(
            Path(checkpoint_dir) / CARD_NAME,
            {
                "format": CARD_FORMAT,
                "stage": self.stage,
                "fingerprint": self.fingerprint,
                "shape": dataclasses.asdict(self.shape),
                "options": dataclasses.asdict(self.options),
                "head_map": self.head_map.to_dict(),
                "source": self.source,
                "stages": self.stages,
            },
        )

    @classmethod
    def load(cls, checkpoint_dir: str | Path) -> ModelCard:
        """Read a checkpoint's card; raises ConfigError (or HeadMapError) naming what is wrong."""
        path = Path(checkpoint_dir) / CARD_NAME
        if not path.is_file():
            raise ConfigError(
                f"{checkpoint_dir}: no {CARD_NAME}, so not a hydra_mcore checkpoint; make one with tools/convert.py"
                " import"
            )
        raw = read_json(path, ConfigError)
        if not isinstance(raw, dict) or raw.get("format") != CARD_FORMAT:
            found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
            raise ConfigError(
                f"{path}: format {shown(found)}, this version reads {CARD_FORMAT}; make the checkpoint again"
            )
        try:
            return from_fields(_CardFile, raw, "the card", ConfigError).card()
        except InputError as error:
            raise type(error)(f"{path}: {error}") from None

    def difference(self, model: dict[str, Any], fingerprint: str) -> str:
        """How a described model differs from this one: the first fact of its shape, else its weights; empty if neither
        does.
        """
        for name, theirs in model.items():
            mine = getattr(self.shape, name, None)
            if mine != theirs or isinstance(mine, bool) != isinstance(theirs, bool):
                return f"{name} is {shown(theirs)} there, {mine!r} in the teacher"
        if fingerprint and fingerprint != self.fingerprint:
            return f"weights {fingerprint[:12]} there, {self.fingerprint[:12]} in the teacher"
        return ""

    def check_head_map(self, head_map: HeadMap) -> None:
        """Raise ConfigError when a head map was made for another model, naming the difference."""
        if difference := self.difference(head_map.counts | head_map.model, head_map.fingerprint):
            raise ConfigError(f"the head map is for another model: {difference}; select heads for this teacher")


def teacher_card(shape: ModelShape, fingerprint: str) -> ModelCard:
    """The card of a pretrained model: every head FA, nothing added."""
    head_map = HeadMap.all_fa(shape.num_layers, shape.num_heads, shape.num_kv_groups)
    return ModelCard(shape=shape, head_map=head_map, options=HydraOptions.teacher(), fingerprint=fingerprint)


@dataclass(kw_only=True, frozen=True)
class Training:
    """An entry of ``ModelCard.stages``."""

    stage: str
    sequence_length: int
    batch_size: int
    iterations: int
    datasets: list[str] = field(default_factory=list)  # names on the hub, or of prepared data; older cards have none


@dataclass(kw_only=True, frozen=True)
class _CardSource:
    """``ModelCard.source``: the config alone where a Hugging Face directory is described and no tensor was read."""

    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = ""
    other_dtypes: dict[str, str] = field(default_factory=dict)
    output_layer_stored: bool = False
    name: str = ""
    revision: str = ""  # commit on the hub; older cards have none
    license: str = ""


@dataclass(kw_only=True, frozen=True)
class _CardFile:
    """What stands in ``model.json``."""

    format: int
    stage: str
    fingerprint: str
    shape: ModelShape
    options: HydraOptions
    head_map: Any
    source: dict[str, Any]
    stages: list[Training]

    def card(self) -> ModelCard:
        """The card; raises ConfigError (or HeadMapError) where its parts are not of one model."""
        head_map, shape = HeadMap.from_dict(self.head_map), self.shape
        if head_map.counts != {name: getattr(shape, name) for name in head_map.counts}:
            raise ConfigError(f"the head map has {head_map.counts}, the shape others; take both from one checkpoint")
        if not (is_name(self.stage) and is_name(self.fingerprint)):
            raise ConfigError("stage and fingerprint are one short line each")
        checked(self.source, _CardSource, "source", ConfigError)
        stages = [dataclasses.asdict(training) for training in self.stages]
        facts = {"fingerprint": self.fingerprint, "stage": self.stage, "source": self.source, "stages": stages}
        return ModelCard(shape=shape, head_map=head_map, options=self.options, **facts)


@dataclass(kw_only=True, frozen=True)
class StageOptions:
    """Which stage of the transfer runs, on which checkpoints, with which loss."""

    stage: Literal["align", "distill", "extend"] = "align"
    """Stage of training. 'align' fits heads to the teacher's, 'distill' fits logits to the teacher's, 'extend' trains
    on long context [paper].
    """
    run_dir: str = ""
    """Folder of the run. align starts from <run_dir>/student, and each stage writes <run_dir>/<stage>."""
    teacher: str = ""
    """Checkpoint folder of the imported teacher (align and distill)."""
    start_from: str = ""
    """Checkpoint folder to start from, instead of the stage before it in run_dir."""
    dtype: Literal["by_flags", "auto"] = "by_flags"
    """Precision of training. 'by_flags' does as Megatron's flags say. 'auto' is bf16 (with float32 master weights) on a
    GPU and on a CPU that computes faster in it [ours: by_flags].
    """
    fa_position: Literal["as_before", "nope", "rope"] = "as_before"
    """Positions of FA heads from this stage on: as in the checkpoint that it starts from, none, or rotary [ours:
    as_before]. The schedule of DroPE (arXiv 2512.12167) is rotary in align and distill, and none in extend.
    """
    align_loss: Literal["relative", "squared"] = "relative"
    """Loss of align: each layer's squared error, divided by the teacher's own square or as it is (paper Eq 15) [ours:
    relative].
    """
    align_heads: float = 0.0
    """Weight of the heads' own error, which is added to the layer's error in align. It compares each head's output
    before the output projection with the teacher's, relative and averaged over heads. Logs show the layer's error alone
    [ours: 0].
    """
    kl_weight: float = 1.0
    """Weight of KL(teacher, student) in distill (paper Eq 16) [ours: 1.0]."""
    ce_weight: float = 0.1
    """Weight of the next-token cross-entropy in distill (paper Eq 16) [ours: 0.1]."""
    kl_temperature: float = 1.0
    """Temperature of both distributions in the KL [HALO: 1]."""
    packed_documents: bool = False
    """Keep the documents of a row apart: attention, recurrence, convolution and positions start anew at each one."""
    teacher_fp8: bool = False
    """Let the teacher compute in FP8 too, as fp8-format says. Without this flag it has the precision of training."""
    fa_balance: Literal["heads", "queries"] = "heads"
    """How tensor-parallel ranks share FA heads. 'heads' gives them whole heads only. With 'queries' all ranks share the
    heads that are left over, and each computes a part of their queries.
    """
    keep_last: int = 2
    """Number of newest checkpoints that are kept."""
    keep_every: int = 0
    """Also keep the checkpoints whose step is a multiple of this number; 0 for none."""
    head_statistics_interval: int = 100
    """Steps between two reports of every head's gate, scale, output size, half-life and write gate; 0 for none."""
    needle_interval: int = 0
    """Steps between two measurements of needle accuracy on the training layout; 0 for none."""
    needle_length: int = 0
    """Tokens of a needle prompt with its answer; 0 for the sequence length of training."""
    needle_prompts: int = 32
    """Number of prompts of each needle task."""
    data_timeout: float = 600.0
    """Seconds that a rank waits for training data before it stops. It warns after half of them."""
    dry_run: bool = False
    """Check the run without building anything. Print the settings that are ours or differ from Megatron's defaults, and
    write all settings to a file in the run folder. Student, teacher and data may be missing if earlier jobs make them.
    """
    world_size: int = 0
    """Ranks of the real job, for which a dry run checks layout and batch sizes; 0 for its own ranks."""

    def __post_init__(self) -> None:
        for name, choices in _literal_choices(type(self)).items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        for name, least in (("kl_temperature", 1e-6), ("kl_weight", 0), ("ce_weight", 0), ("align_heads", 0)):
            if not getattr(self, name) >= least:  # so written, NaN is refused too
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be a number of at least {least}")
        if self.align_heads and self.fa_balance == "queries":
            raise ConfigError(
                f"align_heads is {self.align_heads}, but with fa_balance queries no rank has a shared head's whole"
                " output; use fa_balance heads in align"
            )
        if self.world_size < 0 or (self.world_size and not self.dry_run):
            raise ConfigError(
                f"world_size is {shown(self.world_size)}; only a dry run uses it, and training takes its ranks from"
                " torchrun: leave it out"
            )
        if self.keep_last < 1 or self.keep_every < 0:
            raise ConfigError(
                f"keep_last is {self.keep_last} and keep_every {self.keep_every}; keep at least the last checkpoint"
            )
        for name in ("head_statistics_interval", "needle_interval", "needle_length"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it counts steps or tokens, 0 for none")
        if self.needle_prompts < 1 or not self.data_timeout > 0:
            raise ConfigError(
                f"needle_prompts is {self.needle_prompts} and data_timeout {self.data_timeout}; both must be positive"
            )


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, read from its source (Python keeps none at run time)."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):  # without object
        body = ast.parse(inspect.cleandoc(inspect.getsource(base))).body[0].body
        for item, doc in itertools.pairwise(body):
            if isinstance(item, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                docs[item.target.id] = doc.value.value
    return docs


def add_flags(group: argparse._ArgumentGroup, cls: type) -> None:
    """One flag for every field of a dataclass, with its choices, default and docstring."""
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    for item in dataclasses.fields(cls):
        flag, help_text = "--" + item.name.replace("_", "-"), docs[item.name].replace("%", "%%")
        if hints[item.name] is bool:
            group.add_argument(flag, action="store_true", help=help_text)
            continue
        choices = typing.get_args(hints[item.name]) or None
        kind = str if choices else hints[item.name]
        group.add_argument(
            flag, type=kind, choices=choices, default=item.default, help=help_text + " (default: %(default)r)"
        )


def add_stage_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags of training that are ours; Megatron's stand beside them."""
    parser.add_argument(
        "--config", nargs="+", help="Recipe: YAML files of flags, with a section for each stage. A later file wins."
    )
    add_flags(parser.add_argument_group("hydra_mcore: stages of the transfer"), StageOptions)
    return parser


def _literal_choices(cls: type) -> dict[str, tuple[Any, ...]]:
    """The allowed values of each Literal field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is Literal}
