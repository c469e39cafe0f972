# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""How well a linear head could take the place of each head of a teacher (``model/imitation.py``).

A head with a large effect need not be kept if a linear head can do the same. [ours; the paper looks at effects alone]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_mcore.config import ModelShape
from hydra_mcore.model.imitation import Split, Task, imitate, imitation_flops, values_input
from hydra_mcore.ruler.material import PromptMaterial
from hydra_mcore.selection.capabilities import BUILT_IN, RETRIEVAL
from hydra_mcore.selection.probes import build_probes
from hydra_mcore.selection.score import Replaceability
from hydra_mcore.selection.scoring import Scoring
from hydra_mcore.selection.teacher import Teacher

ROWS, ROW_LENGTH = 16, 512
TABLES = ("residual", "inherited", "half_life", "fastest", "write")


def rows_to_imitate(material: PromptMaterial, length: int, seed: int) -> Tensor:
    """Token ids [16, s] of at most 512 tokens each: needle prompts and, in turn with them, pieces of the haystack.

    Without a haystack all rows are prompts.

    Raises:
        InputError: a seed of evaluation, or prompts that cannot be built.
    """
    length, rng = min(length, ROW_LENGTH), np.random.default_rng([seed, 0x1417A7E])
    tasks = len(BUILT_IN[RETRIEVAL])
    texts = [] if material.haystack is None else [material.haystack.part(length, rng)[0] for _ in range(ROWS // 2)]
    each = -(-(ROWS - len(texts)) // tasks)
    by_task = build_probes(material, length, each, seed, (RETRIEVAL,)).values()
    per_task = [torch.cat([batch.clean_bs for batch in batches]) for batches in by_task]
    prompts = torch.stack(per_task, dim=1).flatten(0, 1)  # the first of every task, then the second
    if not texts:
        return prompts[:ROWS]
    texts_bs = torch.from_numpy(np.stack(texts).astype(np.int64))
    return torch.stack([prompts[: len(texts)], texts_bs], dim=1).flatten(0, 1)


def replaceability(scoring: Scoring, ids_bs: Tensor, kinds: Sequence[str]) -> dict[str, Replaceability]:
    """For every head and each of these kinds the best imitation; resumable, on all ranks.

    A piece is one layer of every pipeline stage, so that stages work side by side.

    Args:
        ids_bs: rows of token ids, four at least (``rows_to_imitate``).
    """
    teacher = scoring.teacher
    inputs = _LayerInputs(teacher, ids_bs.to(teacher.device))
    most = torch.tensor(len(teacher.layers), device=teacher.device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    what = f"{hashlib.sha256(ids_bs.numpy().tobytes()).hexdigest()[:16]} {' '.join(kinds)}"
    pieces = {
        f"imitation {what}, layer {at} of {teacher.pipe.pp_group.size()} stages": partial(_layer, inputs, at, kinds)
        for at in range(int(most))
    }
    found = np.sum([result["tables"] for result in scoring.run("replaceability", pieces)], axis=0)
    by_kind = zip(kinds, found, strict=True)
    return {kind: Replaceability(**dict(zip(TABLES, tables, strict=True))) for kind, tables in by_kind}


class _LayerInputs:
    """The input of each of this stage's layers, [s, b, m]; the teacher runs when the first is asked for."""

    def __init__(self, teacher: Teacher, ids_bs: Tensor) -> None:
        self.teacher, self.ids_bs = teacher, ids_bs
        self.found: dict[int, Tensor] = {}

    def __getitem__(self, layer_idx: int) -> Tensor:
        if not self.found:
            self.found = self.teacher.run(self.ids_bs, slice(-1, None), slice(None), only="residual_sbm").residual_sbm
        return self.found[layer_idx]


@torch.no_grad()
def _layer(inputs: _LayerInputs, at: int, kinds: Sequence[str]) -> dict[str, Tensor]:
    teacher = inputs.teacher
    shape = (len(kinds), len(TABLES), teacher.num_layers, teacher.num_heads)
    tables = torch.zeros(shape, dtype=torch.float64, device=teacher.device)
    for layer_idx in sorted(teacher.layers)[at : at + 1]:
        found = head_inputs(teacher, layer_idx, inputs[layer_idx])
        split = Split.of(len(found.x_bsm))
        for head_idx, task in zip(teacher.own_heads(layer_idx), found.tasks(), strict=True):
            for number, kind in enumerate(kinds):
                best = imitate(kind, task, found.x_bsm, split)
                values = (best.residual, best.inherited, best.memory.half_life, best.memory.fastest, best.memory.write)
                tables[number, :, layer_idx, head_idx] = tables.new_tensor(values)
    return {"tables": teacher.whole(tables)}


class HeadInputs(NamedTuple):
    """What the attention of a layer works with, float32 at least; heads are this rank's, ``own_heads``."""

    x_bsm: Tensor  # what values are made of
    q_hbsd: Tensor  # after norm and rotary, each head's own
    k_hbsd: Tensor
    v_hbsd: Tensor
    out_hbsd: Tensor  # before the output projection

    def tasks(self) -> list[Task]:
        """What a linear head in the place of each head would work with, queries and keys at unit length."""
        parts = (F.normalize(self.q_hbsd, dim=-1), F.normalize(self.k_hbsd, dim=-1), self.v_hbsd, self.out_hbsd)
        return [Task(*of_head) for of_head in zip(*parts, strict=True)]


def head_inputs(teacher: Teacher, layer_idx: int, hidden_sbm: Tensor) -> HeadInputs:
    """Run a layer's attention on the layer's input and keep what its heads took and gave."""
    layer, seen = teacher.layers[layer_idx], []
    branch = layer.self_attention.fa

    def before_attention(module: Any, args: tuple) -> None:
        seen.extend(args[1:])

    def before_projection(heads_sbhd: Tensor) -> Tensor:
        seen.append(heads_sbhd)
        return heads_sbhd

    with branch.core_attention.register_forward_pre_hook(before_attention):
        teacher.attend(layer_idx, hidden_sbm, before_projection)
    x_bsm = values_input(layer.input_layernorm(hidden_sbm).transpose(0, 1), teacher.model.config.add_qkv_bias)
    return HeadInputs(x_bsm, *(t.permute(2, 1, 0, 3).to(x_bsm.dtype) for t in seen))


def replaceability_flops(shape: ModelShape, length: int, kinds: Sequence[str]) -> float:
    """Floating-point operations of ``replaceability`` with rows of so many tokens."""
    heads = shape.num_layers * shape.num_heads
    return heads * imitation_flops(kinds, ROWS * length, shape.hidden_size, shape.head_dim)
