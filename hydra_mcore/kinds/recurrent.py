# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What recurrent kinds of heads have in common: chunks of rows, queries and keys with norm and rotary, states."""

from __future__ import annotations

from typing import Any

from hydra_mcore.kinds.kind import FLOAT, Options, Workload
from hydra_mcore.shape import ModelShape

# Of ops/chunks.py (flash-linear-attention's kernels cut into as many rows), which needs torch; a test compares.
CHUNK = 64
SEGMENT_VALUES = 2**18


def segment_tokens(heads: int, d: int) -> int:
    """Tokens of a row that the torch path works on together, with so many ``heads`` of all rows."""
    return CHUNK * max(1, SEGMENT_VALUES // max(1, heads * d * CHUNK))


def padding(length: int) -> float:
    """Rows of chunks for each token: a last chunk is filled up."""
    return -(-length // CHUNK) * CHUNK / length


def rotary_kept(shape: ModelShape, position: str, load: Workload) -> float:
    """Bytes a token of the angles that a kernel turns queries and keys by, one for all heads of a layer."""
    return 4 * load.value_bytes * shape.head_dim if load.fused and position == "rope" else 0.0


def states_kept(shape: ModelShape, heads: int, load: Workload) -> float:
    """Bytes a head and token of the states that the torch path keeps, one a segment."""
    d, part = shape.head_dim, load.length // load.cp_size
    return FLOAT * d * d / min(part, segment_tokens(heads * load.rows, d))


def segment_share(shape: ModelShape, heads: int, load: Workload) -> float:
    """The share of a rank's tokens that the torch path works on together."""
    return min(1.0, segment_tokens(heads * load.rows, shape.head_dim) * load.cp_size / load.length)


def option(options: Options, kind: str, name: str) -> Any:
    """A kind's own option: ``option(options, "gdn", "gate")`` is ``gdn_gate``."""
    return getattr(options, f"{kind}_{name}")


def keys_values_by_head(options: Options, kind: str) -> bool:
    """Whether each head has keys and values of its own; where kinds share one projection, they come by kv group."""
    return options.qkv == "separate" and option(options, kind, "kv") == "per_head"
