# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Name the shapes of the models that are measured. It imports nothing heavy: flags list the shapes in their help."""

from __future__ import annotations

from hydra_mcore.config import ModelShape
from hydra_mcore.errors import InputError

DEVICE_DTYPES = {"cpu": "float32", "cuda": "bf16"}
# The flags that set a model's shape, as help names them.
SIZES = {
    "layers": "number of layers",
    "hidden": "width of the model",
    "heads": "number of query heads",
    "kv_groups": "number of kv groups, a divisor of the heads",
    "head_dim": "channels of a head",
    "ffn": "width of the MLPs",
    "vocabulary": "tokens of the vocabulary",
}
# Section kernels: GPUs by their compute capability, times ten, and whose kernels.
CAPABILITIES = {"sm_90": 90, "sm_100": 100}
CALLERS = ("gdn", "kda", "lightning", "conv", "norm")
# Qwen3-1.7B (its config.json).
QWEN3 = ModelShape(
    num_layers=28, hidden_size=2048, num_heads=16, num_kv_groups=8, head_dim=128, ffn_hidden_size=6144,
    vocab_size=151936, native_length=40960,
)  # fmt: skip
# Section step on a CPU, and the fields that its flags set.
SMALL = ModelShape(
    num_layers=4, hidden_size=512, num_heads=8, num_kv_groups=4, head_dim=64, ffn_hidden_size=1536, vocab_size=32_768,
    native_length=8192,
)  # fmt: skip
STEP_SIZES = {
    "layers": "num_layers", "hidden": "hidden_size", "heads": "num_heads", "kv_groups": "num_kv_groups",
    "head_dim": "head_dim", "ffn": "ffn_hidden_size", "vocabulary": "vocab_size",
}  # fmt: skip
# Section layer: the share of heads that are FA, and sizes by device.
SHARES = {"3:1": 1 / 4, "7:1": 1 / 8, "all GDN": 0.0}
BLOCKS = {
    "cpu": {"heads": 8, "kv_groups": 4, "head_dim": 128, "hidden": 1024},
    "cuda": {
        "heads": QWEN3.num_heads, "kv_groups": QWEN3.num_kv_groups, "head_dim": QWEN3.head_dim,
        "hidden": QWEN3.hidden_size,
    },
}  # fmt: skip
# The random models of section decode, and their numbers of FA heads a layer.
DECODED = {"layers": 4, "heads": 16, "kv_groups": 8, "head_dim": 64, "hidden": 512, "ffn": 1536, "vocabulary": 1024}
DECODED_FA_HEADS = [4, 2]


def heads_alone(heads: int, head_dim: int) -> ModelShape:
    """A shape for what depends on its heads alone."""
    return ModelShape(
        num_layers=1, hidden_size=heads * head_dim, num_heads=heads, num_kv_groups=heads, head_dim=head_dim,
        ffn_hidden_size=1, vocab_size=1, native_length=1,
    )  # fmt: skip


def spread_heads(count: int, shape: ModelShape) -> list[int]:
    """So many heads, in as many kv groups as there are: the most keys and values for that number.

    Raises:
        InputError: more heads than the shape has.
    """
    if not 0 <= count <= shape.num_heads:
        raise InputError(f"{count} FA heads: choose 0 to {shape.num_heads}")
    size = shape.num_heads // shape.num_kv_groups
    return sorted(range(shape.num_heads), key=lambda head: head % size)[:count]
