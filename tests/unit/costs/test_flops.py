# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Counted operations against those that real models run."""

import dataclasses
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape, StageOptions, teacher_card
from hydra_mcore.costs.flops import attention_block, one_head, step_flops
from hydra_mcore.heads import HeadMap, HeadsByKind
from hydra_mcore.kinds import KINDS
from hydra_mcore.kinds.full_attention import FULL_ATTENTION, causal_attention
from hydra_mcore.kinds.gated_delta import GATED_DELTA
from hydra_mcore.kinds.kimi_delta import KIMI_DELTA
from hydra_mcore.kinds.kind import product
from hydra_mcore.kinds.lightning import LIGHTNING
from hydra_mcore.kinds.recurrent import CHUNK
from hydra_mcore.model.build import build_model
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.train.data import MicroBatch
from hydra_mcore.train.step import forward_step

SHAPE = ModelShape(
    num_layers=4, hidden_size=24, num_heads=6, num_kv_groups=3, head_dim=8, ffn_hidden_size=20, vocab_size=96,
    native_length=256
)  # fmt: skip
# Layers of all kinds, without FA heads, without KDA heads, of FA heads alone.
HEAD_MAP = HeadMap(
    6,
    3,
    (
        HeadsByKind(fa=[1], gdn=[0, 2], kda=[3, 5], lightning=[4]),
        HeadsByKind(gdn=[0], kda=[1, 2, 4], lightning=[3, 5]),
        HeadsByKind(fa=[0, 2, 3], gdn=[4, 5], lightning=[1]),
        HeadsByKind(fa=range(6)),
    ),
)
OPTIONS = [
    HydraOptions(),
    HydraOptions(
        gdn_kv="per_group", fa_gate="headwise", gdn_gate="elementwise", gdn_conv_kernel=0, kda_kv="per_group",
        kda_conv_kernel=2, lightning_kv="per_group", lightning_gate="none",
    ),
    HydraOptions(
        gdn_kv="per_group", kda_kv="per_group", lightning_kv="per_group", qkv="shared", fa_gate="none",
        gdn_gate="headwise", kda_gate="elementwise", fusion="competition", gdn_conv_kernel=2, kda_conv_kernel=0,
    ),
]  # fmt: skip
LENGTH, ROWS = 150, 2  # three chunks, the last of them padded


@pytest.mark.parametrize("stage", ["align", "distill", "extend"])
@pytest.mark.parametrize("options", OPTIONS, ids=["default", "per_group", "shared"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_step_runs_the_products_that_are_counted(stage: str, options: HydraOptions, tied: bool) -> None:
    shape = dataclasses.replace(SHAPE, tied_embeddings=tied)
    card = ModelCard(shape=shape, head_map=HEAD_MAP, options=options, fingerprint="")
    with process_groups():
        measured = _measured(card, stage)
    assert measured == step_flops(card, stage, LENGTH, ROWS) + _not_as_counted(card, stage)


def _measured(card: ModelCard, stage: str) -> int:
    teacher = build_model(teacher_card(card.shape, ""), stage).requires_grad_(False)
    teacher.post_process = stage != "align"
    student = build_model(card, stage)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(stage != "align" or "self_attention." in name)
    tokens = torch.randint(card.shape.vocab_size, (ROWS, LENGTH))
    batch = MicroBatch(tokens, tokens, torch.ones(ROWS, LENGTH), torch.arange(LENGTH).expand(ROWS, -1), None)
    step = forward_step(StageOptions(stage=stage), lambda *_: batch, lambda: 1)
    step.prepare([student], [teacher] if stage != "extend" else [])
    known = {
        torch.ops.aten.linalg_solve_triangular: lambda a, b, *_, **__: a[-1] * math.prod(b),
        torch.ops.aten.addmm_: lambda _, a, b, *__, **___: 2 * math.prod(a) * b[-1],
        torch.ops.aten.baddbmm_: lambda _, a, b, *__, **___: 2 * math.prod(a) * b[-1],
    }
    with FlopCounterMode(display=False, custom_mapping=known) as counter, sdpa_kernel(SDPBackend.MATH):
        output, to_loss = step(None, student)
        to_loss(output)[0].backward()
    return counter.get_total_flops()


def _not_as_counted(card: ModelCard, stage: str) -> float:
    """What the run computes beyond the formula: attention without causality, and what backward makes anew.

    The convolution is elementwise here, and so are, in backward, products with an inner size of 1 or 2 between blocks
    of one row and of two (decays by channel); the counter does not see them.
    """
    d, tokens, rows = card.shape.head_dim, LENGTH * ROWS, -(-LENGTH // CHUNK) * CHUNK * ROWS
    heads = {kind: sum(len(layer[kind]) for layer in card.head_map.layers) for kind in KINDS}
    all_pairs, causal = causal_attention(d, 2 * LENGTH - 1), causal_attention(d, LENGTH)
    extra = heads["fa"] * tokens * (all_pairs.total - causal.total)
    extra += sum(heads.values()) * tokens * (all_pairs.forward - causal.forward) if stage != "extend" else 0.0
    # Of a row: its scores as query and as key, its write to the state.
    anew = {"gdn": 4 * CHUNK * d, "kda": 2 * (CHUNK - 1) * d - (2 + 2 + 4) * d, "lightning": 2 * CHUNK * d}
    extra += sum(heads[kind] * rows * (scores + 2 * d * d) for kind, scores in anew.items())
    taps = {"gdn": card.options.gdn_conv_kernel, "kda": card.options.kda_conv_kernel}
    return extra - sum(heads[kind] * tokens * product(3 * d, count).total for kind, count in taps.items())


def test_heads_of_qwen3() -> None:
    """By hand, of one head of Qwen3-1.7B (width 2048, d 128) at 16,384 tokens, forward."""
    shape = ModelShape(
        num_layers=28, hidden_size=2048, num_heads=16, num_kv_groups=8, head_dim=128, ffn_hidden_size=6144,
        vocab_size=151936,
        native_length=40960,
    )  # fmt: skip
    options, projection = HydraOptions(), 2 * 2048 * 128
    assert causal_attention(128, 16384).forward == 4 * 128 * 8192.5
    kinds = (FULL_ATTENTION, GATED_DELTA, KIMI_DELTA, LIGHTNING)
    fa, gdn, kda, lightning = (one_head(kind, shape, options, 16384) for kind in kinds)
    assert fa.forward == 3 * projection + 4 * 128 * 8192.5  # query, gate, output
    convolution, states, inverse = 2 * 4 * 384, 6 * 128 * 128, 64 * 64
    assert gdn.forward == 4 * projection + 2 * 2048 * 2 + convolution + 8 * 64 * 128 + states + inverse
    decays, scores = 2 * 128 * 128, 2 * 63 * 128  # each channel's, from the 128 values that all heads share
    assert kda.forward == 4 * projection + decays + 2 * 2048 + convolution + scores + 4 * 64 * 128 + states + inverse
    assert lightning.forward == 5 * projection + 4 * 64 * 128 + 4 * 128 * 128  # with a gate
    assert one_head(GATED_DELTA, shape, options, 1 << 20) == gdn
    # Heads 0, 1 and 5 read two of the kv groups; the KDA heads share one projection to 128 values.
    block = attention_block(
        shape, options, HeadsByKind(fa=[0, 1, 5], gdn=[2, 3], kda=range(6, 16), lightning=[4]), 16384
    )
    own = 3 * fa.forward + 2 * gdn.forward + 10 * kda.forward + lightning.forward
    assert block.forward == own + 2 * (2 * projection) + projection


def test_a_step_grows_with_its_rows_and_stages_differ() -> None:
    card = ModelCard(shape=SHAPE, head_map=HEAD_MAP, options=HydraOptions(), fingerprint="")
    assert step_flops(card, "extend", LENGTH, 3 * ROWS) == pytest.approx(
        3 * step_flops(card, "extend", LENGTH, ROWS), rel=1e-12
    )
    assert len({step_flops(card, stage, LENGTH, ROWS) for stage in ("align", "distill", "extend")}) == 3
