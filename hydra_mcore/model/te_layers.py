# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's layers, with the parameters and checkpoints of the local ones (not yet run on a GPU).

``--transformer-impl transformer_engine`` takes them: the MLP with its norm, and the projections of heads. Whatever has
one row a head (decay and write gates, per-head gates), the rows of shared heads and of split kv groups, and all norms
of heads stay with torch: FP8 wants multiples of 16, and autograd must see the sums over ranks (``parameters``).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

FP8_MULTIPLE = 16  # of every dimension of a product in FP8
# In checkpoints: the MLP's norm has the name that it has with local layers.
TE_NAMES = {"mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."}


def uses_te(config: TransformerConfig) -> bool:
    """Whether a model is built of Transformer Engine's layers."""
    return config.transformer_impl == "transformer_engine"


@contextlib.contextmanager
def without_fp8(config: TransformerConfig) -> Iterator[None]:
    """Models of these settings compute in the precision of their weights, whatever the number of tokens."""
    before, config.fp8 = config.fp8, None
    try:
        yield
    finally:
        config.fp8 = before


class TELinear:
    """y = x W^T + b by Transformer Engine, with a weight and a bias that another module owns.

    No module itself, so that no parameter is registered twice. Weights are cast to FP8 anew in every pass: a cast that
    is kept would have to follow the optimizer.

    Args:
        weight: [rows, columns], the whole weight of this rank.
        bias: [rows].
    """

    def __init__(
        self, config: TransformerConfig, weight: torch.nn.Parameter, bias: torch.nn.Parameter | None = None
    ) -> None:
        from transformer_engine.pytorch import Linear

        rows, columns = weight.shape
        dtype = config.params_dtype
        self.linear = Linear(columns, rows, bias=bias is not None, params_dtype=dtype, device="meta")
        self.linear.weight = weight
        if bias is not None:
            self.linear.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """[..., columns] -> [..., rows]."""
        return self.linear(x)


def _no_state(_layer: torch.nn.Module, _state: object = None) -> None:
    """What a layer saves, as the local one, and all that it reads: the FP8 recipes in use keep nothing between steps,
    and a checkpoint must not have its own unpickled.
    """


class NormedColumnLinear(TELayerNormColumnParallelLinear):
    """The MLP's norm and first projection in one.

    Under sequence parallelism each rank sees its own tokens. Megatron would sum the norm's gradient after the
    data-parallel reduce-scatter, which ranks with unequal heads do not allow: it is summed when it is made.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        if self.config.sequence_parallel and self.tp_size > 1:
            self.layer_norm_weight.sequence_parallel = False
            self.layer_norm_weight.register_hook(partial(_summed, self._tp_group))

    get_extra_state, set_extra_state = _no_state, _no_state


class RowLinear(TERowParallelLinear):
    """The MLP's second projection."""

    get_extra_state, set_extra_state = _no_state, _no_state


def te_mlp(fuse_gradients: bool) -> ModuleSpec:
    """The MLP of a layer whose own norm before the MLP is the identity.

    Args:
        fuse_gradients: whether the backward pass adds weight gradients to Megatron's buffers itself.
    """
    fc1, fc2 = (partial(_built, layer, fuse_gradients) for layer in (NormedColumnLinear, RowLinear))
    return ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=fc1, linear_fc2=fc2))


def _built(
    layer: type[torch.nn.Module], fuse_gradients: bool, *sizes: int, config: TransformerConfig, **keywords: Any
) -> torch.nn.Module:
    """A layer of the MLP, with settings that hold for it alone: the local output layer cannot fuse without Apex."""
    config = copy.copy(config)
    config.gradient_accumulation_fusion = fuse_gradients
    config.disable_parameter_transpose_cache = True  # as in TELinear: Megatron would evaluate with stale weights
    return layer(*sizes, config=config, **keywords)


def _summed(group: torch.distributed.ProcessGroup, gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    torch.distributed.all_reduce(gradient, group=group)
    return gradient
