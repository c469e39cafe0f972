# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows of tensors that a part of a sequence names (``hydra_mcore/sequence.py``)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from hydra_mcore.sequence import Rows, SequencePart


def positions(part: SequencePart, device: torch.device) -> Tensor:
    """The position of each token of a part within its document, from 0: [s], int64."""
    first = part.past + part.start
    token_s = torch.arange(first, first + part.num_tokens, device=device)
    if not part.packed:
        return token_s  # nothing comes from the host, for whose copies a GPU's stream waits
    starts = torch.tensor(part.documents, device=device)
    return token_s - starts[torch.searchsorted(starts, token_s - part.past, right=True) - 1]


def take_rows(x_s: Tensor, rows: Rows) -> Tensor:
    """The given runs of axis 0, joined; the tensor itself where they are all of it."""
    runs = list(itertools.chain.from_iterable(rows))
    if all(end == start for (_, end), (start, _) in itertools.pairwise(runs)):
        return x_s[runs[0][0] : runs[-1][1]]
    return torch.cat([x_s[start:end] for start, end in runs])
