# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Make the documents of this folder's tasks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hydra_mcore.ruler.material import PromptMaterial
from hydra_mcore.ruler.needles import needle_pair
from hydra_mcore.ruler.wording import own_wording
from hydra_mcore.tokenizer import open_tokenizer

HERE = Path(__file__).resolve().parent
TEACHER = HERE.parent / "tiny" / "teacher"
DOCUMENTS = 32
SHORTEST, LONGEST = 100, 500  # tokens of prompt and answer; the teacher was trained on 512
SEED = 3_000_000  # the teacher answered other prompts of this seed once (docs/LOG.md); nothing was chosen by either


def needle_documents() -> Iterator[dict[str, Any]]:
    """Yield documents of mixed lengths, their needles at all depths in a mixed order.

    A document has a ``prompt``, the ``answer`` that follows it after a space, ``choices`` (the answer and three values
    that differ from it in one piece or both) and the answer's place among them, ``label``.

    Raises:
        ValueError: The text of a document would not be encoded to the tokens of its needle prompt.
    """
    tokenizer = open_tokenizer(TEACHER)
    material = PromptMaterial(tokenizer, own_wording(TEACHER), None)
    rng = np.random.default_rng(SEED)
    for place in rng.permutation(DOCUMENTS).tolist():
        length, depth = int(rng.integers(SHORTEST, LONGEST + 1)), (place + 0.5) / DOCUMENTS
        needle, twin = needle_pair("niah_single_1", length, material, [depth], rng)
        prompt = tokenizer.decode(needle.ids)
        answer, *others = (
            tokenizer.decode(ids).strip()
            for ids in itertools.product(*zip(needle.answer_ids.tolist(), twin.answer_ids.tolist(), strict=True))
        )
        if tokenizer.encode(f"{prompt} {answer}") != [*needle.ids.tolist(), *needle.answer_ids.tolist()]:
            raise ValueError(f"{prompt[-20:]!r}: the text's tokens are not the needle prompt's")
        choices = rng.permutation([answer, *others]).tolist()
        yield {"prompt": prompt, "answer": answer, "choices": choices, "label": choices.index(answer)}
