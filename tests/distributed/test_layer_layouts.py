# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The layer on many ranks against the same layer on one: random head maps, lengths, document boundaries and options."""

import copy
import dataclasses
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydra_mcore.config import HydraOptions, ModelShape
from hydra_mcore.heads import HeadMap, HeadsByKind
from hydra_mcore.kinds import FA, KINDS
from tests.support.launch import model_parallel, run_ranks

HEADS, GROUPS, WIDTH, CASES = 8, 4, 16, 50
SHAPE = ModelShape(
    num_layers=1, hidden_size=WIDTH, num_heads=HEADS, num_kv_groups=GROUPS, head_dim=4, ffn_hidden_size=16,
    vocab_size=8,
    native_length=64, norm_epsilon=1e-2,
)  # fmt: skip
SHAPES = [SHAPE, dataclasses.replace(SHAPE, qkv_bias=True, qk_norm=False)]  # Qwen3's attention, Qwen2's
# Everything is float64 but for the positions' log scale, which is the same on all ranks.
TOLERANCE = {"output": 1e-12, "input": 1e-12, "parameters": 1e-10}
OPTIONS = [
    HydraOptions(fa_log_scale_base=5.0, gdn_half_life=10.0, kda_half_life=5.0),
    HydraOptions(
        qkv="shared",
        fusion="competition",
        gdn_gate="headwise",
        fa_position="rope",
        kda_qk_norm="none",
        kda_conv_kernel=0,
        kda_gate="elementwise",
        lightning_qk_norm="none",
        lightning_gate="none",
        lightning_position="nope",
    ),
    HydraOptions(
        gdn_kv="per_group",
        fusion="norm",
        gdn_conv_kernel=2,
        fa_gate="none",
        gdn_write_max=2.0,
        kda_kv="per_group",
        kda_conv_activation="silu",
        kda_write_max=2.0,
        kda_position="nope",
        lightning_kv="per_group",
        lightning_gate="headwise",
        lightning_slope=0.3,
    ),
]


# All ranks draw the same.
ALIKE = partial(settings, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer and its input: the shape, each head's kind, the options, tokens for each of four parts, inner document
    boundaries.
    """

    shape: ModelShape
    kinds: tuple[str, ...]
    options: HydraOptions
    part_length: int
    documents: tuple[int, ...] | None
    layer_idx: int
    fa_balance: str
    recompute: bool
    sequence_parallel: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    part_length = (
        draw(st.sampled_from([4, 5, 8, 70])) * 2
    )  # four tensor-parallel ranks share a part under sequence parallelism
    documents = None
    if draw(st.booleans()):
        length = 4 * part_length
        near_borders = [
            border + shift for border in (0, part_length, 2 * part_length, 64, 128, length) for shift in (-1, 0, 1)
        ]
        bounds = draw(st.sets(st.sampled_from(near_borders) | st.integers(1, length - 1), max_size=8))
        documents = (0, *sorted(bound for bound in bounds if 0 < bound < length), length)
    return Case(
        shape=draw(st.sampled_from(SHAPES)),
        kinds=draw(st.tuples(*[st.sampled_from(list(KINDS))] * HEADS)),
        options=draw(st.sampled_from(OPTIONS)),
        part_length=part_length,
        documents=documents,
        layer_idx=draw(st.integers(0, 3)),
        fa_balance=draw(st.sampled_from(["heads", "queries"])),
        recompute=draw(st.booleans()),
        sequence_parallel=draw(st.booleans()),
    )


@pytest.mark.parametrize(("tp_size", "cp_size"), [(1, 4), (2, 2), (4, 1)])
def test_random_layers_are_the_same_on_four_ranks(tp_size: int, cp_size: int) -> None:
    ran = run_ranks(_check_cases, 4, tp_size, cp_size, timeout=280)
    assert min(ran) >= CASES


def _check_cases(rank: int, tp_size: int, cp_size: int) -> int:
    """Every rank draws the same cases; a difference anywhere is a failure everywhere, so that all shrink alike."""
    ran = []

    @ALIKE(max_examples=CASES)
    @given(cases())
    def check(case: Case) -> None:
        ran.append(case)
        worst = torch.tensor(list(_differences(case, *groups).values()))
        torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
        found = dict(zip(TOLERANCE, worst.tolist(), strict=True))
        assert all(found[name] < TOLERANCE[name] for name in TOLERANCE), found

    with model_parallel(tp=tp_size, cp=cp_size):
        groups = _groups()
        check()
    return len(ran)


def _differences(case: Case, groups: Any, one_rank: Any) -> dict[str, float]:
    """RMS ratios of output, input gradient and every parameter's gradient, this rank's against the whole layer's."""
    tp_size, tp_rank, cp_size, cp_rank = groups.tp.size(), groups.tp.rank(), groups.cp.size(), groups.cp.rank()
    whole = _build(case, one_rank, False, False)
    parallel = _build(case, groups, case.sequence_parallel and tp_size > 1, case.recompute)
    _load(parallel, _blocks(whole, "data"))

    length, batch = 4 * case.part_length, 1 if case.documents else 2
    generator = torch.Generator().manual_seed(case.kinds.count(FA))
    x, weight = (torch.randn(length, batch, WIDTH, dtype=torch.float64, generator=generator) for _ in range(2))
    tokens = slice(cp_rank * length // cp_size, (cp_rank + 1) * length // cp_size)
    if case.sequence_parallel:
        size = (tokens.stop - tokens.start) // tp_size
        tokens = slice(tokens.start + tp_rank * size, tokens.start + (tp_rank + 1) * size)
    bounds = case.documents or (0, length)  # the reference sees every document alone, so it needs no packing
    alone = [_run(whole, x[start:end], weight[start:end], None) for start, end in itertools.pairwise(bounds)]
    out, gradient = (torch.cat(tensors) for tensors in zip(*alone, strict=True))
    found, found_gradient = _run(parallel, x[tokens], weight[tokens], case.documents)
    if tp_size > 1 and not case.sequence_parallel:
        assert found.shape == out[tokens].shape
    differences = {"output": _ratio(found, out[tokens]), "input": _ratio(found_gradient, gradient[tokens])}
    expected = _blocks(whole, "grad")
    for parameter in parallel.parameters():
        torch.distributed.all_reduce(parameter.grad, group=groups.cp)
    scale = max(block.square().mean().sqrt().item() for block in expected.values())
    blocks = _blocks(parallel, "grad")
    differences["parameters"] = max(
        (_ratio(block, expected[key], 1e-3 * scale) for key, block in blocks.items()), default=0.0
    )
    return differences


def _groups() -> tuple[Any, Any]:
    """Megatron's process groups, and those of a layer that is alone on this rank."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    alone = copy.copy(groups)
    for rank in range(torch.distributed.get_world_size()):
        group = torch.distributed.new_group([rank])
        if rank == torch.distributed.get_rank():
            alone.tp = alone.cp = group
    return groups, alone


def _build(
    case: Case,
    groups: Any,
    sequence_parallel: bool,
    recompute: bool,
    dtype: torch.dtype = torch.float64,
    implementation: str = "local",
) -> torch.nn.Module:
    from hydra_mcore.model.attention_plan import AttentionPlan
    from hydra_mcore.model.build import transformer_config
    from hydra_mcore.model.hydra_attention import HydraAttention

    config = transformer_config(case.shape, dtype)
    config.sequence_parallel, config.transformer_impl = sequence_parallel, implementation
    if recompute:
        config.recompute_granularity, config.recompute_modules = "selective", ["core_attn"]
    of_kind = {kind: [head for head in range(HEADS) if case.kinds[head] == kind] for kind in KINDS}
    head_map = HeadMap(num_heads=HEADS, num_kv_groups=GROUPS, layers=(HeadsByKind(**of_kind),) * 4)
    torch.manual_seed(1)
    plan = AttentionPlan(head_map, case.options, log_scale=True, fa_balance=case.fa_balance)
    layer = HydraAttention(config, case.layer_idx + 1, plan, groups)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
    return layer


def _factories(layer: torch.nn.Module) -> dict:
    from megatron.core.transformer.utils import sharded_state_dict_default

    return {
        name: factory
        for prefix, module in layer.named_children()
        for name, factory in sharded_state_dict_default(
            module, prefix + ".", (), {"dp_cp_group": torch.distributed.group.WORLD}
        ).items()
    }


def _blocks(layer: torch.nn.Module, of: str) -> dict[tuple, torch.Tensor]:
    """Values or gradients by checkpoint key and place: what a layout must not change."""
    blocks, parameters = {}, dict(layer.named_parameters())
    for name, factory in _factories(layer).items():
        if name in parameters:
            factory.data = getattr(parameters[name], of)
            for shard in factory.build() if hasattr(factory, "build") else [factory]:
                blocks[shard.key, shard.global_offset] = shard.data.detach().clone()
    return blocks


def _load(layer: torch.nn.Module, blocks: dict[tuple, torch.Tensor]) -> None:
    parameters = dict(layer.named_parameters())
    for name, factory in _factories(layer).items():
        if name in parameters:
            if hasattr(factory, "build"):
                value = factory.merge_fn([blocks[shard.key, shard.global_offset] for shard in factory.build()])
            else:
                value = blocks[factory.key, factory.global_offset]
            parameters[name].data.copy_(value)


def _run(layer: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor, documents: tuple[int, ...] | None) -> tuple:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.packed_seq_params import PackedSeqParams

    x = x.clone().requires_grad_()
    packed = None if documents is None else PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(documents))
    rotary = RotaryEmbedding(SHAPE.head_dim, 1.0).get_emb(4 * 140)
    tokens = x.shape[0] * (layer.tp_group.size() if layer.config.sequence_parallel else 1) * layer.cp_group.size()
    out, _ = layer(x, rotary_pos_emb=rotary[:tokens], packed_seq_params=packed)
    (out * weight).sum().backward()
    return out.detach(), x.grad


def _ratio(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    difference = (found - expected).square().mean().sqrt()
    return (difference / expected.square().mean().sqrt().clamp(min=max(floor, 1e-12))).item()
