# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What the engine must be set to for a HydraHead model, and what it cannot do with one.

vLLM deals memory out in blocks of equal bytes. A block of full attention holds some tokens of all layers' living kv
groups; a block of recurrent states holds a page each of some layers. ``block_tokens`` makes both fill a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import vllm
from vllm.config import CompilationConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.utils.torch_utils import get_dtype_size

from vllm_hydra_head.export.configuration_hydra_head import HydraHeadConfig
from vllm_hydra_head.ranks import deal

if TYPE_CHECKING:
    from vllm.config import VllmConfig

VERSIONS = ("0.32.0",)  # of vLLM, tested
RECUR_OP, CONVOLVE_OP = "vllm::hydra_head_recur", "vllm::hydra_head_convolve"
BLOCK_MULTIPLE = 32  # tokens: what the CPU's kernels need, and a multiple of what those of GPUs do
PAGE_MULTIPLE = 256  # bytes
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)

States = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape, dtype


class ServingSettings(VerifyAndUpdateConfig):
    """vLLM calls it once, before anything is built."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Set the size of blocks, unless the user has.

        Raises:
            ValueError: another version of vLLM, or a feature that is not there; one line that names it.
        """
        check(vllm_config)
        cache, config = vllm_config.cache_config, vllm_config.model_config.hf_config
        if not cache.user_specified_block_size:
            views = deal(config, vllm_config.parallel_config.tensor_parallel_size)
            cache.block_size = block_tokens(views, vllm_config.model_config.dtype)
            cache.user_specified_block_size = True  # or the platform sets its own
        for operator in (RECUR_OP, CONVOLVE_OP):
            if operator not in CompilationConfig._attention_ops:  # where graphs are split
                CompilationConfig._attention_ops.append(operator)


def check(vllm_config: VllmConfig) -> None:
    """Raise ValueError for what cannot be served."""
    fits = ", ".join(VERSIONS)
    if vllm.__version__.partition("+")[0] not in VERSIONS:
        raise ValueError(f"HydraHead models are served by vLLM {fits}, this is {vllm.__version__}; install one of them")
    parallel = vllm_config.parallel_config
    unable = {
        "pipeline parallelism (--pipeline-parallel-size)": parallel.pipeline_parallel_size > 1,
        "context parallelism of decoding": parallel.decode_context_parallel_size > 1,
        "speculative decoding": vllm_config.speculative_config is not None,
        "LoRA": vllm_config.lora_config is not None,
        "quantized weights": vllm_config.quant_config is not None,
        "a quantized KV cache (--kv-cache-dtype)": vllm_config.cache_config.cache_dtype not in ("auto", "bfloat16"),
    }
    for what, asked in unable.items():
        if asked:
            raise ValueError(f"{what} is not there for HydraHead models; serve it without, or a copy on each GPU")


def states_of(config: HydraHeadConfig, kind: str, heads: int, dtype: torch.dtype) -> States:
    """What so many heads of a recurrent kind remember of one request."""
    d = config.head_dim
    states: States = {"recurrent": ((heads, d, d), torch.float32)}
    if taps := getattr(config, f"{kind}_conv_kernel", 0):
        states["conv"] = ((taps - 1, heads * 3 * d), dtype)
    return states


def layer_states(config: HydraHeadConfig, layer_idx: int, dtype: torch.dtype) -> dict[str, States]:
    """Of all recurrent kinds of a layer."""
    heads = config.heads[layer_idx]
    return {kind: states_of(config, kind, len(own), dtype) for kind, own in heads.items() if kind != "fa"}


def page_bytes(views: Sequence[HydraHeadConfig], dtype: torch.dtype) -> int:
    """One layer's states of one request: the most of any layer and rank, since all layers share one pool of blocks."""
    layers = (layer_states(view, layer_idx, dtype) for view in views for layer_idx in range(view.num_hidden_layers))
    return max((state_bytes(states) for states in layers), default=0)


def state_bytes(states: dict[str, States]) -> int:
    """Bytes of a layer's states, to the next multiple of ``PAGE_MULTIPLE``."""
    found = 0
    for of_kind in states.values():
        found += sum(math.prod(shape) * get_dtype_size(dtype) for shape, dtype in of_kind.values())
    return -(-found // PAGE_MULTIPLE) * PAGE_MULTIPLE


def living_groups(config: HydraHeadConfig, layer_idx: int) -> list[int]:
    """How many FA heads read each kv group that at least one reads."""
    return [count for count in config.heads_per_group(config.heads[layer_idx].get("fa", [])) if count]


def allotted_groups(views: Sequence[HydraHeadConfig], layer_idx: int) -> int:
    """Kv groups that every rank keeps of a layer: the most that any rank's heads read."""
    return max(len(living_groups(view, layer_idx)) for view in views)


def block_tokens(views: Sequence[HydraHeadConfig], dtype: torch.dtype) -> int:
    """Tokens of a block of full attention, so that a layer's states fill a block as well."""
    config = views[0]
    groups = sum(allotted_groups(views, layer_idx) for layer_idx in range(config.num_hidden_layers))
    token = groups * 2 * served_head_size(config.head_dim) * get_dtype_size(dtype)
    fitting = -(-page_bytes(views, dtype) // token) if token else 1
    return max(1, -(-fitting // BLOCK_MULTIPLE)) * BLOCK_MULTIPLE


def served_head_size(head_dim: int) -> int:
    """Of full attention in vLLM: the CPU's kernels take some sizes only, so smaller heads are padded with zeros."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return head_dim
    return min(size for size in CPU_HEAD_SIZES if size >= head_dim)
