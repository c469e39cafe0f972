# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What each head of a teacher is imitated from, and a run that goes on where it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hydra_mcore.errors import InputError
from hydra_mcore.model.imitation import Split, imitate
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.ruler.haystack import Haystack, read_text
from hydra_mcore.ruler.material import PromptMaterial
from hydra_mcore.ruler.wording import own_wording
from hydra_mcore.selection.replaceability import TABLES, head_inputs, replaceability, rows_to_imitate
from hydra_mcore.selection.scoring import Scoring
from hydra_mcore.selection.teacher import Teacher
from hydra_mcore.tokenizer import load_tokenizer
from tests.support.teachers import SHAPE, VOCABULARY, random_teacher

same = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
IDS = torch.randint(VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module", autouse=True)
def groups(tiny_teacher: Path) -> Iterator[None]:  # it is imported first, within groups of its own
    with process_groups():
        yield


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_head_s_parts_belong_together(bias: bool) -> None:
    """Values are a projection of the input; softmax attention of queries, keys and values is what the head hands on."""
    teacher = Teacher(random_teacher(dataclasses.replace(SHAPE, qkv_bias=bias, qk_norm=not bias)))
    hidden_sbm = teacher.run(IDS, slice(-1, None), slice(None)).residual_sbm[2]
    inputs = head_inputs(teacher, 2, hidden_sbm)
    x_bsm, tasks = inputs.x_bsm, inputs.tasks()
    branch, seen = teacher.layers[2].self_attention.fa, []
    linear_kv = branch.linear_kv
    weight_gdm = linear_kv.weight.unflatten(0, (SHAPE.num_kv_groups, -1))
    if bias:
        weight_gdm = torch.cat([weight_gdm, linear_kv.bias.view(SHAPE.num_kv_groups, -1, 1)], dim=-1)
    with branch.core_attention.register_forward_pre_hook(lambda _, args: seen.extend(args[1:3])):
        out_sbhd = teacher.run(IDS, slice(-1, None), slice(None)).heads_sbhd[2]
    for index, task in enumerate(tasks):
        values_dm = weight_gdm[index * SHAPE.num_kv_groups // SHAPE.num_heads, SHAPE.head_dim :]
        same(task.v_bsd, x_bsm @ values_dm.T)
        q_bsd, k_bsd = (t[:, :, index].transpose(0, 1) for t in seen)
        same(F.scaled_dot_product_attention(q_bsd, k_bsd, task.v_bsd, is_causal=True), task.out_bsd)
        same(task.out_bsd, out_sbhd[:, :, index].transpose(0, 1))
        same(task.q_bsd * q_bsd.norm(dim=-1, keepdim=True), q_bsd)
        same(task.k_bsd * k_bsd.norm(dim=-1, keepdim=True), k_bsd)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every head has its own best imitation; what is in the journal is not fitted again."""
    scoring = Scoring(Teacher(random_teacher()), {}, tmp_path, {"this": "run"})
    found = replaceability(scoring, IDS, ["gdn", "lightning"])
    with torch.no_grad():
        hidden_sbm = scoring.teacher.run(IDS, slice(-1, None), slice(None)).residual_sbm[3]
        inputs = head_inputs(scoring.teacher, 3, hidden_sbm)
        for kind, tables in found.items():
            best = imitate(kind, inputs.tasks()[4], inputs.x_bsm, Split.of(len(IDS)))
            expected = (best.residual, best.inherited, best.memory.half_life, best.memory.fastest, best.memory.write)
            np.testing.assert_allclose([vars(tables)[name][3, 4] for name in TABLES], expected, rtol=1e-6)
            assert tables.residual.shape == (4, 6) and (tables.residual > 0).all()
    journal = tmp_path / "replica0.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 4
    journal.write_text("".join(lines[:3]))  # two of four layers are done
    seen = []
    monkeypatch.setattr(
        "hydra_mcore.selection.replaceability.head_inputs",
        lambda teacher, layer_idx, hidden: seen.append(layer_idx) or head_inputs(teacher, layer_idx, hidden),
    )
    again = replaceability(Scoring(scoring.teacher, {}, tmp_path, {"this": "run"}), IDS, ["gdn", "lightning"])
    assert seen == [2, 3]
    for kind, tables in found.items():
        for name in TABLES:
            assert np.array_equal(vars(again[kind])[name], vars(tables)[name])


def test_rows_are_prompts_and_text_in_turn(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(tiny_teacher)
    text = Haystack.of(tokenizer, read_text(tokenizer))
    material = PromptMaterial(tokenizer, own_wording(tiny_teacher), text)
    rows = rows_to_imitate(material, 96, seed=3)
    assert rows.shape == (16, 96) and torch.equal(rows, rows_to_imitate(material, 96, seed=3))
    assert len({tuple(row) for row in rows.tolist()}) == 16
    said = tokenizer.decode(text.ids)
    assert [tokenizer.decode(row)[1:-1] in said for row in rows] == [False, True] * 8
    assert rows_to_imitate(material, 4096, seed=3).shape == (16, 512)
    in_noise = rows_to_imitate(dataclasses.replace(material, haystack=None), 96, seed=3)
    assert in_noise.shape == (16, 96) and not any(tokenizer.decode(row)[1:-1] in said for row in in_noise)
    with pytest.raises(InputError, match="kept for evaluation"):
        rows_to_imitate(material, 96, seed=10**6)
