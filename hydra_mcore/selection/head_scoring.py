# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of a teacher's heads from start to end: prompts, scores, knock-out curves, and an estimate beforehand."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hydra_mcore.config import ModelCard
from hydra_mcore.errors import InputError
from hydra_mcore.files import write_json
from hydra_mcore.model.build import load_model
from hydra_mcore.model.precision import DTYPES, chosen_dtype
from hydra_mcore.ruler.haystack import Haystack, read_text
from hydra_mcore.ruler.material import PromptMaterial
from hydra_mcore.ruler.prompts import EVALUATION_SEEDS
from hydra_mcore.ruler.sets import VERSION
from hydra_mcore.ruler.wording import own_wording, read_wording
from hydra_mcore.selection.capabilities import BUILT_IN, RETRIEVAL
from hydra_mcore.selection.evidence import ESTIMATES, KnockOut
from hydra_mcore.selection.knock_out import knock_out, runs_a_prompt
from hydra_mcore.selection.probes import ProbeBatch, build_probes
from hydra_mcore.selection.receivers import forward_flops, receiver_flops
from hydra_mcore.selection.replaceability import ROW_LENGTH, replaceability, replaceability_flops, rows_to_imitate
from hydra_mcore.selection.score import CRITICAL, MIN_GAP, MIN_SHARE, HeadScores
from hydra_mcore.selection.scoring import Scoring
from hydra_mcore.selection.senders import sender_flops
from hydra_mcore.selection.teacher import DECAY, Teacher
from hydra_mcore.tokenizer import load_tokenizer

KNOCK_OUT_FILE = "knock_out.json"
Probes = dict[str, list[ProbeBatch]]


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """The flags of tools/select_heads.py by which heads are scored; its --help says what they mean."""

    teacher: Path
    out: Path
    length: int | None = None
    also_lengths: Sequence[int] = ()
    pairs: int = 8
    seed: int = 0
    method: str = "exact"
    roles: str | None = None
    score: str = "causal"
    capabilities: Sequence[str] = tuple(BUILT_IN)
    probe: Sequence[str] = ()
    replaceable_by: Sequence[str] = ()
    template: Path | None = None
    text: str | None = None
    knock_out: int = 4
    dtype: str = "float32"


def score_teacher(
    args: ScoringSettings, card: ModelCard, weights: dict[str, float], imitators: list[str], become: Sequence[str]
) -> dict[str, Any]:
    """Scores at the main length and at the others, and knock-out curves; says on the console what each probe gave.

    Args:
        imitators: kinds of linear heads that are to imitate each head.
        become: for each layer the kind of its linear heads.
    """
    lengths, material = [main_length(args, card), *args.also_lengths], needle_material(args)
    prompts = {
        length: probes(args, material, length) for length in lengths
    }  # bad input shows before the model is loaded
    silencing = knock_out_prompts(args, material, lengths[0])
    imitated = rows_to_imitate(material, lengths[0], args.seed) if imitators else None
    _, model = load_model(args.teacher, DTYPES[chosen_dtype(args.dtype)])
    teacher, found, curves = Teacher(model), {}, None
    for length in lengths:
        settings = identity(args, card, prompts[length], length)
        run = settings | {"model": dataclasses.asdict(card.shape)}
        scoring = Scoring(teacher, prompts[length], args.out / "unfinished" / str(length), run)
        found[length] = measure(args, card, scoring, settings, weights)
        if length == lengths[0]:
            by_kind = {} if imitated is None else replaceability(scoring, imitated, imitators)
        found[length] = dataclasses.replace(
            found[length], replaceability=by_kind, score=args.score, become=become
        )  # the same rows whatever the prompts' length
        if length == lengths[0] and silencing:
            curves = knock_out(scoring, silencing, found[length].ranking(), args.seed)
    return {"scores": found.pop(lengths[0]), "knock_out": curves, "by_length": found}


def measure(
    args: ScoringSettings, card: ModelCard, scoring: Scoring, settings: dict[str, Any], weights: dict[str, float]
) -> HeadScores:
    """Score the heads once, together with every ranking that is compared with the scores."""
    start = time.monotonic()
    estimates = scoring.attributed()
    effects = scoring.exact(args.roles or "both") if args.method == "exact" else estimates
    observed = scoring.observed()
    seconds = round(time.monotonic() - start, 1)
    scores = HeadScores(
        shape=card.shape,
        fingerprint=card.fingerprint,
        probes=effects,
        weights=weights,
        roles=args.roles or "both",
        observed=observed,
        settings=settings | {"seconds": seconds},
        versions={name: version(name) for name in ("torch", "megatron-core", "transformers", "tokenizers", "numpy")},
    )
    if args.method == "exact":
        scores = dataclasses.replace(scores, observed=observed | attributed_tables(scores, estimates))
    if torch.distributed.get_rank() == 0:
        say(scores)
    return scores


def attributed_tables(scores: HeadScores, estimates: dict[str, Any]) -> dict[str, Any]:
    """What the gradients alone would have said: the size of each role's effect [l, h], as the exact one is averaged."""
    usable = [estimates[name].mean_rlh() for name, probe in scores.probes.items() if probe.usable]
    receiver_lh, sender_lh = sum(abs(mean) for mean in usable) / len(usable)
    return dict(zip(ESTIMATES, (receiver_lh, sender_lh), strict=True))


def main_length(args: ScoringSettings, card: ModelCard) -> int:
    """By default the teacher's native length, at most the paper's 4096."""
    length = min(card.shape.native_length, 4096) if args.length is None else args.length
    for other in args.also_lengths:
        if other == length or args.also_lengths.count(other) > 1:
            raise InputError(f"--also-lengths {other}: is scored already; give each length once")
    return length


def needle_material(args: ScoringSettings) -> PromptMaterial:
    """What needle prompts are made of; without a haystack for noise."""
    tokenizer = load_tokenizer(args.teacher)
    wording = read_wording(args.template) if args.template else own_wording(args.teacher)
    haystack = None if args.text == "noise" else Haystack.of(tokenizer, read_text(tokenizer, args.text))
    return PromptMaterial(tokenizer, wording, haystack)


def probes(args: ScoringSettings, material: PromptMaterial, length: int) -> Probes:
    """The pairs of every sub-probe."""
    files = parse_probes(args.probe)
    return build_probes(material, length, args.pairs, args.seed, tuple(args.capabilities), files)


def knock_out_prompts(args: ScoringSettings, material: PromptMaterial, length: int) -> list[ProbeBatch]:
    """Needle prompts of another seed than the scores'."""
    if args.knock_out < 0:
        raise InputError(f"--knock-out {args.knock_out}: give a number of prompts, 0 for none")
    if args.knock_out == 0:
        return []
    seed = (args.seed + EVALUATION_SEEDS // 4) % EVALUATION_SEEDS  # half of the range is training's
    built = build_probes(material, length, args.knock_out, seed, (RETRIEVAL,))
    return list(itertools.chain.from_iterable(built.values()))


def parse_probes(texts: list[str]) -> dict[str, Path]:
    """Capability -> file, of ``NAME=FILE``."""
    files: dict[str, Path] = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not name or not path:
            raise InputError(f"--probe {text}: write the name of the capability and its file, as in law=my_pairs.jsonl")
        if name in files:
            raise InputError(f"--probe {text}: capability {name} has a file already; join them")
        files[name] = Path(path)
    return files


def identity(args: ScoringSettings, card: ModelCard, prompts: Probes, length: int) -> dict[str, Any]:
    """What a scoring run is: pieces of runs that differ in any of this do not belong together."""
    digest = hashlib.sha256()
    for batches in prompts.values():
        for batch in batches:
            for ids in (batch.clean_bs, batch.corrupt_bs, batch.distractor_bp):  # the answer stands in the clean prompt
                digest.update(ids.numpy().tobytes())
    return {
        "teacher": card.fingerprint, "method": args.method, "roles": args.roles or "both",
        "dtype": chosen_dtype(args.dtype), "length": length, "pairs": args.pairs, "seed": args.seed,
        "generator": VERSION, "probes": list(prompts), "prompts_sha256": digest.hexdigest(),
        "decay": DECAY, "critical": CRITICAL, "min_gap": MIN_GAP, "min_share": MIN_SHARE,
    }  # fmt: skip


def say(scores: HeadScores) -> None:
    """One line a sub-probe, and what the whole took."""
    for name, probe in scores.probes.items():
        reasons = ((probe.unsolved, "teacher wrong"), (probe.unmoved, "corruption without effect"))
        out = "".join(f", {count} left out ({why})" for count, why in reasons if count)
        line = (
            f"{scores.settings['length']} tokens, {name} ({probe.capability}): {probe.used} of {len(probe.solved_b)}"
            f" pairs{out}"
        )
        if not probe.usable:
            print(f"{line}; too few, so this probe does not count")
            continue
        receivers, *senders = (int((abs(mean_lh) >= CRITICAL).sum()) for mean_lh in probe.mean_rlh())
        rounds = f", senders by round: {' '.join(map(str, senders))}" if senders else ""
        print(f"{line}; heads with |effect| >= {CRITICAL}: {receivers} receivers{rounds}")
    print(f"{scores.settings['seconds']} s ({scores.settings['method']}, {scores.settings['dtype']})")


def save_findings(out: Path, scores: HeadScores, knock_out: KnockOut | None, by_length: dict[int, HeadScores]) -> None:
    """scores.json, scores_<length>.json, knock_out.json."""
    out.mkdir(parents=True, exist_ok=True)
    scores.save(out / "scores.json")
    for length, other in by_length.items():
        other.save(out / f"scores_{length}.json")
    if knock_out is not None:
        write_json(out / KNOCK_OUT_FILE, knock_out.to_dict())


def load_knock_out(path: Path) -> KnockOut | None:
    """The curves that an earlier call left; None where it left none."""
    return KnockOut.load(path) if path.exists() else None


def announce(args: ScoringSettings, card: ModelCard, imitators: list[str]) -> None:
    """The cost of scoring, from operation counts and this machine's matrix-product speed."""
    lengths, material = [main_length(args, card), *args.also_lengths], needle_material(args)
    work, pairs = {"receivers and gradients": 0.0, "senders, a round": 0.0, "knock-out": 0.0}, 0
    work["imitations"] = replaceability_flops(card.shape, min(lengths[0], ROW_LENGTH), imitators)
    for length in lengths:
        for batch in itertools.chain.from_iterable(probes(args, material, length).values()):
            count, tokens = batch.clean_bs.shape
            pairs += count
            work["receivers and gradients"] += 6 * count * forward_flops(card.shape, tokens)
            if args.method == "exact":
                work["receivers and gradients"] += receiver_flops(card.shape, tokens, count, batch.answer_bp.shape[1])
            if args.method == "exact" and args.roles != "receiver":
                work["senders, a round"] += sender_flops(card.shape, tokens, count)
    for batch in knock_out_prompts(args, material, lengths[0]):
        count, tokens = batch.clean_bs.shape
        work["knock-out"] += runs_a_prompt() * count * forward_flops(card.shape, tokens)
    if torch.distributed.get_rank() == 0:
        rate = matrix_speed(DTYPES[chosen_dtype(args.dtype)]) / 3 * torch.distributed.get_world_size()
        print(
            f"would score {card.shape.num_layers * card.shape.num_heads} heads on {pairs} pairs of up to {max(lengths)}"
            " tokens"
        )
        for what, flops in filter(lambda item: item[1], work.items()):
            print(f"  {what}: {flops:.1e} operations, about {flops / rate:.0f} s")
        rounds = " with two rounds of senders" if work["senders, a round"] else ""
        total = sum(work.values()) + work["senders, a round"]
        print(f"about {total / rate:.0f} s{rounds}, at a third of this machine's matrix speed, loading not counted")


def matrix_speed(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large product."""
    device, repeats = "cuda" if torch.cuda.is_available() else "cpu", 8
    square = torch.randn(1024, 1024, device=device, dtype=dtype)
    float((square @ square).sum())
    start = time.monotonic()
    float(sum((square @ square).sum() for _ in range(repeats)))
    return repeats * 2 * 1024**3 / (time.monotonic() - start)
