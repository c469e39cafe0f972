# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The cost formulas: bytes against what layers really send, attention work against counting pairs."""

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_mcore.config import HydraOptions, ModelShape
from hydra_mcore.costs.communication import (
    NOTHING_SENT,
    core_work,
    cp_bytes,
    imbalance,
    megatron_accepts,
    megatron_gdn_bytes,
    summed,
    total,
)
from hydra_mcore.heads import HeadLayout, HeadMap, HeadsByKind
from hydra_mcore.kinds.kind import Sent
from hydra_mcore.sequence import SequencePart
from tests.support.launch import model_parallel, run_ranks
from tests.support.traffic import sent_bytes
from tools.benchmark import main

HEADS, GROUPS, WIDTH, HEAD_DIM = 8, 4, 16, 4
SHAPE = ModelShape(
    num_layers=1, hidden_size=WIDTH, num_heads=HEADS, num_kv_groups=GROUPS, head_dim=HEAD_DIM, ffn_hidden_size=16,
    vocab_size=8,
    native_length=64,
)  # fmt: skip
LAYERS = [
    HeadsByKind(gdn=[0, 3], kda=[1, 2, 5], lightning=[4, 6, 7]),
    HeadsByKind(fa=[6], gdn=[0, 1, 2, 3, 4, 5, 7]),
    HeadsByKind(fa=[0, 1, 5], kda=[2, 3, 4, 6, 7]),
    HeadsByKind(fa=[0, 2, 3, 5, 7], lightning=[1, 4, 6]),
    HeadsByKind(fa=range(HEADS)),
]
OPTIONS = [
    HydraOptions(),
    HydraOptions(gdn_kv="per_group", gdn_conv_kernel=0, kda_conv_kernel=2, lightning_kv="per_group"),
    HydraOptions(
        gdn_kv="per_group", kda_kv="per_group", lightning_kv="per_group", qkv="shared", gdn_conv_kernel=1,
        kda_conv_kernel=0, fa_position="rope",
    ),
    HydraOptions(gdn_conv_kernel=3, gdn_qk_norm="none", fa_gate="none", fusion="none", lightning_position="nope"),
]  # fmt: skip
# Tokens a part, whether it is packed, type, recompute. One of them for each of the layers in turn, to save time.
INPUTS = [(6, False, torch.float32, False), (7, True, torch.bfloat16, False), (6, True, torch.float32, True)]


@pytest.mark.parametrize(("tp_size", "cp_size"), [(1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (2, 4)])
def test_a_layer_sends_what_is_said(tp_size: int, cp_size: int) -> None:
    run_ranks(_check_layers, tp_size * cp_size, tp_size, cp_size, timeout=280)


def _check_layers(rank: int, tp_size: int, cp_size: int) -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection

    with model_parallel(tp=tp_size, cp=cp_size):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        layers = itertools.product(LAYERS, OPTIONS, ("heads", "queries"))
        for (heads, options, balance), given_input in zip(layers, itertools.cycle(INPUTS), strict=False):
            part_length, packed, dtype, recompute = given_input
            length = part_length * cp_size
            documents = (0, 3, part_length, length - 1, length) if packed else None
            part = SequencePart(length, cp_size, groups.cp.rank(), documents)
            layer = _layer(heads, options, balance, dtype, recompute, groups)
            batch = 1 if packed else 2
            expected = cp_bytes(SHAPE, options, layer.layout, groups.tp.rank(), part, dtype.itemsize, batch)
            found = _run(layer, part, batch, dtype)
            assert found == _by_collective(expected, recompute), (heads, options, balance, given_input)


def _layer(
    heads: HeadsByKind, options: HydraOptions, balance: str, dtype: torch.dtype, recompute: bool, groups: Any
) -> torch.nn.Module:
    from hydra_mcore.model.attention_plan import AttentionPlan
    from hydra_mcore.model.build import transformer_config
    from hydra_mcore.model.hydra_attention import HydraAttention

    config = transformer_config(SHAPE, dtype)
    if recompute:
        config.recompute_granularity, config.recompute_modules = "selective", ["core_attn"]
    head_map = HeadMap(HEADS, GROUPS, (heads,))
    return HydraAttention(config, 1, AttentionPlan(head_map, options, log_scale=True, fa_balance=balance), groups)


def _run(layer: torch.nn.Module, part: SequencePart, batch: int, dtype: torch.dtype) -> tuple[Counter, Counter]:
    """Bytes sent forward and backward."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.packed_seq_params import PackedSeqParams

    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(part.documents)) if part.packed else None
    x = torch.randn(part.num_tokens, batch, WIDTH, dtype=dtype, requires_grad=True)
    with sent_bytes(layer.cp_group) as forward:
        out, _ = layer(x, rotary_pos_emb=RotaryEmbedding(HEAD_DIM, 1.0).get_emb(part.length), packed_seq_params=packed)
    with sent_bytes(layer.cp_group) as backward:
        out.sum().backward()
    return forward, backward


def _by_collective(expected: dict[str, dict[str, Sent]], recompute: bool) -> tuple[Counter, Counter]:
    """Bytes by what carries them, forward and backward: each purpose has its own collective."""
    sent = dict.fromkeys(("states", "halo", "keys and values", "queries"), NOTHING_SENT)
    for by_purpose in expected.values():
        sent |= {purpose: sent[purpose] + amount for purpose, amount in by_purpose.items()}
    gathered, exchanged = sent["states"] + sent["keys and values"], sent["halo"] + sent["queries"]
    forward = Counter(all_gather=gathered.forward, send=exchanged.forward)
    backward = Counter(reduce_scatter=gathered.backward, send=exchanged.backward)
    if recompute:
        backward["all_gather"] = sent["states"].forward
    return forward, backward


def test_bytes_worked_by_hand() -> None:
    """16 heads of 128, 8 groups, bf16, 4096 tokens on 4 ranks, FA heads 0, 1, 2 and 7: three groups."""
    layout = HeadLayout(HeadsByKind.from_fa([0, 1, 2, 7], 16), 8)
    shape = dataclasses.replace(SHAPE, num_heads=16, num_kv_groups=8, head_dim=128)
    parts = [SequencePart(4096, 4, rank) for rank in range(4)]
    for rank, part in enumerate(parts):
        layer = cp_bytes(shape, HydraOptions(), layout, 0, part, value_bytes=2, rows=1)
        states, keys_values, queries = 3 * 12 * 128 * 256 * 4, 3 * 1024 * 3 * 256 * 2, 2 * 512 * 4 * 128 * 2
        halo = Sent(3 * 12 * 384 * 2 * (rank < 3), 3 * 12 * 384 * 2 * (rank > 0))
        assert layer == {
            "fa": {"keys and values": Sent(keys_values, keys_values), "queries": Sent(queries, queries)},
            "gdn": {"states": Sent(states, states), "halo": halo},
        }
        assert summed(layer["gdn"]) == Sent(states, states) + halo
        assert total(layer).total == 2 * (states + keys_values + queries) + halo.total
    alone = cp_bytes(shape, HydraOptions(), layout, 0, SequencePart(4096), value_bytes=2, rows=1)
    assert total(alone) == NOTHING_SENT


@pytest.mark.parametrize(("tp_size", "cp_size"), [(1, 2), (1, 4), (2, 2)])
def test_megatron_sends_what_is_said(tp_size: int, cp_size: int) -> None:
    run_ranks(_check_megatron, tp_size * cp_size, tp_size, cp_size)


def _check_megatron(rank: int, tp_size: int, cp_size: int) -> None:
    """Megatron's own module, forward and backward."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    with model_parallel(tp=tp_size, cp=cp_size):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        for num_heads, dtype, batch in ((4, torch.float32, 2), (8, torch.bfloat16, 1)):
            layer = _megatron_gdn(num_heads, dtype, groups)
            part = SequencePart(16 * cp_size, cp_size, groups.cp.rank())
            x = torch.randn(part.num_tokens, batch, WIDTH, dtype=dtype, requires_grad=True)
            with sent_bytes(groups.cp) as forward:
                out, _ = layer(x, None)
            with sent_bytes(groups.cp) as backward:
                out.sum().backward()
            expected = megatron_gdn_bytes(num_heads, part, HEAD_DIM, dtype.itemsize, batch, tp_size)
            assert (forward, backward) == (Counter(all_to_all=expected.forward), Counter(all_to_all=expected.backward))


def _megatron_gdn(num_heads: int, dtype: torch.dtype, groups: Any) -> torch.nn.Module:
    """GatedDeltaNet in its deterministic mode, which is plain torch but for one L2 norm; it asks for FLA all the
    same.
    """
    from megatron.core.ssm.gated_delta_net import common
    from megatron.core.ssm.gated_delta_net.gdn import GatedDeltaNet
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from hydra_mcore.model.build import transformer_config
    from hydra_mcore.model.parameters import RMSNorm

    common.HAVE_FLA, common.l2norm = True, lambda x: F.normalize(x, dim=-1)  # in this rank's process only
    config = transformer_config(SHAPE, dtype)
    config.tensor_model_parallel_size, config.deterministic_mode = groups.tp.size(), True
    config.linear_num_key_heads = config.linear_num_value_heads = num_heads
    config.linear_key_head_dim = config.linear_value_head_dim = HEAD_DIM
    config.linear_conv_kernel_dim = 4
    parts = common.GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_norm=RMSNorm, out_proj=RowParallelLinear)
    return GatedDeltaNet(config, parts, layer_number=1, pg_collection=groups)


@pytest.mark.parametrize(
    ("num_heads", "tp_size", "cp_size"), [(12, 1, 4), (12, 1, 8), (12, 2, 4), (16, 2, 8), (16, 1, 32)]
)
def test_what_megatron_accepts(num_heads: int, tp_size: int, cp_size: int) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {"tensor_model_parallel_size": tp_size, "context_parallel_size": cp_size}
    heads = {"linear_num_key_heads": num_heads, "linear_num_value_heads": num_heads}
    dims = {
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
        "linear_conv_kernel_dim": 4,
        "linear_attention_freq": 1,
    }
    variant = {"experimental_attention_variant": "gated_delta_net"}
    accepted = True
    try:
        TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=32, **sizes, **heads, **dims, **variant)
    except AssertionError as error:
        accepted = False
        assert "must be a multiple of" in str(error)
    assert megatron_accepts(num_heads, tp_size, cp_size) is accepted


@st.composite
def layouts(draw: st.DrawFn, balance: st.SearchStrategy[str]) -> HeadLayout:
    heads, groups = draw(st.sampled_from([(8, 4), (16, 8), (16, 2), (6, 6)]))
    fa = draw(st.frozensets(st.integers(0, heads - 1)))
    tp_size = draw(st.sampled_from([size for size in (1, 2, 3, 4, 8) if heads % size == 0]))
    return HeadLayout(HeadsByKind.from_fa(fa, heads), groups, tp_size, draw(st.integers(0, 7)), draw(balance))


@given(layouts(st.sampled_from(["heads", "queries"])), st.sampled_from([1, 2, 3, 4]), st.integers(0, 70), st.data())
@settings(max_examples=200, deadline=None)
def test_no_attention_work_is_lost_or_done_twice(
    layout: HeadLayout, cp_size: int, part_length: int, data: st.DataObject
) -> None:
    length = (part_length + 1) * cp_size
    inner = data.draw(st.sets(st.integers(1, length - 1), max_size=6)) if length > 1 else ()
    bounds = (0, *sorted(inner), length)
    pairs = sum((end - start) * (end - start + 1) // 2 for start, end in itertools.pairwise(bounds))
    work = [core_work(layout, "fa", SequencePart(length, cp_size, rank, bounds)) for rank in range(cp_size)]
    assert sum(map(sum, work)) == pairs * len(layout.layer["fa"])
    assert all(len(of_rank) == layout.tp_size for of_rank in work)


@given(layouts(st.just("queries")), st.sampled_from([1, 2, 4]))
@settings(max_examples=200, deadline=None)
def test_shared_queries_balance_any_map(layout: HeadLayout, cp_size: int) -> None:
    for rank in range(cp_size):
        assert imbalance(layout, "fa", SequencePart(4096, cp_size, rank)) <= 1.05


def test_work_worked_by_hand() -> None:
    """Two FA heads on four ranks, eight tokens: whole heads on two of them, or two queries of each head on every
    rank.
    """
    layer, part = HeadsByKind.from_fa([0, 3], 8), SequencePart(8)
    assert core_work(HeadLayout(layer, 4, 4), "fa", part) == (36, 36, 0, 0)
    assert imbalance(HeadLayout(layer, 4, 4), "fa", part) == 2.0
    assert core_work(HeadLayout(layer, 4, 4, fa_balance="queries"), "fa", part) == (18, 18, 18, 18)
    assert imbalance(HeadLayout(HeadsByKind.from_fa([], 8), 4, 4), "fa", part) == 1.0


def test_recurrent_work_is_that_of_tokens() -> None:
    """The other six heads on four ranks: two on those without an FA head, one on each of the others."""
    layout, part = HeadLayout(HeadsByKind.from_fa([0, 3], 8), 4, 4), SequencePart(16, 2, 1)
    assert core_work(layout, "gdn", part) == (8, 8, 16, 16) and imbalance(layout, "gdn", part) == 4 / 3


def test_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.benchmarks.balance.RANDOM_MAPS", 2)
    main(["communication", "--cp", "2", "8", "--lengths", "4096", "--fa-heads", "4"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 3 and "(" not in rows[1] and "(" in rows[2]  # Megatron cannot divide 12 heads by 8
    HeadMap.from_fa([(0, 1)], 1, HEADS, GROUPS).save(tmp_path / "map.json")
    main(["balance", "--head-map", str(tmp_path / "map.json"), "--tp", "4", "--length", "512"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 1 + 3 + 1
    assert rows[1].endswith("map.json | 4 | 4.000 | 4.000 | 1.000 | 1.000 |")


def test_a_rank_alone_is_timed() -> None:
    from tools.benchmarks.balance import rank_rows

    rows = list(rank_rows({1: [0], 5: [0, 1, 2, 5, 7]}, dataclasses.replace(SHAPE, hidden_size=32), 4, 32, 1))
    assert [row[:2] for row in rows] == [[n, way] for n in (1, 5) for way in ("heads", "queries", "all by queries")]
    assert all(float(row[4]) >= 1.0 for row in rows) and rows[0][5] == "1.00"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["communication", "--fa-heads", "17"], "17 FA heads: choose 0 to 16"),
        (["communication", "--lengths", "1001"], "context parallel size 2 does not divide a sequence of 1001 tokens"),
        (["communication", "--cp", "0"], "0 is not above 0"),
        (["balance", "--head-map", "nowhere.json"], "head map nowhere.json: No such file"),
        (["balance", "--tp", "3"], "tensor parallel size 3 does not divide 16 query heads"),
        (["selection", "--models", "1x4"], "heads of a single layer have no heads to act through"),
        (["selection", "--length", "14"], "an answer of 7 tokens leaves no prompt in the second half"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(flags)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("benchmark") and message in last
