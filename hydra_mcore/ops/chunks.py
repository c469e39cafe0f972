# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens cut into chunks, and the float32 states that recurrences carry from chunk to chunk.

Shape suffixes of all chunked recurrences: b batch, s sequence, h heads, d key dimension, v value dimension; sequences
are cut into ``c`` chunks of ``r`` rows, n = b * h are the heads of all rows, one batch axis of every product, and k
counts documents packed into a row.

This file needs torch only: a copy of it travels with every model exported to Hugging Face.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64
FEW_TOKENS = 8  # up to so many a recurrence token by token is less work than one chunk
# A segment is as many chunks as stay in a processor's cache, some megabytes with all that is made of them. Measured on
# two cores with 32 MiB: half to four times as many take as long, an eighth a third longer, all at once twice as long.
SEGMENT_VALUES = 2**18  # of one of q, k, v


class Segment(NamedTuple):
    """Consecutive chunks that are worked on together: their tokens, and what each chunk begins and ends."""

    tokens: slice
    slots: list[int] | None  # the row of each token, where there are more rows than tokens
    lengths: list[int]  # tokens of each chunk; the rows behind them are padding
    begins: list[int | None]  # the document that a chunk is the first of
    ends: list[int | None]  # the document that it is the last of


def segment_tokens(heads: int, d: int, chunk_size: int = CHUNK) -> int:
    """Tokens of a row that are worked on together: a state is kept for each of so many.

    Args:
        heads: of all rows.
    """
    return chunk_size * max(1, SEGMENT_VALUES // max(1, heads * d * chunk_size))


def cut(bounds: Sequence[int], chunk_size: int, at_once: int) -> list[Segment]:
    """Cut documents with these boundaries into chunks of one document each, and these into segments of ``at_once``
    chunks.
    """
    chunks, segments = [], []
    for document, (start, end) in enumerate(itertools.pairwise(bounds)):
        for first in range(start, end, chunk_size):
            last = min(first + chunk_size, end)
            chunks.append((first, last, document if first == start else None, document if last == end else None))
    for i in range(0, len(chunks), at_once):
        firsts, lasts, begins, ends = map(list, zip(*chunks[i : i + at_once], strict=True))
        lengths = [last - first for first, last in zip(firsts, lasts, strict=True)]
        slots: list[int] = []
        for chunk, length in enumerate(lengths):
            slots += range(chunk * chunk_size, chunk * chunk_size + length)
        full = len(slots) == len(firsts) * chunk_size
        segments.append(Segment(slice(firsts[0], lasts[-1]), None if full else slots, lengths, begins, ends))
    return segments


def lay_out(
    q_bshd: Tensor, v_bshv: Tensor, initial_state_bhdv: Tensor | None, bounds: Sequence[int] | None, chunk_size: int
) -> tuple[Tensor, list[Segment]]:
    """The states before the documents of each row, [k, n, d, v], and the segments in which the rows are worked on.

    Arguments as chunked recurrences have them; raises ValueError where the shape of the initial state is wrong.
    """
    b, s, h, d = q_bshd.shape
    bounds = (0, s) if bounds is None else bounds
    documents = len(bounds) - 1
    initial_bhdv = first_state(q_bshd, (documents * b, h, d, v_bshv.shape[-1]), initial_state_bhdv)
    segments = cut(bounds, chunk_size, segment_tokens(b * h, d, chunk_size) // chunk_size)
    return initial_bhdv.unflatten(0, (documents, b)).flatten(1, 2), segments


def to_chunks(x_bsh: Tensor, segment: Segment, chunk_size: int, dtype: torch.dtype) -> Tensor:
    """The segment's part of [b, s, h, ...] as [c, n, r, ...]; zeros in padded rows, which write and forget nothing."""
    x_bsh = x_bsh[:, segment.tokens]
    if segment.slots is not None:
        slot_s = torch.tensor(segment.slots, device=x_bsh.device)
        rows = len(segment.begins) * chunk_size
        x_bsh = x_bsh.new_zeros(x_bsh.shape[0], rows, *x_bsh.shape[2:]).index_copy_(1, slot_s, x_bsh)
    x_cbhr = x_bsh.unflatten(1, (len(segment.begins), chunk_size)).movedim(3, 2).movedim(1, 0)
    return torch.empty(x_cbhr.shape, dtype=dtype, device=x_bsh.device).copy_(x_cbhr).flatten(1, 2)


def from_chunks(x_cnr: Tensor, segment: Segment, out_bsh: Tensor) -> None:
    """Write [c, n, r, ...] into the segment's part of [b, s, h, ...]."""
    b, h = out_bsh.shape[0], out_bsh.shape[2]
    x_bsh = x_cnr.unflatten(1, (b, h)).movedim(0, 1).movedim(3, 2)
    if segment.slots is None:
        out_bsh[:, segment.tokens].unflatten(1, (len(x_cnr), x_cnr.shape[2])).copy_(x_bsh)
    else:
        out_bsh[:, segment.tokens] = x_bsh.flatten(1, 2)[:, segment.slots].to(out_bsh.dtype)


def add_product(sum_cnxy: Tensor, a_cnxz: Tensor, b_cnzy: Tensor) -> None:
    """sum += a @ b, in place."""
    sum_cnxy.flatten(0, 1).baddbmm_(a_cnxz.flatten(0, 1), b_cnzy.flatten(0, 1))


def state_dtype(q_bshd: Tensor) -> torch.dtype:
    """The dtype of states: float32, or float64 for float64 queries."""
    return torch.promote_types(q_bshd.dtype, torch.float32)


def first_state(q_bshd: Tensor, shape: tuple[int, ...], given: Tensor | None) -> Tensor:
    """The state before the first token, zeros unless given; raises ValueError for one of another shape."""
    if given is None:
        return q_bshd.new_zeros(shape, dtype=state_dtype(q_bshd))
    if given.shape != shape:
        raise ValueError(f"initial state has shape {list(given.shape)}, needs {list(shape)}")
    return given.to(state_dtype(q_bshd))
