# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What align trains on, against plain sums over layers and heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hydra_mcore.config import ConfigError, HydraOptions, StageOptions, teacher_card
from hydra_mcore.convert.inherit import inherit
from hydra_mcore.heads import HeadMap, HeadsByKind
from hydra_mcore.model.build import build_model
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.train.align import align_forward
from hydra_mcore.train.data import MicroBatch
from tests.support.teachers import SHAPE, VOCABULARY, random_teacher

LAYERS = (HeadsByKind(fa=[4], gdn=[1, 2], kda=[0], lightning=[3, 5]), HeadsByKind(gdn=range(6))) * 2
IDS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(8))


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    with process_groups():
        yield


def naive(teacher: torch.nn.Module, student: torch.nn.Module, weight: float) -> tuple[list[float], Tensor]:
    """The relative error of every layer, and the sum that is trained on."""
    layers, trained = [], torch.zeros((), dtype=torch.float64)
    calls, inputs, hooks = [], [], []
    for layer in teacher.decoder.layers:
        attention = layer.self_attention
        hooks += [
            attention.register_forward_pre_hook(lambda _, *given: inputs.append(given), with_kwargs=True),
            # A copy: Megatron adds to it in place.
            attention.linear_proj.register_forward_hook(lambda _, args, out: calls.append((args[0], out.clone()))),
        ]
    with torch.no_grad():
        teacher(IDS, torch.arange(IDS.shape[1]).expand_as(IDS), None)
    for hook in hooks:
        hook.remove()
    for layer, ((x_sbm,), keywords), (heads_sbn, out_sbm) in zip(student.decoder.layers, inputs, calls, strict=True):
        seen: list[Tensor] = []
        attention = layer.self_attention
        with attention.linear_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])):
            found_sbm = attention(x_sbm, rotary_pos_emb=keywords["rotary_pos_emb"])[0]
        rows = range(len(IDS))
        share = [(found_sbm[:, b] - out_sbm[:, b]).square().sum() / out_sbm[:, b].square().sum() for b in rows]
        layers.append(float(sum(share) / len(IDS)))
        trained = trained + sum(share) / len(IDS)
        own_sbhd, theirs_sbhd = (t.unflatten(-1, (6, -1)) for t in (seen[0], heads_sbn))
        for place, head_idx in enumerate(attention.layout.layer.heads):
            for b in rows:
                own, theirs = own_sbhd[:, b, place], theirs_sbhd[:, b, head_idx]
                trained = trained + weight * (own - theirs).square().sum() / theirs.square().sum() / (6 * len(IDS))
    return layers, trained


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_losses_and_gradients(weight: float) -> None:
    """Reported is what layers leave; gradients are those of the sum with the heads."""
    teacher = random_teacher(dtype=torch.float64)
    card = dataclasses.replace(
        teacher_card(SHAPE, "0" * 64), head_map=HeadMap(6, 2, LAYERS), options=HydraOptions(), stage="student"
    )
    student = build_model(card, stage="align", dtype=torch.float64)
    inherit(teacher, student, SHAPE)
    batch = MicroBatch(tokens_bs=IDS, position_ids_bs=torch.arange(IDS.shape[1]).expand_as(IDS))
    _, losses = align_forward(teacher, student, batch, StageOptions(align_heads=weight))
    losses.sum().backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    layers, trained = naive(teacher, student, weight)
    trained.backward()
    assert losses.tolist() == pytest.approx(layers, rel=1e-6)
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():  # losses sum in float32
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_heads_that_ranks_share_have_no_error_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"align_heads is 0\.5, but with fa_balance queries"):
        StageOptions(align_heads=0.5, fa_balance="queries")
    with pytest.raises(ConfigError, match="align_heads is -1"):
        StageOptions(align_heads=-1)
