# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A fitted student computes what the closed form says, and is nearer to its teacher than the inherited one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_mcore.config import HydraOptions, teacher_card
from hydra_mcore.convert import fitted_start
from hydra_mcore.convert.fitted_start import fit_start
from hydra_mcore.convert.inherit import inherit
from hydra_mcore.heads import HeadMap, HeadsByKind
from hydra_mcore.model.build import build_model
from hydra_mcore.model.imitation import READS, Imitation, Memory, Split, Task, imitate
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.sequence import SequencePart
from tests.support.teachers import SHAPE, VOCABULARY, random_teacher

IDS = torch.randint(VOCABULARY, (8, 40), generator=torch.Generator().manual_seed(7))
MIXED = HeadsByKind(fa=[4], gdn=[1, 2], kda=[0], lightning=[3, 5])
ALL_GDN, ALL_FA = HeadsByKind(gdn=range(6)), HeadsByKind(fa=range(6))
BIASED = dataclasses.replace(SHAPE, qkv_bias=True, qk_norm=False)


@pytest.fixture(scope="module", autouse=True)
def groups(tiny_teacher: Path) -> Iterator[None]:  # it is imported first, within groups of its own
    with process_groups():
        yield


def pair(shape: Any = SHAPE, **options: Any) -> tuple:
    """A float64 teacher, and a student that has inherited from it."""
    head_map = HeadMap(shape.num_heads, shape.num_kv_groups, (MIXED, ALL_GDN, ALL_FA, MIXED))
    card = teacher_card(shape, "0" * 64)
    card = dataclasses.replace(card, head_map=head_map, options=HydraOptions(**options), stage="student")
    teacher = random_teacher(shape, torch.float64)
    student = build_model(card, dtype=torch.float64).eval()
    inherit(teacher, student, shape)
    return teacher, student


def weights(student: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in student.named_parameters()}


@pytest.mark.parametrize(
    ("shape", "options"),
    [(SHAPE, {}), (BIASED, {"gdn_write_max": 2.0, "gdn_conv_kernel": 0, "lightning_position": "nope"})],
    ids=["norms", "biases"],
)
@torch.no_grad()
def test_heads_compute_what_the_closed_form_says(
    shape: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates and values of every head of every linear kind, before fusion."""
    tried: list[tuple[str, Task, Tensor, Imitation]] = []

    def recording(kind: str, task: Task, x_bsm: Tensor, split: Split, memories: list) -> Imitation:
        found = imitate(kind, task, x_bsm, split, memories)
        tried.append((kind, task, x_bsm, found))
        return found

    monkeypatch.setattr(fitted_start, "imitate", recording)
    teacher, student = pair(shape, **options)
    layers: list[Any] = []
    fitted_start._watch(teacher, IDS, layers.append)
    for own, layer in zip(student.decoder.layers, layers, strict=True):
        attention = own.self_attention
        fitted_start._fit_layer(attention, layer, Split.of(len(IDS)), {})
        for kind, branch in attention.branches.items():
            outputs = branch(layer.x_sbm, SequencePart(len(layer.x_sbm)), layer.rotary).own[0]
            scale = shape.head_dim**-0.5  # of the recurrences, which a fit leaves to fusion
            for place in range(outputs.shape[2] if kind in READS else 0):
                same_kind, task, x_bsm, found = tried.pop(0)
                assert same_kind == kind
                start_bsd, features_bsm = (
                    READS[kind][0](found.memory, task.q_bsd, task.k_bsd, values) for values in (task.v_bsd, x_bsm)
                )
                expected_bsd = scale * (found.scale * start_bsd + features_bsm @ found.change_md)
                torch.testing.assert_close(outputs[:, :, place].transpose(0, 1), expected_bsd, rtol=1e-9, atol=1e-10)
    assert not tried


@pytest.mark.parametrize(
    "options",
    [{}, {"fusion": "norm", "gdn_kv": "per_group"}, {"qkv": "shared", "fusion": "competition", "gdn_position": "nope"}],
    ids=["default", "per group", "shared"],
)
def test_every_layer_comes_nearer_to_its_teacher(options: dict[str, Any]) -> None:
    teacher, student = pair(**options)
    before = weights(student)
    fits = fit_start(teacher, student, IDS)
    assert len(fits) == 4 and all(fit.fitted < 0.9 * fit.inherited for fit in fits)
    changed = {
        name.split("self_attention.")[1] for name, value in weights(student).items() if (value != before[name]).any()
    }
    assert changed >= {"linear_proj.weight"} and all(".self_attention." in name for name in before if name in changed)
    heads_own_values = {"gdn.linear_kv.weight", "gdn.linear_decay.bias"} <= changed
    assert heads_own_values == (not options) and ("fusion.scale.weight" in changed) == (options.get("fusion") != "norm")
    keys = "layers.1.self_attention.gdn.linear_kv.weight"
    if not options:  # keys stay as they were
        was, now = (next(v for n, v in w.items() if n.endswith(keys)) for w in (before, weights(student)))
        was, now = (t.unflatten(0, (6, 2, -1)) for t in (was, now))
        assert torch.equal(was[:, 0], now[:, 0]) and (was[:, 1] != now[:, 1]).any()


def test_heads_start_with_the_memories_that_are_known() -> None:
    """Each its own, in Hugging Face order; Lightning, whose slopes are fixed, starts as it must."""
    half_lives, known = [8.0, 64.0, 512.0, 8.0, 64.0, 512.0], {}
    known["gdn"] = [[Memory(half_life, 0.5, half_life) for half_life in half_lives]] * 4
    known["lightning"] = [[Memory(1.0, 1.0, 1.0)] * 6] * 4
    teacher, student = pair()
    fit_start(teacher, student, IDS, known)
    gdn = student.decoder.layers[0].self_attention.branches["gdn"]
    rates_h, own_h = F.softplus(gdn.linear_decay.bias), torch.tensor([half_lives[h] for h in MIXED["gdn"]])
    torch.testing.assert_close(rates_h, math.log(2) / own_h.double())
    _, free = pair()
    fit_start(teacher, free, IDS, {"lightning": known["lightning"]})
    own, other = (s.decoder.layers[0].self_attention.branches for s in (student, free))
    assert torch.equal(own["lightning"].linear_kv.weight, other["lightning"].linear_kv.weight)
    assert not torch.equal(own["gdn"].linear_decay.bias, other["gdn"].linear_decay.bias)


@torch.no_grad()
def test_no_other_scale_is_nearer_on_the_rows_of_the_fit() -> None:
    teacher, student = pair()
    layers: list[Any] = []
    fitted_start._watch(teacher, IDS, layers.append)
    attention, split = student.decoder.layers[0].self_attention, Split.of(len(IDS))
    fitted_start._fit_scales(attention, layers[0], split)
    found = fitted_start._mixed(attention, layers[0])[0].unflatten(-1, (6, -1))[:, split.fit]
    wanted = layers[0].heads_sbhd[:, split.fit, list(attention.layout.layer.heads)]
    slope_h = (found * (wanted - found)).sum(dim=(0, 1, 3)) / found.square().sum(dim=(0, 1, 3))
    torch.testing.assert_close(slope_h, torch.zeros_like(slope_h), rtol=0, atol=1e-12)
