# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Counterfactual pairs for head selection: prompts, and the same prompts with another source of the answer.

In the corrupt prompt a distractor of the same kind and length stands where the answer comes from; every other token,
the teacher-forced answer included, stays (symmetric token replacement, paper section 2 point 1). Retrieval has the
needle prompts of ``ruler/``, where the source is the queried value; general ability has ``general.py``; users bring
files of pairs.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hydra_mcore.errors import InputError
from hydra_mcore.ruler.material import PromptMaterial
from hydra_mcore.ruler.prompts import EVALUATION_SEEDS, Prompt
from hydra_mcore.ruler.sets import draw_pairs
from hydra_mcore.selection.capabilities import BUILT_IN, GENERAL, RETRIEVAL
from hydra_mcore.selection.general import general_pairs
from hydra_mcore.selection.jsonl import Pair, load_pairs

# Pairs are cut into batches of about this many tokens. Attribution keeps what all layers compute of a batch: at 16,384
# two ranks took 11 GB each on a model of 135M parameters.
TOKENS_A_FORWARD = 4_096


@dataclass(frozen=True, eq=False)
class ProbeBatch:
    """Pairs of one sub-probe, all of one length; the answer runs from ``answer_start`` to the end (p tokens)."""

    probe: str
    capability: str  # "retrieval", "general" or a user's own
    clean_bs: Tensor  # int64
    corrupt_bs: Tensor  # int64, the source of the answer replaced
    answer_start: int
    answer_bp: Tensor  # int64, a+ of Eq 9
    distractor_bp: Tensor  # int64, a- of Eq 9
    source_bp: (
        Tensor | None
    )  # int64, where in the prompt the answer is copied from, token for token; None where it is not copied

    def to(self, device: torch.device) -> ProbeBatch:
        return self._each(lambda ids: ids.to(device))

    def take(self, pairs: Sequence[int]) -> ProbeBatch:
        """The batch of these of its pairs."""
        return self._each(lambda ids: ids[list(pairs)])

    def _each(self, change: Callable[[Tensor], Tensor]) -> ProbeBatch:
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(
            self, **{name: change(ids) for name, ids in tensors.items() if isinstance(ids, Tensor)}
        )


def check_seed(seed: int) -> None:
    """Raise InputError for a seed of evaluation: no map is chosen on prompts that it is judged by."""
    if not 0 <= seed < EVALUATION_SEEDS:
        raise InputError(
            f"seed {seed}: selection uses 0 to {EVALUATION_SEEDS - 1}; larger ones are kept for evaluation"
        )


def build_probes(
    material: PromptMaterial,
    length: int,
    pairs: int,
    seed: int,
    capabilities: Sequence[str] = (RETRIEVAL, GENERAL),
    files: Mapping[str, Path] = {},
) -> dict[str, list[ProbeBatch]]:
    """The batches of each sub-probe by its name, small enough to bound a forward's memory; the same seed gives the
    same.

    A general sub-probe that the tokenizer or the length leaves no pair is left out, with a line on stderr.

    Args:
        material: what needle prompts are made of; without a haystack, noise wherever a task uses text.
        length: tokens of a retrieval prompt, the answer included, and the most that a general prompt may have.
        pairs: how many a sub-probe; a file gives all of its own.
        capabilities: which of the built-in ones; names of ``files`` may be among them.
        files: capability -> JSONL file, always used; its sub-probe has the name of the file without its ending.

    Raises:
        InputError: a seed of evaluation; no pairs; an unknown capability; two probes of one name; a haystack that is
            too short; needle prompts that cannot be built; a file of pairs that cannot be used.
    """
    check_seed(seed)
    if pairs < 1:
        raise InputError(f"{pairs} pairs a sub-probe: at least 1 is needed")
    if length < 1:
        raise InputError(f"{length} tokens a prompt: give a positive length")
    _check_names(capabilities, files)
    found: dict[str, list[ProbeBatch]] = {}
    if RETRIEVAL in capabilities:
        for task, needles in _needle_pairs(material, length, pairs, seed).items():
            found[task] = _batches(task, RETRIEVAL, needles)
    for probe in BUILT_IN[GENERAL] if GENERAL in capabilities else ():
        if general := general_pairs(probe, material.tokenizer, material.wording.own, length, pairs, seed):
            found[probe] = _batches(probe, GENERAL, general)
        else:
            print(
                f"probe {probe} is left out: this tokenizer leaves it no pair of at most {length} tokens",
                file=sys.stderr,
            )
    for capability, path in files.items():
        found[Path(path).stem] = _batches(Path(path).stem, capability, load_pairs(material.tokenizer, path))
    if not found:
        raise InputError(
            f"no probe has a pair of at most {length} tokens; give a longer --length, or another capability"
        )
    return found


def _check_names(capabilities: Sequence[str], files: Mapping[str, Path]) -> None:
    """Raise InputError for a capability that nobody knows, and for names that are there twice."""
    for name in capabilities:
        if name not in BUILT_IN and name not in files:
            raise InputError(
                f"unknown capability {name!r}: choose from {', '.join([*BUILT_IN, *files])}, or give a file of pairs"
                " for it"
            )
    for name, path in files.items():
        if name in BUILT_IN:
            raise InputError(f"capability {name!r} of {path} is built in; give the file's capability another name")
    probes = Counter(itertools.chain.from_iterable(BUILT_IN.get(name, ()) for name in set(capabilities)))
    probes.update(Path(path).stem for path in files.values())
    for path in files.values():
        if probes[Path(path).stem] > 1:
            raise InputError(f"probe file {path}: another probe is called {Path(path).stem!r} too; rename the file")


def _needle_pairs(material: PromptMaterial, length: int, pairs: int, seed: int) -> dict[str, list[Pair]]:
    """Retrieval: the pairs of every needle task; the source of an answer is the queried value in the haystack."""
    if material.haystack is None:
        material = material.in_noise()
    elif len(material.haystack.ids) < length:
        fix = "give a longer --text, a shorter --length, or --text noise"
        raise InputError(f"the text has {len(material.haystack.ids)} tokens, a prompt {length}; {fix}")
    try:
        return {
            task: [_needle_pair(*twins) for twins in draw_pairs(task, length, pairs, seed, material)]
            for task in BUILT_IN[RETRIEVAL]
        }
    except InputError as error:
        raise InputError(f"needle probe: {error}; give a longer --length or another --template") from None


def _needle_pair(clean: Prompt, corrupt: Prompt) -> Pair:
    ends = ((clean, clean), (clean, corrupt), (corrupt, clean))  # prompt, and the prompt whose answer is put behind it
    return Pair.of(*(np.concatenate([one.ids, other.answer_ids]).astype(np.int64) for one, other in ends))


def _batches(probe: str, capability: str, pairs: Sequence[Pair]) -> list[ProbeBatch]:
    """Pairs of the same lengths together, about ``TOKENS_A_FORWARD`` tokens a batch."""
    groups: dict[tuple[int, int, bool], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((len(pair.clean_ids), len(pair.answer_ids), pair.source is None), []).append(pair)
    batches = []
    for (start, width, uncopied), group in groups.items():
        size = max(1, TOKENS_A_FORWARD // (start + width))
        for at in range(0, len(group), size):
            part = group[at : at + size]
            batches.append(
                ProbeBatch(
                    probe=probe,
                    capability=capability,
                    clean_bs=_stack([np.append(pair.clean_ids, pair.answer_ids) for pair in part]),
                    corrupt_bs=_stack([np.append(pair.corrupt_ids, pair.answer_ids) for pair in part]),
                    answer_start=start,
                    answer_bp=_stack([pair.answer_ids for pair in part]),
                    distractor_bp=_stack([pair.distractor_ids for pair in part]),
                    source_bp=None if uncopied else _stack([pair.source for pair in part]),
                )
            )
    return batches


def _stack(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows))
