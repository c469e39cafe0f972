# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameters that belong to heads: their tensor-parallel marks, their shards in a checkpoint.

Tensor-parallel ranks may own different numbers of heads of a kind, so Megatron's column-parallel linear, which
splits evenly, does not fit. Two rules replace it:

1. A rank owns whole heads. A checkpoint stores each head by itself, in Hugging Face order, so it knows nothing
   of the layout. A rank without heads has no parameter (an empty shard cannot be loaded).
2. A parameter that ranks hold in common has its gradient summed *inside* the backward pass (``replicated``).
   Megatron sums such gradients after the data-parallel reduce-scatter, which is right only while every rank's
   gradient buffer has the same layout; with unequal heads it has not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hydra_mcore.heads import HeadLayout
from hydra_mcore.model.attention_plan import HeadSet
from hydra_mcore.model.te_layers import TELinear, uses_te
from hydra_mcore.ops.context_parallel import gather_parts


def replicated(weight: Tensor, tp_group: torch.distributed.ProcessGroup) -> Tensor:
    """A weight that all tensor-parallel ranks hold: as it is forward, gradient summed over the ranks backward."""
    return copy_to_tensor_model_parallel_region(weight, group=tp_group) if tp_group.size() > 1 else weight


def gathered[M: torch.nn.Module](module: M) -> M:
    """A module whose parameters are read without calling it, once they are up to date.

    Under ``--overlap-param-gather`` the optimizer's new values arrive while the step already runs, and Megatron waits
    for a module's own in its forward pre-hooks.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    return module


def recomputed[T](config: TransformerConfig, core: Callable[..., T], *inputs: Tensor) -> T:
    """``core(*inputs)``, computed again in backward instead of kept, under Megatron's selective "core_attn" recompute.

    By torch's checkpoint: Megatron's takes no gradient with ``autograd.grad``, which align uses. ``core`` draws no
    random numbers; it is run again to its end, because ranks must communicate alike whatever each of them needs again.
    """
    if config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules:
        return checkpoint(core, *inputs, use_reentrant=False, preserve_rng_state=False, early_stop=False)
    return core(*inputs)


def head_shards(
    key: str, weight: Tensor, ordinals: Sequence[int], total: int, replica_id: ReplicaId, axis: int = 0
) -> ShardedTensorFactory:
    """One checkpoint shard a head: ``weight`` is ``len(ordinals)`` equal blocks along ``axis``, of ``total`` in the
    model.

    The stored tensor has shape [total, *block]; rank and layout do not show in it.
    """

    def build(key: str, tensor: Tensor, replica_id: ReplicaId, flattened_range: slice | None) -> list[ShardedTensor]:
        blocks = tensor.chunk(len(ordinals), dim=axis)
        return [
            ShardedTensor.from_rank_offsets(key, block[None].contiguous(), (0, ordinal, total), replica_id=replica_id)
            for ordinal, block in zip(ordinals, blocks, strict=True)
        ]

    def merge(blocks: list[Tensor]) -> Tensor:
        return torch.cat([block[0] for block in blocks], dim=axis)

    return ShardedTensorFactory(key, weight, build, merge, replica_id)


def data_parallel_replica(metadata: dict[str, Any] | None, tp_rank: int = 0) -> ReplicaId:
    """Which copy of a shard this rank holds; copy (0, 0, 0) is the one that is written."""
    return (0, tp_rank, ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"].rank())


def new_parameter(config: TransformerConfig, *shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(*shape, dtype=config.params_dtype, device=_device(config)))


def new_index(config: TransformerConfig, values: Sequence[int]) -> Tensor:
    """For a buffer, on the parameters' device: only training moves a model that is built."""
    return torch.tensor(values, dtype=torch.long, device=_device(config))


def _device(config: TransformerConfig) -> Any:
    return "cpu" if config.use_cpu_initialization else torch.cuda.current_device()


class PerHead(torch.nn.Module):
    """A block of parameters for every head of a branch that this rank holds, the blocks stacked on axis 0.

    ``weight`` (and ``bias``) hold the rank's own heads; ``weight_shared`` those that all tensor-parallel ranks hold.

    Args:
        block: shape of one head's block, e.g. (d, m) for a projection, () for a scalar.
    """

    def __init__(
        self,
        config: TransformerConfig,
        heads: HeadSet,
        block: tuple[int, ...],
        pg_collection: ProcessGroupCollection,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.block, self.tp_group = heads, block, pg_collection.tp
        self.empty = not heads.ordinals
        for suffix, owned in (("", heads.ordinals), ("_shared", heads.shared)):
            if not owned:
                continue
            rows = len(owned) * (block[0] if block else 1)
            weight = new_parameter(config, rows, *block[1:])
            if len(block) == 2:
                config.init_method(weight)
            self.register_parameter("weight" + suffix, weight)
            if bias:
                self.register_parameter("bias" + suffix, new_parameter(config, rows))
        for name, parameter in self.named_parameters():
            if not name.endswith("_shared"):
                set_tensor_model_parallel_attributes(parameter, True, 0, 1)

    def shared_parameter(self, name: str) -> Tensor | None:
        """The shared heads' "weight" or "bias", its gradient summed over the ranks."""
        parameter = getattr(self, name + "_shared", None)
        return None if parameter is None else replicated(parameter, self.tp_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensorFactory]:
        shards = {}
        for name, parameter in self.named_parameters():
            is_shared = name.endswith("_shared")
            replica = data_parallel_replica(metadata, self.tp_group.rank() if is_shared else 0)
            ordinals = self.heads.shared if is_shared else self.heads.ordinals
            shards[prefix + name] = head_shards(
                prefix + name.removesuffix("_shared"), parameter, ordinals, self.heads.total, replica
            )
        return shards


class HeadLinear(PerHead):
    """Rows of a projection, ``rows`` for each head: x_sbm -> [s, b, h, rows].

    Args:
        width: of what it projects, the layer's input unless given.
    """

    def __init__(
        self,
        config: TransformerConfig,
        heads: HeadSet,
        rows: int,
        pg_collection: ProcessGroupCollection,
        bias: bool = False,
        width: int | None = None,
    ) -> None:
        super().__init__(config, heads, (rows, config.hidden_size if width is None else width), pg_collection, bias)
        self.rows = rows
        self.te: TELinear | None = None
        if uses_te(config) and not self.empty and width is None and rows % config.kv_channels == 0:
            self.te = TELinear(config, self.weight, getattr(self, "bias", None))

    def forward(self, x_sbm: Tensor, shared: bool = False) -> Tensor:
        """The rank's own heads, or the ones it shares."""
        if shared:
            out = F.linear(x_sbm, self.shared_parameter("weight"), self.shared_parameter("bias"))
        elif self.empty:
            return x_sbm.new_zeros(*x_sbm.shape[:-1], 0, self.rows)
        elif self.te is not None:
            out = self.te(x_sbm)
        else:
            out = F.linear(x_sbm, self.weight, getattr(self, "bias", None))
        return out.unflatten(-1, (-1, self.rows))


class GroupLinear(torch.nn.Module):
    """K/V rows of the kv groups that live in a branch: x_sbm -> [s, b, g, rows], the groups that this rank's heads
    read.

    A group lives while one of its heads is in the branch. A group whose heads stand on several ranks is held by all of
    them (``weight_split``), every other one by its rank alone (``weight``); so are the biases of a model that has them
    (``bias_split``, ``bias``). Groups of heads that all ranks share are needed whole by each: every rank makes them for
    its share of the tokens, and all gather.

    ``group_of_head`` is the index on axis g of each of the rank's heads, its own and then the shared ones;
    ``groups`` are the groups on that axis.

    Args:
        kind: whose heads; None for those of all kinds, in the rank's order.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layout: HeadLayout,
        rows: int,
        pg_collection: ProcessGroupCollection,
        kind: str | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.tp_group = rows, pg_collection.tp
        members, own, shared = (
            by_kind.heads if kind is None else by_kind[kind]
            for by_kind in (layout.layer, layout.ranks[self.tp_group.rank()], layout.shared)
        )
        self.living, self.split = layout.groups_of(members), list(layout.split_groups(kind))
        read, self.gathered = layout.groups_of(own + shared), layout.groups_of(shared)
        self.local = [group for group in read if group not in self.split]
        used_split = [group for group in read if group in self.split and group not in self.gathered]
        self.groups = self.local + used_split + self.gathered
        index = {
            "used_split": [self.split.index(group) for group in used_split],
            "gathered_split": [self.split.index(group) for group in self.gathered],
            "group_of_head": [self.groups.index(layout.group_of(head_idx)) for head_idx in own + shared],
        }
        for name, values in index.items():
            self.register_buffer(name, new_index(config, values), persistent=False)
        for suffix, groups in (("", self.local), ("_split", self.split)):
            if groups:
                weight = new_parameter(config, len(groups) * rows, config.hidden_size)
                config.init_method(weight)
                self.register_parameter("weight" + suffix, weight)
                if config.add_qkv_bias:
                    self.register_parameter("bias" + suffix, new_parameter(config, len(groups) * rows))
        for name, parameter in self.named_parameters():
            if not name.endswith("_split"):
                set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        self.te: TELinear | None = None
        if uses_te(config) and self.local and not self.split:
            self.te = TELinear(config, self.weight, getattr(self, "bias", None))

    def forward(self, x_sbm: Tensor) -> Tensor:
        if self.te is not None:
            return self.te(x_sbm).unflatten(-1, (-1, self.rows))
        (weight, gathered_weight), (bias, gathered_bias) = self._used("weight"), self._used("bias")
        if weight is None:
            return x_sbm.new_zeros(*x_sbm.shape[:-1], 0, self.rows)
        own = F.linear(x_sbm, weight, bias).reshape(*x_sbm.shape[:-1], -1 if len(weight) else 0, self.rows)
        return (
            own
            if gathered_weight is None
            else torch.cat([own, self._gather(x_sbm, gathered_weight, gathered_bias)], dim=2)
        )

    def _used(self, kind: str) -> tuple[Tensor | None, Tensor | None]:
        """The "weight" or "bias" of the groups that this rank projects by itself, and of those that all gather; None
        where none is.

        Those of split groups come even where this rank uses none of them, without rows: every rank must run the sum of
        their gradient.
        """
        own, gathered = [getattr(self, kind)] if hasattr(self, kind) else [], None
        if hasattr(self, kind + "_split"):
            held = replicated(getattr(self, kind + "_split"), self.tp_group).unflatten(0, (len(self.split), self.rows))
            own.append(held.index_select(0, self.used_split).flatten(0, 1))
            if self.gathered:
                gathered = held.index_select(0, self.gathered_split).flatten(0, 1)
        if not own:
            return None, None
        return torch.cat(own) if len(own) > 1 else own[0], gathered

    def _gather(self, x_sbm: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The projection of all tokens, each rank making that of its share: [s, b, g, rows]."""
        length, ranks = x_sbm.shape[0], self.tp_group.size()
        share = -(-length // ranks)
        mine = F.pad(x_sbm, (0, 0, 0, 0, 0, share * ranks - length)).split(share)[self.tp_group.rank()]
        return gather_parts(F.linear(mine, weight, bias), self.tp_group)[:length].unflatten(-1, (-1, self.rows))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensorFactory]:
        shards = {}
        for name, parameter in self.named_parameters():
            is_split = name.endswith("_split")
            replica = data_parallel_replica(metadata, self.tp_group.rank() if is_split else 0)
            ordinals = [self.living.index(g) for g in (self.split if is_split else self.local)]
            shards[prefix + name] = head_shards(
                prefix + name.removesuffix("_split"), parameter, ordinals, len(self.living), replica
            )
        return shards


class CommonLinear(torch.nn.Module):
    """A projection that the heads of a branch have in common, on whichever ranks they are: x_sbm -> [s, b, rows].

    Every tensor-parallel rank holds it whole; its gradient is summed over those of their heads.
    """

    def __init__(self, config: TransformerConfig, rows: int, pg_collection: ProcessGroupCollection) -> None:
        super().__init__()
        self.tp_group = pg_collection.tp
        self.weight = new_parameter(config, rows, config.hidden_size)
        config.init_method(self.weight)

    def forward(self, x_sbm: Tensor) -> Tensor:
        return F.linear(x_sbm, replicated(self.weight, self.tp_group))


class RMSNorm(torch.nn.Module):
    """RMSNorm over the last axis with one weight that tensor-parallel ranks share.

    Serves as Megatron's layer norm (its torch one refuses sequence parallelism) and as the per-head norms.
    ``partial_gradient``: whether each rank sees only its own tokens or heads, so that gradients must be summed;
    by default under sequence parallelism.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        tp_group: torch.distributed.ProcessGroup | None = None,
        partial_gradient: bool | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.tp_group = tp_group or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"]).tp
        self.partial_gradient = config.sequence_parallel if partial_gradient is None else partial_gradient
        self.weight = new_parameter(config, hidden_size)
        torch.nn.init.ones_(self.weight)

    def used_weight(self) -> Tensor:
        """The weight, its gradient summed over tensor-parallel ranks where it must be."""
        return replicated(self.weight, self.tp_group) if self.partial_gradient else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.used_weight(), self.eps)
