# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Import, hybridize and export, from the flags of ``tools/convert.py``."""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
from transformers.utils.logging import set_verbosity_error

import hydra_mcore
from hydra_mcore.config import HydraOptions, ModelCard
from hydra_mcore.convert.fitted_start import MemoryTables
from hydra_mcore.convert.inherit import SCALED_FUSIONS
from hydra_mcore.errors import InputError
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.imitation import Memory
from hydra_mcore.selection.score import HeadScores


def run(args: argparse.Namespace) -> None:
    """The command that was given; raises InputError for what cannot be used."""
    set_verbosity_error()  # a command has its own output, and its refusals are one line
    commands = {"import": import_from, "hybridize": hybridize_from, "export": export_from}
    commands[args.command](args)


def hybridize_from(args: argparse.Namespace) -> None:
    """The hybridize command; raises InputError for anything given that cannot be used."""
    options = HydraOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(HydraOptions)})
    head_map = HeadMap.load(args.head_map)
    fitted = args.start == "fitted"
    calibrated = fitted or (args.fusion_scale == "calibrated" and options.fusion in SCALED_FUSIONS)
    if fitted and args.text is None:
        raise InputError("--start fitted needs --text FILE")
    if fitted and args.fusion_scale == "one":
        raise InputError("--fusion-scale one has no use with --start fitted, which fits the scales; leave it out")
    if calibrated and args.text is None:
        raise InputError("the fusion scales need --text FILE; or start them at 1 with --fusion-scale one")
    # A recipe gives both for all students made of it; some have no use for them.
    if args.text is not None and not calibrated:
        print("note: --text is not read, since no fusion scale is calibrated")
    if args.scores is not None and not fitted:
        print("note: --scores is not read, since the start is not fitted")
    memories = known_memories(args.scores, args.teacher, head_map) if args.scores is not None and fitted else None
    card = hydra_mcore.hybridize(
        args.teacher,
        head_map,
        args.out,
        options,
        text=args.text if calibrated else None,
        start=args.start,
        memories=memories,
        dtype=args.dtype,
        seed=args.seed,
    )
    num_heads = head_map.num_layers * head_map.num_heads
    print(f"student with {head_map.num_fa} FA heads of {num_heads}, teacher {card.fingerprint[:12]}: {args.out}")


def known_memories(scores_file: str, teacher_dir: str, head_map: HeadMap) -> MemoryTables:
    """The memories that head selection found for the map's linear heads.

    Raises:
        InputError: scores of another teacher, or with imitations of none of the map's kinds.
    """
    scores = HeadScores.load(scores_file)
    scores.check_teacher(ModelCard.load(teacher_dir))
    known = {}
    for kind, of in scores.replaceability.items():
        if head_map.heads_of(kind):
            by_head = np.stack([of.half_life, of.write, of.fastest], axis=-1).tolist()
            known[kind] = [[Memory(*of_head) for of_head in of_layer] for of_layer in by_head]
    if not known:
        raise InputError(f"scores {scores_file}: no imitations of this map's linear heads there; leave --scores out")
    return known


def import_from(args: argparse.Namespace) -> None:
    """The import command; raises InputError for a directory that cannot be used."""
    card = hydra_mcore.import_model(args.hf, args.out, args.dtype)
    print(
        f"{card.stage} {card.fingerprint[:12]}, {card.shape.num_layers} layers x {card.shape.num_heads} heads:"
        f" {args.out}"
    )


def export_from(args: argparse.Namespace) -> None:
    """The export command; raises InputError for a checkpoint that cannot be exported."""
    if not args.max_shard_size > 0:
        raise InputError(f"--max-shard-size is {args.max_shard_size}; it counts GB, so it must exceed 0")
    card = hydra_mcore.export_model(
        args.checkpoint,
        args.out,
        args.dtype,
        max_shard_gb=args.max_shard_size,
        evaluation=args.evaluation,
        base_model=args.base_model,
        license=args.license,
    )
    print(
        f"{card.stage} with {card.head_map.num_fa} FA heads of {card.shape.num_layers * card.shape.num_heads}:"
        f" {args.out}"
    )
