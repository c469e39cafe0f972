# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Counterfactual pairs for head selection: prompts, and the same prompts with another source of the answer.

In the corrupt prompt a distractor of the same kind and length stands where the answer comes from; every other token,
the teacher-forced answer included, stays (symmetric token replacement, paper section 2 point 1). Retrieval has the
needle prompts, where the source is the queried value; general ability has ``general.py``; users bring files of pairs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from hydra_mcore.errors import InputError
from hydra_mcore.selection.capabilities import BUILT_IN, GENERAL, RETRIEVAL
from hydra_mcore.selection.general import general_pairs
from hydra_mcore.selection.jsonl import Pair, encode, load_pairs
from hydra_mcore.selection.needles import RULER_FORMAT, TASKS, NeedleFormat, build_prompts
from hydra_mcore.tokenizer import open_tokenizer

EVALUATION_SEEDS = 1_000_000  # the first of them: selection stays below, so no map is chosen on prompts it is judged by
TOKENS_A_FORWARD = 16_384  # pairs are cut into batches of about this many tokens


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
    """Raise InputError for a seed that belongs to evaluation."""
    if not 0 <= seed < EVALUATION_SEEDS:
        raise InputError(
            f"seed {seed}: selection uses 0 to {EVALUATION_SEEDS - 1}; larger ones are kept for evaluation"
        )


def build_probes(
    tokenizer: Tokenizer,
    fmt: NeedleFormat,
    haystack_ids: np.ndarray | None,
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
        haystack_ids: [n] real text, see ``read_haystack``; None for the format's noise wherever a task uses text.
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
        for task, needles in _needle_pairs(tokenizer, fmt, haystack_ids, length, pairs, seed).items():
            found[task] = _batches(task, RETRIEVAL, needles)
    for probe in BUILT_IN[GENERAL] if GENERAL in capabilities else ():
        if general := general_pairs(probe, tokenizer, fmt, length, pairs, seed):
            found[probe] = _batches(probe, GENERAL, general)
        else:
            print(
                f"probe {probe} is left out: this tokenizer leaves it no pair of at most {length} tokens",
                file=sys.stderr,
            )
    for capability, path in files.items():
        found[Path(path).stem] = _batches(Path(path).stem, capability, load_pairs(tokenizer, path))
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
    probes = Counter(probe for name in set(capabilities) for probe in BUILT_IN.get(name, ()))
    probes.update(Path(path).stem for path in files.values())
    for path in files.values():
        if probes[Path(path).stem] > 1:
            raise InputError(f"probe file {path}: another probe is called {Path(path).stem!r} too; rename the file")


def _needle_pairs(
    tokenizer: Tokenizer, fmt: NeedleFormat, haystack_ids: np.ndarray | None, length: int, pairs: int, seed: int
) -> dict[str, list[Pair]]:
    """Retrieval: the pairs of every needle task; the source is the queried value in the haystack."""
    if haystack_ids is None:
        haystack_ids = np.resize(encode(tokenizer, fmt.noise), length)
    elif len(haystack_ids) < length:
        mend = "give a longer --haystack, a shorter --length, or --haystack noise"
        raise InputError(f"the haystack has {len(haystack_ids)} tokens, a prompt {length}; {mend}")
    found: dict[str, list[Pair]] = {}
    for task in TASKS:
        try:
            prompts = build_prompts(task, fmt, tokenizer, haystack_ids, length, pairs, seed)
        except ValueError as error:
            raise InputError(
                f"probe {task} with {length} tokens: {error}; give a longer --length or another --format"
            ) from None
        found[task] = []
        for prompt in prompts:
            clean, corrupt = (ids[: prompt.answer_start] for ids in (prompt.ids, prompt.with_value(prompt.distractor)))
            ((first, last),) = prompt.value_spans
            found[task].append(Pair(clean, corrupt, prompt.answer, prompt.distractor, np.arange(first, last)))
    return found


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


def load_tokenizer(checkpoint_dir: str | Path) -> Tokenizer:
    """The tokenizer that import put beside a checkpoint; raises InputError when there is none that loads."""
    folder = Path(checkpoint_dir) / "tokenizer"
    if not folder.is_dir():
        raise InputError(f"{folder}: no tokenizer beside the checkpoint; copy the Hugging Face tokenizer files there")
    return open_tokenizer(folder)


def load_format(checkpoint_dir: str | Path, path: str | Path | None = None) -> NeedleFormat:
    """The wording of needles: a file, else the checkpoint's own ``tokenizer/needles.json``, else RULER's.

    Raises:
        InputError: the file is missing or no needle format.
    """
    own = Path(checkpoint_dir) / "tokenizer" / "needles.json"
    if path is None and not own.is_file():
        return RULER_FORMAT
    return NeedleFormat.load(path or own)


def read_haystack(tokenizer: Tokenizer, path: str | Path | None = None) -> np.ndarray:
    """Token ids [n] of the text that needles are hidden in: a UTF-8 file, else the language reference of this Python.

    Raises:
        InputError: the file cannot be read, is not UTF-8 or is empty.
    """
    if path is None:
        from pydoc_data.topics import topics  # half a megabyte of English prose that every Python brings along

        text = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"haystack {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError(f"haystack {path}: not UTF-8 text") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise InputError(f"haystack {path}: no text in it")
    return np.asarray(ids, dtype=np.int64)
