# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Is a checkpoint what it claims to be? Checks that compare it with its source, its export, and itself on other
layouts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from hydra_mcore.config import ModelCard, teacher_card
from hydra_mcore.convert.hf_config import read_config
from hydra_mcore.convert.hf_import import combined_fingerprint, fingerprint_of
from hydra_mcore.convert.hf_weights import HfWeights
from hydra_mcore.convert.inherit import inherit
from hydra_mcore.convert.output_folder import HEAD_MAP_NAME
from hydra_mcore.convert.tensor_table import is_teacher, tensor_rules
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.comparison import Agreement, Fact, Result, agreement
from hydra_mcore.evaluation.layout_logits import Layout, logits_of
from hydra_mcore.evaluation.server import ServedModel
from hydra_mcore.evaluation.subject import LAYOUTS, Skipped, Subject, hf_logits, load_hf
from hydra_mcore.heads import HeadMap, first_difference
from hydra_mcore.model.build import build_model, load_model
from hydra_mcore.model.streaming import StoredTensors

FIRST_STEPS, LAST_STEPS = 8, 32  # tokens that are decoded one by one
SERVED_BAR = 1e-3  # nats: rounding of float32 in other kernels, behind the logits of a real model's depth


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


@torch.no_grad()
def served(subject: Subject) -> Fact:
    """Log-probabilities of the rows' tokens, and tokens written behind their beginnings."""
    if subject.served is None:
        raise Skipped("give --served URL, the address of a server of the export")
    model, server, ids_bs = subject.exported, ServedModel(subject.served), subject.rows.tokens_bs
    log_probs_bsw = subject.exported_bsw[:, :-1].log_softmax(-1)
    expected_bs = -log_probs_bsw.gather(-1, ids_bs[:, 1:, None])[..., 0]
    worst = float((server.token_losses(ids_bs)[0] - expected_bs).abs().max())
    starts_bs = ids_bs[:, : ids_bs.shape[1] // 2]
    options = {"max_new_tokens": LAST_STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask_bs = torch.ones_like(starts_bs).to(model.device)
    whole_bs = model.generate(starts_bs.to(model.device), attention_mask=mask_bs, **options)
    written_bs = whole_bs[:, starts_bs.shape[1] :].cpu()
    equal = int((server.generated(starts_bs, LAST_STEPS, frozenset()) == written_bs).sum())
    said = f"{equal} of {written_bs.numel()} greedy tokens, log-probabilities within {worst:.1e} nats"
    passed = equal == written_bs.numel() and worst < SERVED_BAR
    return Fact(passed, said if passed else f"{said} (bar {SERVED_BAR:g}; serve it with --dtype float32)")


def finite(subject: Subject) -> Fact:
    stored = StoredTensors(subject.checkpoint)
    names = dict.fromkeys(rule.stored for rule in tensor_rules(subject.card).values())
    for name in names:
        if not stored.read(name).isfinite().all():
            return Fact(False, f"tensor {name} holds NaN or infinity")
    return Fact(True, f"{len(names)} tensors")


def fingerprint(subject: Subject) -> Fact:
    """Compare the fingerprint of the teacher's weights with its card. A student's own weights have no fingerprint."""
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
class Proof:
    """A line of the verification."""

    name: str
    part: str
    compared: str
    measure: Callable[[Subject], Agreement | Fact]
    of_students: bool = False
    """Whether the line has no meaning for a teacher."""


PROOFS = (
    Proof("source", "", "transformers on the source = teacher", source),
    Proof("all-fa", "", "teacher = its student of FA heads alone", all_fa),
    *(
        Proof("layouts", str(layout), "one process = several", partial(layout_logits, layout=layout))
        for layout in LAYOUTS
    ),
    Proof("export", "", "checkpoint = export", export_dense),
    Proof("packed", "", "export on each document = packed row", export_packed),
    *(
        Proof("padding", side, "export on each row = padded batch", partial(padding, side=side))
        for side in ("left", "right")
    ),
    Proof("decode", "in steps", "export at once = token by token", partial(decode, in_steps=True)),
    Proof("decode", "in chunks", "export at once = in two parts", partial(decode, in_steps=False)),
    Proof("served", "", "export's generate = the server", served),
    Proof("identity", "finite", "no tensor holds NaN or infinity", finite),
    Proof("identity", "weights", "teacher's weights = its fingerprint", fingerprint),
    Proof("identity", "head map", f"{HEAD_MAP_NAME} = card", head_map, of_students=True),
    Proof("identity", "teacher", "student's card = teacher's", descent, of_students=True),
    Proof("identity", "export", "export's config.json = card", export_config),
)
NAMES = tuple(dict.fromkeys(proof.name for proof in PROOFS))


def proofs_of(card: ModelCard, only: Collection[str] = NAMES) -> list[Proof]:
    """The lines of some proofs that have a meaning for a model."""
    return [proof for proof in PROOFS if proof.name in only and not (proof.of_students and is_teacher(card))]


def verify(subject: Subject, proofs: Iterable[Proof]) -> Iterator[Result]:
    """Run proofs in their order; what goes wrong inside one is its own failure."""
    for proof in proofs:
        try:
            found = proof.measure(subject)
        except Skipped as reason:
            yield Result(proof.name, proof.part, proof.compared, "skipped", str(reason))
        except Exception as error:  # an export's own code, the ranks, a file: whatever it is, the proof has failed
            first = (str(error).strip().splitlines() or ["no message"])[0]
            said = first if isinstance(error, InputError) else f"{type(error).__name__}: {first}"
            yield Result(proof.name, proof.part, proof.compared, "FAIL", said)
        else:
            numbers = found if isinstance(found, Agreement) else None
            yield Result(
                proof.name, proof.part, proof.compared, "pass" if found.passed else "FAIL", str(found), numbers
            )
