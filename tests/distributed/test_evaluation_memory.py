# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The memory formula of evaluation against forward passes and generation that run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import torch

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape, teacher_card
from hydra_mcore.costs.evaluation_memory import Forward, fullest_rank, rank_memory
from hydra_mcore.evaluation.parallel import ParallelModel
from hydra_mcore.heads import HeadMap, HeadsByKind
from hydra_mcore.model.build import build_model
from tests.support.launch import model_parallel, run_ranks
from tools.tracked_memory import tracked_peak

LENGTH, ROOM, DEFAULT = 1024, 16, HydraOptions()
SHAPE = ModelShape(
    num_layers=2, hidden_size=96, num_heads=8, num_kv_groups=4, head_dim=16, ffn_hidden_size=160, vocab_size=512,
    native_length=256
)  # fmt: skip
TEACHER = teacher_card(SHAPE, fingerprint="")


def student(options: HydraOptions = DEFAULT, **others: Sequence[int]) -> ModelCard:
    """A layer of all kinds, and one of two FA heads, of different groups, and ``others``, by default GDN heads; ranks
    of TP 2 hold different numbers.
    """
    mixed = HeadsByKind(fa=[2], gdn=[0, 1], kda=[3, 4], lightning=[5, 6, 7])
    layer = HeadsByKind(fa=[0, 5], **others) if others else HeadsByKind.from_fa([0, 5], 8)
    return dataclasses.replace(TEACHER, head_map=HeadMap(8, 4, (mixed, layer)), options=options)


CARDS = {
    "teacher": TEACHER,
    "GDN": student(),
    "KDA": student(kda=[1, 2, 3, 4, 6, 7]),
    "Lightning": student(lightning=[1, 2, 3, 4, 6, 7]),
    "no convolution": student(
        HydraOptions(
            gdn_conv_kernel=0, kda_conv_kernel=0, lightning_gate="none", fa_gate="headwise", fa_position="rope"
        )
    ),
    "wide MLP": dataclasses.replace(TEACHER, shape=dataclasses.replace(SHAPE, ffn_hidden_size=1200)),
    "many words": dataclasses.replace(TEACHER, shape=dataclasses.replace(SHAPE, vocab_size=32_768)),
}
TP, CP, PP = {"tp_size": 2}, {"cp_size": 2}, {"pp_size": 2}
F32, BF16 = torch.float32, torch.bfloat16
CASES = [
    *(("teacher", BF16, layout, room) for layout, room in (({}, 0), (TP, 0), (CP, 0), (CP, ROOM))),
    ("GDN", BF16, {}, 0),
    ("KDA", BF16, TP, 0),
    ("GDN", BF16, CP, 0),
    ("Lightning", BF16, CP, 0),
    ("KDA", BF16, TP, ROOM),
    ("teacher", F32, {}, ROOM),
    ("Lightning", F32, PP, 0),
    ("no convolution", F32, {}, 0),
    ("wide MLP", BF16, TP, 0),
    ("many words", BF16, {}, 0),
]


@pytest.mark.parametrize(("name", "dtype", "layout", "room"), CASES, ids=str)
def test_a_model_needs_what_is_said(name: str, dtype: torch.dtype, layout: dict[str, int], room: int) -> None:
    run = Forward(length=LENGTH, room=room, value_bytes=dtype.itemsize, fused=False, **layout)
    places = list(
        itertools.product(range(run.pp_size), range(run.cp_size), range(run.tp_size))
    )  # as Megatron numbers ranks
    measured = run_ranks(_measured, len(places), CARDS[name], run, dtype)
    for (pp_rank, _, tp_rank), (weights, _) in zip(places, measured, strict=True):
        assert weights == rank_memory(CARDS[name], run, pp_rank, tp_rank).weights
    needed = fullest_rank(CARDS[name], run)
    peak = max(peak for _, peak in measured)
    assert peak == pytest.approx(needed.total - needed.weights, rel=0.1)


def _measured(rank: int, card: ModelCard, run: Forward, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a rank's weights, and of the tensors that evaluation makes at its fullest moment."""
    ids_bs = torch.randint(card.shape.vocab_size, (1, run.length), generator=torch.Generator().manual_seed(0))
    with model_parallel(tp=run.tp_size, pp=run.pp_size, cp=run.cp_size):
        model = ParallelModel([build_model(card, dtype=dtype).eval()])
        weights = sum(parameter.nbytes for chunk in model.chunks for parameter in chunk.parameters())
        with tracked_peak() as memory:
            if run.room:
                model.generated(ids_bs, run.room, frozenset())
            else:
                model.token_losses(ids_bs)
    return weights, memory.peak_bytes
