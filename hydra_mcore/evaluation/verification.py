# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Is a checkpoint what it claims to be? Checks that compare it with its source, its export, and itself on other
layouts.

Everything runs in float32, whatever the stored dtype: in bfloat16 a slip would hide behind rounding.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hydra_mcore.config import ModelCard, teacher_card
from hydra_mcore.convert.hf_code import check_model_code
from hydra_mcore.convert.hf_config import read_config
from hydra_mcore.convert.hf_export import export_hf
from hydra_mcore.convert.hf_import import check_tensors, combined_fingerprint, fingerprint_of
from hydra_mcore.convert.hf_weights import HfWeights
from hydra_mcore.convert.inherit import inherit
from hydra_mcore.convert.output_folder import HEAD_MAP_NAME
from hydra_mcore.convert.tensor_table import is_teacher, tensor_rules
from hydra_mcore.costs.batch_sizes import rows_a_forward
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.comparison import Agreement, Fact, Result, agreement
from hydra_mcore.evaluation.layout_logits import Layout, Rows, logits_of, run_layouts
from hydra_mcore.heads import HeadMap, first_difference
from hydra_mcore.model.build import build_model, load_model
from hydra_mcore.model.checkpoints import latest_iteration
from hydra_mcore.model.streaming import StoredTensors

MIN_LENGTH = 24  # so that five documents, two chunks and eight padded rows all differ in length
PADDED_ROWS, PADDED_LENGTH = 8, 128
FIRST_STEPS, LAST_STEPS = 8, 32  # tokens that are decoded one by one
LAYOUTS = (Layout(tp=2), Layout(pp=2), Layout(cp=2), Layout(tp=4), Layout(tp=2, pp=2))


class Skipped(Exception):
    """A check that cannot run, and what would let it."""


class Subject:
    """A checkpoint under verification and what it is compared with; logits are kept, models are not held together.

    Args:
        tokens_bs: token ids, [b, s] with s of at least ``MIN_LENGTH``.
        work: an empty folder for what is written on the way.
        hf: the Hugging Face directory that the teacher was imported from.
        teacher: the teacher's checkpoint, where the subject is a student.
        export: a Hugging Face export of the checkpoint; made in ``work`` unless given.

    Raises:
        InputError: no checkpoint, ``teacher`` is not one, ``hf`` or ``export`` no model directory, or tokens that do
            not fit.
    """

    def __init__(
        self,
        checkpoint: Path,
        tokens_bs: Tensor,
        work: Path,
        hf: Path | None = None,
        teacher: Path | None = None,
        export: Path | None = None,
    ) -> None:
        self.checkpoint, self.card, self.work = checkpoint, ModelCard.load(checkpoint), work
        if teacher is not None and is_teacher(self.card):
            raise InputError(f"{checkpoint}: is a teacher itself, so it has no other; leave --teacher out")
        self.teacher_dir = checkpoint if is_teacher(self.card) else teacher
        self.teacher_card = None if self.teacher_dir is None else ModelCard.load(self.teacher_dir)
        if self.teacher_card is not None and not is_teacher(self.teacher_card):
            raise InputError(
                f"{teacher}: a {self.teacher_card.stage} checkpoint, not a teacher's; give the folder that import wrote"
            )
        for folder in filter(None, (checkpoint, teacher)):
            latest_iteration(folder)
        for folder in filter(None, (hf, export)):
            read_config(folder)
        if tokens_bs.shape[1] < MIN_LENGTH:
            raise InputError(f"sequences of {tokens_bs.shape[1]} tokens tell little; take at least {MIN_LENGTH}")
        if (largest := int(tokens_bs.max())) >= self.card.shape.vocab_size:
            raise InputError(
                f"token {largest} is outside the vocabulary of {self.card.shape.vocab_size}; another model's tokenizer?"
            )
        self.rows, self.hf, self.given_export = Rows.of(tokens_bs), hf, export

    @cached_property
    def logits(self) -> dict[str, Tensor]:
        """The checkpoint's own, on one process: "dense" and "packed" (``logits_of``)."""
        return logits_of(load_model(self.checkpoint)[1], self.rows)

    @cached_property
    def teacher_logits_bsw(self) -> Tensor:
        """The teacher's, dense."""
        if self.teacher_dir == self.checkpoint:
            return self.logits["dense"]
        return logits_of(load_model(self.need_teacher())[1], self.rows)["dense"]

    def need_teacher(self) -> Path:
        if self.teacher_dir is None:
            raise Skipped("give --teacher DIR, the checkpoint of the student's teacher")
        return self.teacher_dir

    @cached_property
    def export_dir(self) -> Path:
        if self.given_export is None:
            export_hf(self.checkpoint, self.work / "export")
        return self.given_export or self.work / "export"

    @cached_property
    def exported(self) -> PreTrainedModel:
        """The export as a user loads it, with the code in its folder."""
        return load_hf(self.export_dir, self.card, run_its_code=not is_teacher(self.card))

    @cached_property
    def exported_bsw(self) -> Tensor:
        """The export's logits of each whole sequence at once, without a cache."""
        return hf_logits(self.exported, self.rows.tokens_bs)

    @cached_property
    def short_rows(self) -> list[tuple[Tensor, Tensor]]:
        """Rows of different lengths and the export's logits of each alone: ([s], [s, w])."""
        longest, ids = min(self.rows.tokens_bs.shape[1], PADDED_LENGTH), self.rows.tokens_bs.flatten()
        lengths = [1 + (longest - 1) * row // (PADDED_ROWS - 1) for row in range(PADDED_ROWS)]
        cut = [ids.roll(-sum(lengths[:row]))[:length] for row, length in enumerate(lengths)]
        return [(row_s, hf_logits(self.exported, row_s[None])[0]) for row_s in cut]

    @cached_property
    def on_ranks(self) -> dict[Layout, Path | str]:
        """Of every layout that fits model and machine: the file of its logits, or why there is none."""
        found: dict[Layout, Path | str] = {}
        for ranks in sorted({layout.ranks for layout in LAYOUTS}):
            fitting = [layout for layout in LAYOUTS if layout.ranks == ranks and not self.unfit(layout)]
            if fitting:
                found |= run_layouts(self.checkpoint, self.rows, fitting, self.work / f"ranks{ranks}")
        return found

    def unfit(self, layout: Layout) -> str:
        """Why a layout is left out; empty if it is not."""
        what, have = (
            ("GPUs", torch.cuda.device_count())
            if torch.cuda.is_available()
            else ("processor cores", os.cpu_count() or 1)
        )
        if have < layout.ranks:
            return f"needs {layout.ranks} {what}, this machine has {have}"
        try:
            layout.check(self.card, self.rows.tokens_bs.shape[1])
        except InputError as error:
            return str(error)
        return ""


def load_hf(folder: Path, card: ModelCard, run_its_code: bool = False) -> PreTrainedModel:
    """A Hugging Face directory's model in float32, on the GPU if there is one.

    Raises:
        InputError: it is not of the card's shape, its tensors are not those that its config.json asks for, or the code
            to run is not ours.
    """
    described = read_config(folder)
    if difference := card.difference(dataclasses.asdict(described.shape), ""):
        raise InputError(f"{folder} is another model: {difference}")
    check_tensors(HfWeights(folder, described.shape.tied_embeddings), tensor_rules(described), described)
    if run_its_code:
        check_model_code(folder, described.source["config"].get("auto_map"))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=run_its_code, local_files_only=True
    )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def hf_logits(model: PreTrainedModel, ids_bs: Tensor) -> Tensor:
    """[b, s, w] float32 on the CPU, from whole sequences without a cache."""
    batches = ids_bs.to(model.device).split(rows_a_forward(ids_bs.shape[1]))
    return torch.cat([model(batch_bs, use_cache=False).logits.float().cpu() for batch_bs in batches])


def rounding(hf_dir: Path, checkpoint: Path, card: ModelCard) -> str:
    """A difference of dtypes between a directory and a checkpoint, which may be why they differ; empty if there is
    none.
    """
    weights, stored = HfWeights(hf_dir, card.shape.tied_embeddings), StoredTensors(checkpoint)
    names = set(weights.names())
    for rule in tensor_rules(card).values():
        if rule.hf in names and weights.dtype(rule.hf) != (ours := dtype_name(stored.dtype(rule.stored))):
            return f"{rule.hf} is {weights.dtype(rule.hf)} in {hf_dir}, {ours} in the checkpoint"
    return ""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def source(subject: Subject) -> Agreement:
    if subject.hf is None:
        raise Skipped("give --hf DIR, the directory that the teacher was imported from")
    ours_bsw = subject.teacher_logits_bsw
    truth = hf_logits(load_hf(subject.hf, subject.teacher_card), subject.rows.tokens_bs)
    found = agreement([(truth, ours_bsw)])
    return dataclasses.replace(found, note=rounding(subject.hf, subject.need_teacher(), subject.teacher_card))


def all_fa(subject: Subject) -> Agreement:
    teacher_bsw = subject.teacher_logits_bsw
    _, teacher = load_model(subject.need_teacher())
    student = build_model(teacher_card(subject.card.shape, "")).eval()
    inherit(teacher, student, subject.card.shape)
    del teacher  # before the forward pass needs memory
    return agreement([(teacher_bsw, logits_of(student, subject.rows)["dense"])])


def layout_logits(subject: Subject, layout: Layout) -> Agreement:
    if reason := subject.unfit(layout):
        raise Skipped(reason)
    expected, found = subject.logits, subject.on_ranks[layout]
    if isinstance(found, str):
        raise InputError(f"the ranks failed: {found}")
    logits = load_file(found)
    return agreement((expected[rows], logits[rows]) for rows in expected)


def export_dense(subject: Subject) -> Agreement:
    expected_bsw = subject.logits["dense"]
    found = agreement([(expected_bsw, subject.exported_bsw)])
    return dataclasses.replace(found, note=rounding(subject.export_dir, subject.checkpoint, subject.card))


def export_packed(subject: Subject) -> Agreement:
    packed_sw, row_1s, bounds = subject.logits["packed"][0], subject.rows.tokens_bs[:1], subject.rows.documents
    parts = [slice(start, end) for start, end in itertools.pairwise(bounds)]
    return agreement((hf_logits(subject.exported, row_1s[:, part])[0], packed_sw[part]) for part in parts)


@torch.no_grad()
def padding(subject: Subject, side: str) -> Agreement:
    rows, model = subject.short_rows, subject.exported
    longest = max(len(ids_s) for ids_s, _ in rows)
    ids_bs, mask_bs = torch.zeros(2, len(rows), longest, dtype=torch.long)
    places = [slice(longest - len(ids_s), None) if side == "left" else slice(len(ids_s)) for ids_s, _ in rows]
    for row, (place, (ids_s, _)) in enumerate(zip(places, rows, strict=True)):
        ids_bs[row, place], mask_bs[row, place] = ids_s, 1
    together_bsw = (
        model(ids_bs.to(model.device), attention_mask=mask_bs.to(model.device), use_cache=False).logits.float().cpu()
    )
    return agreement(
        (alone_sw, found_sw[place]) for (_, alone_sw), found_sw, place in zip(rows, together_bsw, places, strict=True)
    )


@torch.no_grad()
def decode(subject: Subject, in_steps: bool) -> Agreement:
    """In steps: tokens one by one from an empty cache, then most of the rest at once, then one by one again."""
    expected_bsw, model, length = subject.exported_bsw, subject.exported, subject.rows.tokens_bs.shape[1]
    first, last = min(FIRST_STEPS, length // 4), min(LAST_STEPS, length // 4)
    sizes = [1] * first + [length - first - last] + [1] * last if in_steps else [length // 3, length - length // 3]
    cache, parts = None, []
    for ids_bs in subject.rows.tokens_bs.to(model.device).split(sizes, dim=1):
        out = model(ids_bs, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits.float().cpu())
    return agreement([(expected_bsw, torch.cat(parts, dim=1))])


def finite(subject: Subject) -> Fact:
    stored = StoredTensors(subject.checkpoint)
    names = dict.fromkeys(rule.stored for rule in tensor_rules(subject.card).values())
    for name in names:
        if not stored.read(name).isfinite().all():
            return Fact(False, f"tensor {name} holds NaN or infinity")
    return Fact(True, f"{len(names)} tensors")


def fingerprint(subject: Subject) -> Fact:
    """Of the teacher's weights: a student's own have none."""
    folder, card, digests = subject.need_teacher(), subject.teacher_card, {}
    stored, source = StoredTensors(folder), card.source
    if "dtype" not in source:
        raise Skipped(
            "the card does not know the dtypes of the source, so whether values were rounded; import the teacher again"
        )
    for rule in tensor_rules(card).values():
        ours, theirs = stored.dtype(rule.stored), getattr(torch, source["other_dtypes"].get(rule.hf, source["dtype"]))
        if torch.promote_types(ours, theirs) != ours:
            rounded = f"{dtype_name(theirs)} values were rounded to {dtype_name(ours)}"
            raise Skipped(f"the source's {rounded}; import without --dtype to keep them")
        digests[rule.hf] = fingerprint_of(rule.hf, rule.mapping.to_hf(stored.read(rule.stored), rule.shape))
    return same_fingerprint(combined_fingerprint(digests), card.fingerprint)


def same_fingerprint(found: str, expected: str) -> Fact:
    return Fact(found == expected, found[:12] if found == expected else f"{found[:12]}, the card says {expected[:12]}")


def head_map(subject: Subject) -> Fact:
    file = subject.checkpoint / HEAD_MAP_NAME
    if not file.is_file():
        raise Skipped(f"no {HEAD_MAP_NAME} in the checkpoint's folder; the card's is the one that counts")
    return same_heads(HeadMap.load(file), subject.card)


def same_heads(found: HeadMap, card: ModelCard) -> Fact:
    """Whether a head map keeps the heads that a card keeps, and was made for its teacher or for any."""
    if found.counts != card.head_map.counts:
        return Fact(False, f"{found.counts}, the card says {card.head_map.counts}")
    for layer_idx, (theirs, ours) in enumerate(zip(found.layers, card.head_map.layers, strict=True)):
        if theirs != ours:
            kind, there, here = first_difference(theirs, ours)
            return Fact(False, f"layer {layer_idx} has {kind} heads {there}, the card says {here}")
    if found.fingerprint not in ("", card.fingerprint):
        return same_fingerprint(found.fingerprint, card.fingerprint)
    return Fact(True, f"{found.num_fa} FA heads of {found.num_layers * found.num_heads}")


def descent(subject: Subject) -> Fact:
    subject.need_teacher()
    if difference := subject.teacher_card.difference(dataclasses.asdict(subject.card.shape), subject.card.fingerprint):
        return Fact(False, difference)
    return Fact(True, subject.card.fingerprint[:12])


def export_config(subject: Subject) -> Fact:
    described, card = read_config(subject.export_dir), subject.card
    if difference := card.difference(dataclasses.asdict(described.shape), ""):
        return Fact(False, difference)
    if is_teacher(card):
        return Fact(is_teacher(described), described.source["config"]["model_type"])
    if described.options != card.options:
        name = next(
            name
            for name, value in dataclasses.asdict(card.options).items()
            if getattr(described.options, name) != value
        )
        return Fact(
            False, f"{name} is {getattr(described.options, name)!r}, the card says {getattr(card.options, name)!r}"
        )
    heads = same_heads(described.head_map, card)
    return same_fingerprint(described.fingerprint, card.fingerprint) if heads.passed else heads


@dataclasses.dataclass(frozen=True)
class Check:
    """A line of the verification."""

    name: str
    part: str
    compared: str
    measure: Callable[[Subject], Agreement | Fact]
    of_students: bool = False
    """Whether the line has no meaning for a teacher."""


CHECKS = (
    Check("source", "", "transformers on the source = teacher", source),
    Check("all-fa", "", "teacher = its student of FA heads alone", all_fa),
    *(
        Check("layouts", str(layout), "one process = several", partial(layout_logits, layout=layout))
        for layout in LAYOUTS
    ),
    Check("export", "", "checkpoint = export", export_dense),
    Check("packed", "", "export on each document = packed row", export_packed),
    *(
        Check("padding", side, "export on each row = padded batch", partial(padding, side=side))
        for side in ("left", "right")
    ),
    Check("decode", "in steps", "export at once = token by token", partial(decode, in_steps=True)),
    Check("decode", "in chunks", "export at once = in two parts", partial(decode, in_steps=False)),
    Check("identity", "finite", "no tensor holds NaN or infinity", finite),
    Check("identity", "weights", "teacher's weights = its fingerprint", fingerprint),
    Check("identity", "head map", f"{HEAD_MAP_NAME} = card", head_map, of_students=True),
    Check("identity", "teacher", "student's card = teacher's", descent, of_students=True),
    Check("identity", "export", "export's config.json = card", export_config),
)
NAMES = tuple(dict.fromkeys(check.name for check in CHECKS))


def checks_of(card: ModelCard, only: Collection[str] = NAMES) -> list[Check]:
    """The lines of some checks that have a meaning for a model."""
    return [check for check in CHECKS if check.name in only and not (check.of_students and is_teacher(card))]


def verify(subject: Subject, checks: Iterable[Check]) -> Iterator[Result]:
    """Run checks in their order; what goes wrong inside one is its own failure."""
    for check in checks:
        try:
            found = check.measure(subject)
        except Skipped as reason:
            yield Result(check.name, check.part, check.compared, "skipped", str(reason))
        except Exception as error:  # an export's own code, the ranks, a file: whatever it is, the check has failed
            first = (str(error).strip().splitlines() or ["no message"])[0]
            said = first if isinstance(error, InputError) else f"{type(error).__name__}: {first}"
            yield Result(check.name, check.part, check.compared, "FAIL", said)
        else:
            numbers = found if isinstance(found, Agreement) else None
            yield Result(
                check.name, check.part, check.compared, "pass" if found.passed else "FAIL", str(found), numbers
            )
