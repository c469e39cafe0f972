# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""In which precision a model runs, by the names that commands take."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
CPU_FEATURES = ("avx512_bf16", "amx_bf16")  # with them a product in bf16 takes a fraction of one in float32


def fast_bf16() -> bool:
    """Whether products in bf16 are faster here than in float32: on a GPU, or by a processor's own instructions."""
    return torch.cuda.is_available() or any(torch.cpu.get_capabilities().get(name) for name in CPU_FEATURES)


def chosen_dtype(name: str) -> str:
    """A name of ``DTYPES``; of "auto" bf16 where that is faster."""
    return ("bf16" if fast_bf16() else "float32") if name == "auto" else name
