# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure an exported model beside its teacher in transformers.

The numbers are the seconds of a prompt, and the seconds and cache bytes of a decoded token.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape
from hydra_mcore.convert.families import SHAPE_KEYS
from hydra_mcore.convert.hf_code import model_class
from hydra_mcore.convert.hf_config import CONFIG_NAME, read_object
from hydra_mcore.convert.hydra_family import MODEL_TYPE, to_config
from hydra_mcore.errors import InputError, first_line
from hydra_mcore.heads import HeadLayout, HeadMap, HeadsByKind
from hydra_mcore.kinds import DEFAULT_LINEAR, FA, KINDS
from hydra_mcore.model.precision import DTYPES
from hydra_mcore.progress import Progress
from tools.benchmarks.measure import Point, chosen_machine, in_turn, timed
from tools.benchmarks.report import Report
from tools.benchmarks.shapes import DECODED, DECODED_FA_HEADS, spread_heads

PREFILL_COLUMNS = ("tokens", "model", "s a prompt (least..most)", "tokens/s", "times faster than the teacher")
CHUNK = 1024  # tokens that a prefill reads at once
WARM_UP = 2  # steps before those that are timed
MIB = 2**20
COLUMNS = (
    "tokens", "HydraHead", "teacher, ms a token", "HydraHead, ms a token", "times faster", "by bytes read",
    "teacher, cache MiB",
    "HydraHead, cache MiB", "times smaller", "formula exact", "page faults a token",
)  # fmt: skip


def run(args: argparse.Namespace) -> Report:
    """Single-token calls after a real prefill, then whole prompts; fails where a cache is not of the size that the
    formula says.
    """
    device, dtype = chosen_machine(args)
    decoders = _decoders(args, device, dtype)
    found = list(measured(decoders, args.lengths, args.steps))
    prompts = prefills(decoders, args.lengths, args.prompts)
    steps = list(itertools.chain.from_iterable(found))
    weights = ", ".join(f"{decoder.weight_bytes / MIB:.1f} ({decoder.name})" for decoder in decoders)
    # Linux counts in KiB.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    notes = (
        f"One row, {dtype}, {device}, threads: {torch.get_num_threads()}. After a real prefill, {args.steps} calls of"
        " one token each, models in turn: median (least..most). By bytes read: the ratio if time went with the bytes"
        " of weights and cache, each read once. Page faults, teacher / HydraHead: the allocator handed out fresh"
        " memory for a cache that grew by a copy, and the kernel cleared it; MALLOC_MMAP_MAX_=0"
        " MALLOC_TRIM_THRESHOLD_=1000000000000 in the environment keep glibc from that.\n\nMiB of weights that a token"
        f" reads: {weights}. Resident memory of the process, prefills, all models and all caches together, at most:"
        f" {resident:.0f} MiB."
    )
    wrong = [f"{step.name} at {step.length}" for step in steps if not step.exact]
    return Report(
        title="Decoding one token",
        notes=notes,
        columns=COLUMNS,
        rows=list(itertools.chain.from_iterable(map(rows, found))),
        points=[Point(step.name, step.length, step.seconds, step.cache_bytes) for step in steps],
        memory="cache",
        more=(_prefill_report(prompts, args.prompts),),
        failure=f"the cache is not of the size that the formula says: {', '.join(wrong)}" if wrong else "",
    )


def _prefill_report(points: Sequence[Point], repeats: int) -> Report:
    teachers = {point.length: point.median for point in points if point.name == "teacher"}
    rows = [
        [
            point.length,
            point.name,
            point.spread,
            f"{point.length / point.median:.0f}",
            f"{teachers[point.length] / point.median:.2f}",
        ]
        for point in points
    ]
    notes = f"One call for the whole prompt, logits of its last token, models in turn, {repeats} times."
    return Report("Reading a prompt", notes, PREFILL_COLUMNS, rows, points)


def _decoders(args: argparse.Namespace, device: str, dtype: str) -> list[Decoder]:
    """Teacher and students, stored or random."""
    if bool(args.hf) != bool(args.teacher_hf):
        raise InputError("--hf and --teacher-hf go together: a model is measured beside its teacher")
    if args.hf:
        random_only = DECODED | {"fa_heads": DECODED_FA_HEADS}
        if given := [name for name, default in random_only.items() if getattr(args, name) != default]:
            raise InputError(
                f"--{given[0].replace('_', '-')} has no use with --hf, whose folders say what the models are; leave"
                " it out"
            )
        return stored_decoders(args.teacher_hf, args.hf, device, dtype)
    shape = ModelShape(
        num_layers=args.layers, hidden_size=args.hidden, num_heads=args.heads, num_kv_groups=args.kv_groups,
        head_dim=args.head_dim,
        ffn_hidden_size=args.ffn, vocab_size=args.vocabulary, native_length=max(args.lengths),
    )  # fmt: skip
    fa_heads: list[Sequence[int]] = []
    for count in args.fa_heads:
        fa_heads += [range(count), spread_heads(count, shape)]
    layers = [HeadsByKind.from_fa(fa, shape.num_heads) for fa in fa_heads]
    other_kinds = [kind for kind in KINDS if kind not in (FA, DEFAULT_LINEAR)]
    layers += [HeadsByKind.from_fa(fa_heads[0], shape.num_heads, kind) for kind in other_kinds]
    return random_decoders(shape, layers, device, dtype)


@dataclass(frozen=True)
class Decoded:
    """What one model showed while decoding at one context length."""

    name: str
    length: int
    seconds: tuple[float, ...]  # of each step
    faults: tuple[int, ...]  # minor page faults of each step: fresh memory that the kernel had to clear
    cache_bytes: int
    formula_bytes: int
    weight_bytes: int  # read for a token

    @property
    def exact(self) -> bool:
        return self.cache_bytes == self.formula_bytes

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def read_bytes(self) -> int:
        """What a step must read at least: the weights and the cache, once."""
        return self.weight_bytes + self.cache_bytes


class Decoder:
    """A model and its cache, which goes on from one context length to the next."""

    def __init__(self, name: str, model: PreTrainedModel, device: str) -> None:
        self.name, self.model, self.cache = name, model.eval().to(device), None

    def read(self, ids_bs: Tensor) -> tuple[float, int]:
        """Read tokens after those of the cache; returns the seconds taken and the minor page faults."""
        ids_bs = ids_bs.to(self.model.device)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds = timed(lambda: self._read(ids_bs), self.model.device.type)
        return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults

    @torch.inference_mode()
    def prefill(self, ids_bs: Tensor) -> None:
        """Read a whole prompt in one call, into a cache of its own that is let go."""
        self.model(ids_bs, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def _read(self, ids_bs: Tensor) -> None:
        self.cache = self.model(ids_bs, past_key_values=self.cache, use_cache=True, logits_to_keep=1).past_key_values

    def point(self, length: int, steps: Sequence[tuple[float, int]]) -> Decoded:
        formula = cache_bytes(self.model.config, length, self.model.dtype.itemsize)
        return Decoded(self.name, length, *zip(*steps, strict=True), self._held_bytes(), formula, self.weight_bytes)

    def _held_bytes(self) -> int:
        """The bytes of all storages behind the cache's tensors. A view counts with the whole storage that it keeps
        alive.
        """
        storages = [x.untyped_storage() for x in _tensors([vars(part) for part in (self.cache, *self.cache.layers)])]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def weight_bytes(self) -> int:
        """All weights but an embedding that is no output layer too: of that, a token reads one row."""
        skipped = 0 if self.model.config.tie_word_embeddings else self.model.get_input_embeddings().weight.nbytes
        return sum(parameter.nbytes for parameter in self.model.parameters()) - skipped


def _tensors(value: Any) -> list[Tensor]:
    """All tensors within lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return list(itertools.chain.from_iterable(map(_tensors, items)))


def cache_bytes(config: PretrainedConfig, tokens: int, itemsize: int) -> int:
    """Bytes of a cache, one row, from the configuration alone; a teacher is a model whose heads are all FA."""
    shape = _shape(config)
    total = 0.0
    for layer in _layouts(config):
        for kind in layer.layer:
            total += KINDS[kind].cached(shape, config, layer.count(kind, 0), tokens, 1, itemsize)
    return int(total)


def _shape(config: PretrainedConfig) -> ModelShape:
    sizes = {name: getattr(config, key) for name, key in SHAPE_KEYS.items()}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(**sizes, head_dim=head_dim)


def _layouts(config: PretrainedConfig) -> list[HeadLayout]:
    """The kinds of heads of each layer, and their kv groups."""
    every = [{FA: range(config.num_attention_heads)}] * config.num_hidden_layers
    return [HeadLayout(HeadsByKind(**heads), config.num_key_value_heads) for heads in getattr(config, "heads", every)]


def label(config: PretrainedConfig) -> str:
    """A map in words: the share of heads that are FA, and of kv groups that live; kinds beside FA and GDN."""
    layouts = _layouts(config)
    counts = [layout.count(FA, 0) for layout in layouts]
    kept = sum(count.own for count in counts) / (len(counts) * config.num_attention_heads)
    living = sum(count.groups for count in counts) / (len(counts) * config.num_key_value_heads)
    others = [kind for kind in KINDS if any(layout.layer[kind] for layout in layouts)]
    named = [KINDS[kind].label for kind in others if kind not in (FA, DEFAULT_LINEAR)]
    return ", ".join([f"{100 * kept:.3g}% FA in {100 * living:.3g}% of kv groups", *named])


def random_decoders(shape: ModelShape, layers: Sequence[HeadsByKind], device: str, dtype: str) -> list[Decoder]:
    """A teacher of random weights, and a HydraHead model for each choice of kinds (the same in all layers).

    Maps that have a label in common make one model.
    """
    torch.manual_seed(0)
    configs = [_student_config(shape, heads, dtype) for heads in layers]
    students = {label(config): model_class()._from_config(config, dtype=DTYPES[dtype]) for config in configs}
    sizes = {key: getattr(shape, name) for name, key in SHAPE_KEYS.items()}
    teacher = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=shape.head_dim, tie_word_embeddings=shape.tied_embeddings))
    models = {"teacher": teacher.to(DTYPES[dtype]), **students}
    return [Decoder(name, model, device) for name, model in models.items()]


def _student_config(shape: ModelShape, heads: HeadsByKind, dtype: str) -> PretrainedConfig:
    """The config.json that an export of such a student has."""
    head_map = HeadMap(shape.num_heads, shape.num_kv_groups, (heads,) * shape.num_layers)
    card = ModelCard(shape=shape, head_map=head_map, options=HydraOptions(), fingerprint="")
    try:
        return model_class().config_class(**to_config(card, str(DTYPES[dtype]).removeprefix("torch.")))
    except ValueError as error:
        raise InputError(str(error)) from None


def stored_decoders(teacher_dir: Path, hf_dirs: Sequence[Path], device: str, dtype: str) -> list[Decoder]:
    """The models of Hugging Face folders, exported ones on this package's copy of their code.

    Raises:
        InputError: a folder that holds no model.
    """
    students = {folder: _load(folder, dtype) for folder in hf_dirs}
    named = (Decoder(f"{folder}: {label(model.config)}", model, device) for folder, model in students.items())
    return [Decoder("teacher", _load(teacher_dir, dtype), device), *named]


def _load(folder: Path, dtype: str) -> PreTrainedModel:
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(
            f"{folder}: no {CONFIG_NAME}, so no model; give a folder that tools/convert.py export wrote, or a teacher's"
        )
    kind = model_class() if read_object(folder / CONFIG_NAME).get("model_type") == MODEL_TYPE else AutoModelForCausalLM
    try:
        return kind.from_pretrained(folder, dtype=DTYPES[dtype], trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: {first_line(error)}") from None


def prefills(decoders: Sequence[Decoder], lengths: Sequence[int], repeats: int) -> list[Point]:
    """Seconds of a whole prompt read in one call, models in turn, lengths ascending; the shortest prompt warms up."""
    points = []
    for length in Progress(sorted(lengths), desc="prefill", unit="length"):
        device = decoders[0].model.device
        ids_bs = _prompt(decoders, length).to(device)
        calls = {decoder.name: partial(decoder.prefill, ids_bs) for decoder in decoders}
        seconds = in_turn(calls, repeats, device.type, warm_up=not points)
        points += [Point(name, length, taken) for name, taken in seconds.items()]
    return points


def measured(decoders: Sequence[Decoder], lengths: Sequence[int], steps: int) -> Iterator[list[Decoded]]:
    """The points of every length, ascending; the last of the single tokens makes the context complete.

    Models take turns, token by token, so that a slow moment of the machine does not fall on one of them.

    Raises:
        InputError: lengths with no room for the steps between them.
    """
    ids_bs = _prompt(decoders, max(lengths))
    spans = list(itertools.pairwise(sorted({0, *lengths})))
    for done, length in spans:
        if length - done <= steps + WARM_UP:
            raise InputError(
                f"{length} tokens after {done} leave no room for {steps} steps and {WARM_UP} before them; take fewer"
                " steps"
            )
    for done, length in spans:
        first = length - steps - WARM_UP
        for decoder in decoders:
            for chunk_bs in ids_bs[:, done:first].split(CHUNK, dim=1):
                decoder.read(chunk_bs)
        print(f"decode: {length} tokens", file=sys.stderr)
        turns = [[decoder.read(ids_bs[:, at : at + 1]) for decoder in decoders] for at in range(first, length)]
        yield [
            decoder.point(length, own)
            for decoder, own in zip(decoders, zip(*turns[WARM_UP:], strict=True), strict=True)
        ]


def rows(points: Sequence[Decoded]) -> Iterator[list[Any]]:
    """Rows of the table for one length: each model beside the teacher, which comes first."""
    teacher, *students = points
    for student in students:
        yield [
            student.length, student.name, _milliseconds(teacher), _milliseconds(student),
            f"{teacher.median / student.median:.2f}",
            f"{teacher.read_bytes / student.read_bytes:.2f}",
            f"{teacher.cache_bytes / MIB:.2f}", f"{student.cache_bytes / MIB:.2f}",
            f"{teacher.cache_bytes / student.cache_bytes:.2f}", "yes" if teacher.exact and student.exact else "NO",
            " / ".join(f"{statistics.median(point.faults):.0f}" for point in (teacher, student)),
        ]  # fmt: skip


def _milliseconds(point: Decoded) -> str:
    return f"{1e3 * point.median:.1f} ({1e3 * min(point.seconds):.1f}..{1e3 * max(point.seconds):.1f})"


def _prompt(decoders: Sequence[Decoder], length: int) -> Tensor:
    """Tokens [1, s] at random that all the models know."""
    vocabulary = min(decoder.model.config.vocab_size for decoder in decoders)
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(1))
