# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What DistributedOptimizer gets wrong when it is saved and resumed.

Megatron-Core takes Adam from Transformer Engine, else from Apex, else from torch.  A run that was saved with one goes
on with another.  They compute the same update, but they count its steps in different places:

============================  ===================================  =======================================
Adam                          its step count                       a rank without trainable parameters
============================  ===================================  =======================================
torch's                       a float32 tensor for each parameter  has none
Apex's                        an int in each group of parameters   has none, nor has an empty group
Transformer Engine's (2.19)   an int in each group of parameters   counts
============================  ===================================  =======================================

In a checkpoint the count is a number in each group, with all of them.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hydra_mcore.compat.patching import Patch
from hydra_mcore.errors import InputError

_MODULE = "megatron.core.optimizer.distrib_optimizer"
_SCHEDULE = ("max_lr", "min_lr", "start_wd", "end_wd")  # of a group, what settings may change between two starts
_STATE = ("params", "step", "lr", "weight_decay")  # of a group, what is no setting; the scheduler sets the last two


def _owned(optimizer: Any) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Return the (group, main parameter shard) pairs that this rank updates."""
    owned = []
    for group in optimizer.param_groups:
        owned += [(group, shard) for shard in group["params"]]
    return owned


def _groups_count() -> bool:
    """Tell whether Megatron-Core took an Adam that counts steps in its groups: Transformer Engine's or Apex's."""
    from megatron.core.optimizer import distrib_optimizer

    return distrib_optimizer.HAVE_APEX_OR_TE


def _make_state_dict(original: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    @functools.wraps(original)
    def state_dict(self: Any) -> dict[str, Any]:
        """The original, also before the first step and on a rank that owns no trainable parameter."""
        inner = self.optimizer
        if inner.state:
            return original(self)
        for group, shard in _owned(inner):
            # What Adam itself creates at its first step: zeros, and torch's a step count on the CPU unless the kernel
            # wants it on the device.
            inner.state[shard] = {key: torch.zeros_like(shard) for key in self.optimizer_state_keys}
            if not _groups_count():
                on_device = group.get("capturable") or group.get("fused")
                inner.state[shard]["step"] = torch.zeros((), device=shard.device if on_device else "cpu")
        if inner.state or _groups_count():
            return original(self)
        groups = [{k: v for k, v in group.items() if k != "params"} for group in inner.state_dict()["param_groups"]]
        for group in groups:
            group.setdefault("step", 0.0)
        result: dict[str, Any] = {"optimizer": {"param_groups": groups}}
        if self.grad_scaler:
            result["grad_scaler"] = self.grad_scaler.state_dict()
        return result

    return state_dict


def _groups_of_now(saved: list[dict[str, Any]], current: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The current groups with the state of the saved group that holds the same kind of parameters.

    Settings are those of now: another Adam has other ones, and another command line other values.

    Raises:
        InputError: a current group that no saved one corresponds to.
    """
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    kinds = [key for key in param_group_identifier_keys if key not in _SCHEDULE]
    by_kind = {tuple(group.get(key) for key in kinds): group for group in saved}
    merged = []
    for group in current:
        if (found := by_kind.get(tuple(group.get(key) for key in kinds))) is None:
            raise InputError(
                "the checkpoint's optimizer has other groups of parameters (a decoupled learning rate, other exceptions"
                " from weight decay); set those flags as they were, or add no-load-optim to begin with fresh moments"
            )
        settings = {key: value for key, value in group.items() if key not in _STATE}
        state = {key: found[key] for key in _STATE if key in found}
        # Whoever saved before its first step may have no count yet. Kernels want an int, and torch takes one too.
        merged.append(settings | state | {"step": int(found.get("step", 0))})
    return merged


def _make_load_state_dict(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Mapping[str, Any]) -> None:
        """The original with the settings of now, then a step count of its own for every parameter."""
        inner = state_dict["optimizer"]
        groups = _groups_of_now(inner["param_groups"], self.optimizer.param_groups)
        original(self, {**state_dict, "optimizer": {**inner, "param_groups": groups}})
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    return load_state_dict


def _make_set_states(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    @torch.no_grad()
    def set_main_param_and_optimizer_states(self: Any, model_param: torch.Tensor, tensors: Mapping[str, Any]) -> None:
        """The original without autograd; None is what it skips, so the step that load_state_dict() set stays."""
        original(self, model_param, {**tensors, "step": None})

    return set_main_param_and_optimizer_states


def _make_step(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    @functools.wraps(original)
    def step_with_ready_grads(self: Any) -> bool:
        """The original, counting steps on a rank that owns no trainable parameter, for its state_dict()."""
        if self.is_stub_optimizer or _owned(self.optimizer):
            return original(self)
        groups = self.optimizer.param_groups
        before = [group.get("step", 0) for group in groups]
        successful = original(self)
        for group, count in zip(groups, before, strict=True):
            if successful and group.get("step", 0) == count:  # Transformer Engine's counted by itself
                group["step"] = count + 1
        return successful

    return step_with_ready_grads


def _unpadded_places(buffer: Any) -> dict[torch.Tensor, tuple[int, int, int]]:
    """Where each parameter stands once the padding behind every bucket is taken out: (start, end, bucket)."""
    filled = list(itertools.accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0))
    places = {}
    for parameter, (start, end, bucket) in buffer.param_index_map.items():
        shift = filled[bucket] - buffer.bucket_indices[bucket][0]
        places[parameter] = (start + shift, end + shift, bucket)
    return places


def _make_fully_reshardable(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sharded_param_state_fully_reshardable(self: Any, *args: Any, **keywords: Any) -> Any:
        """The original, looking for each parameter where the gathered state has it."""
        padded = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = _unpadded_places(buffer)
            return original(self, *args, **keywords)
        finally:
            for buffer, places in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = places

    return sharded_param_state_fully_reshardable


PATCHES = (
    Patch(
        target=f"{_MODULE}:DistributedOptimizer.sharded_param_state_fully_reshardable",
        caller=f"{_MODULE}:DistributedOptimizer.sharded_param_state_fully_reshardable",
        marker="this is a bug in the param ranges",
        reason=(
            "The gathered state has no padding between buckets, but is cut at padded places: from the second bucket on"
            " (tied embeddings in a pipeline, overlapped gradient reduction), parameters are saved shifted and the last"
            " one is cut."
        ),
        make=_make_fully_reshardable,
    ),
    Patch(
        target=f"{_MODULE}:DistributedOptimizer.load_state_dict",
        caller=f"{_MODULE}:DistributedOptimizer.load_state_dict",
        marker="{**param_groups_map[needed_groups], \"params\": inner_param_group['params']}",
        reason=(
            "Groups are told apart by their learning rate, so a run with another one finds none (KeyError); betas and"
            " eps of the command line are dropped without a word, and so are the settings that another Adam has. Its"
            " step count is handed on as it is, but kernels refuse a float. And on torch's AdamW every parameter gets"
            " the same step tensor, which AdamW increments once a parameter, so the bias correction of a resumed run is"
            " wrong."
        ),
        make=_make_load_state_dict,
    ),
    Patch(
        target=f"{_MODULE}:DistributedOptimizer.state_dict",
        caller=f"{_MODULE}:DistributedOptimizer.sharded_state_dict",
        marker="self.load_state_dict(self.state_dict())",
        reason=(
            "On torch's AdamW asserts that one step count exists: fails on load, before any state exists, and on save "
            "on a rank that owns no trainable parameter (a frozen pipeline stage, a tiny shard). With any Adam there "
            "are no moments to save before the first step."
        ),
        make=_make_state_dict,
    ),
    Patch(
        target=f"{_MODULE}:DistributedOptimizer._set_main_param_and_optimizer_states",
        caller=f"{_MODULE}:DistributedOptimizer._set_main_param_and_optimizer_states",
        marker="dst_tensors[key].copy_(tensors[key])",
        reason=(
            "Copies in place outside no_grad (fails on fp32 parameters), raises KeyError('step') on the "
            "fully_reshardable format, and on dp_reshardable overwrites the loaded step with the fresh one."
        ),
        make=_make_set_states,
    ),
    Patch(
        target=f"{_MODULE}:DistributedOptimizer.step_with_ready_grads",
        caller=f"{_MODULE}:DistributedOptimizer.state_dict",
        marker='param_group["step"] = step',
        reason=(
            "torch's AdamW counts for parameters only, and Apex's for groups that have some. Rank 0's count is what "
            "all ranks load, so a rank 0 that owns no trainable parameter has to count as well."
        ),
        make=_make_step,
    ),
)
