# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Sets of prompts, made once and kept in files."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.random import Generator
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hydra_mcore.errors import InputError, first_line
from hydra_mcore.files import checked, parse_json, replacing
from hydra_mcore.ruler.material import PromptMaterial
from hydra_mcore.ruler.needles import NEEDLE_TASKS, needle_pair, needle_prompt
from hydra_mcore.ruler.prompts import TASKS, Prompt, PromptSet, all_ids
from hydra_mcore.ruler.tracking import HOPS, chain_prompt
from hydra_mcore.ruler.words import common_words, frequent_words

VERSION = 2  # of the generators: sets of another one are made anew


def prompt_set(
    task: str, length: int, count: int, seed: int, material: PromptMaterial, cache_dir: Path | None = None
) -> PromptSet:
    """A set of prompts; the same arguments give the same set, in any process.

    Args:
        task: of ``TASKS``.
        length: tokens of each prompt and its room together.
        cache_dir: where the set is kept, under a name with all that decides about it; a broken file is made anew.

    Raises:
        InputError: an unknown task, no prompts, no tokens, a negative seed, or as the task's generator.
    """
    path = (
        None
        if cache_dir is None
        else cache_dir / f"{task}-{length}-{count}-{seed}-{_digest(material)[:16]}.safetensors"
    )
    prompts = None if path is None else _load(path)
    if prompts is None:
        prompts = tuple(draw_prompts(task, length, count, seed, material))
        if path is not None:
            _save(path, prompts)
    return PromptSet(task, length, seed, prompts)


def draw_prompts(task: str, length: int, count: int, seed: int, material: PromptMaterial) -> Iterator[Prompt]:
    """The prompts of a set, one after the other, for who shows progress; see ``prompt_set``."""
    for depths, rng in _draws(task, length, count, seed):
        yield _draw(task, length, material, depths, rng)


def draw_pairs(
    task: str, length: int, count: int, seed: int, material: PromptMaterial
) -> Iterator[tuple[Prompt, Prompt]]:
    """The prompts of a set, each with its counterfactual: the same prompt with another value of as many tokens.

    Raises:
        InputError: as ``prompt_set`` and ``needle_pair``.
    """
    for depths, rng in _draws(task, length, count, seed):
        yield needle_pair(task, length, material, depths, rng)


def _draws(task: str, length: int, count: int, seed: int) -> Iterator[tuple[list[float], Generator]]:
    """What decides about each prompt of a set: the depths of its needles, and the source of all other random choices.

    Raises:
        InputError: an unknown task, no prompts, no tokens, or a negative seed.
    """
    if task not in TASKS:
        raise InputError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    if min(count, length, seed + 1) < 1:
        raise InputError(
            f"{count} prompts of {length} tokens from seed {seed}: give at least 1 prompt, 1 token and a seed from 0 on"
        )
    key = [seed, length, *task.encode()]
    placed = NEEDLE_TASKS[task].placed if task in NEEDLE_TASKS else HOPS + 1 if task == "vt" else 0
    # Each needle takes every depth once over the set, in an order of its own.
    shuffle = np.random.default_rng(key)
    depths = [(shuffle.permutation(count) + 0.5) / count for _ in range(placed)]
    for number in range(count):
        yield [float(each[number]) for each in depths], np.random.default_rng([*key, number])


def _draw(task: str, length: int, material: PromptMaterial, depths: Sequence[float], rng: Generator) -> Prompt:
    if task in NEEDLE_TASKS:
        return needle_prompt(task, length, material, depths, rng)
    if task == "vt":
        return chain_prompt(length, material, depths, rng)
    return (common_words if task == "cwe" else frequent_words)(length, material, rng)


def _digest(material: PromptMaterial) -> str:
    return hashlib.sha256(f"{VERSION} {material.digest}".encode()).hexdigest()


def _save(path: Path, prompts: Sequence[Prompt]) -> None:
    facts = [
        [len(prompt.ids), len(prompt.answer_ids), prompt.room, prompt.answers, prompt.spans, prompt.depths]
        for prompt in prompts
    ]
    ids = np.concatenate(all_ids(prompts))
    about = json.dumps(facts)
    with replacing(path) as beside:
        beside.write_bytes(save({"ids": ids, "sha256": _checksum(ids, about)}, {"facts": about}))


def _load(path: Path) -> tuple[Prompt, ...] | None:
    """The prompts of a file, None if it is missing or damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as stored:
            ids, checksum, about = stored.get_tensor("ids"), stored.get_tensor("sha256"), stored.metadata()["facts"]
        if not np.array_equal(checksum, _checksum(ids, about)):
            raise ValueError("its checksum is another")
        facts = checked(parse_json(about, "facts"), list[_Facts], "facts")
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        print(f"{path}: damaged ({first_line(error)}); its prompts are made again", file=sys.stderr)
        return None
    prompts, at = [], 0
    for size, answer_size, room, answers, spans, depths in facts:
        end = at + size
        prompts.append(Prompt(ids[at:end], room, answers, ids[end : end + answer_size], spans, depths))
        at = end + answer_size
    return tuple(prompts)


def _checksum(ids: np.ndarray, facts: str) -> np.ndarray:
    return np.frombuffer(
        hashlib.sha256(facts.encode() + str(ids.dtype).encode() + ids.tobytes()).digest(), dtype=np.uint8
    )


_Facts = tuple[int, int, int, tuple[str, ...], tuple[tuple[int, int], ...], tuple[float, ...]]
