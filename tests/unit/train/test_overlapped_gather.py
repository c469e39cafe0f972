# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Megatron waits for a module's new parameters as the module is called: in every stage each module that has some must
be.
"""

import dataclasses

import pytest
import torch

from hydra_mcore.config import HydraOptions, StageOptions, teacher_card
from hydra_mcore.model.build import build_model
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.train.data import MicroBatch
from hydra_mcore.train.step import forward_step
from tests.support.stages import HEAD_MAP, SHAPE

OPTIONS = {
    "default": HydraOptions(),
    "competition": HydraOptions(fusion="competition", gdn_gate="headwise", fa_gate="headwise"),
    "shared": HydraOptions(qkv="shared", gdn_kv="per_group"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("stage", ["align", "distill", "extend"])
def test_a_step_waits_for_every_trained_parameter(stage: str, options: HydraOptions) -> None:
    shape = dataclasses.replace(SHAPE, tied_embeddings=False)
    teacher = teacher_card(shape, fingerprint="f" * 64)
    student = dataclasses.replace(teacher, head_map=HEAD_MAP, options=options, stage="student")
    tokens = torch.arange(32)[None] % shape.vocab_size
    batch = MicroBatch(tokens, tokens, torch.ones(1, 32), torch.arange(32)[None])
    waited: set[str] = set()
    with process_groups():
        models = {"student": build_model(student, stage), "teacher": build_model(teacher, stage).requires_grad_(False)}
        models["teacher"].post_process = stage != "align"
        for name, module in models["student"].named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: waited.add(name))
        step = forward_step(StageOptions(stage=stage, head_statistics_interval=0), lambda *_: batch, lambda: 1)
        step.prepare([models["student"]], [models["teacher"]] if stage != "extend" else [])
        output, to_loss = step(None, models["student"])
        to_loss(output)
    trained = {name.rpartition(".")[0] for name, _ in models["student"].named_parameters()}
    assert {name for name in trained if stage != "align" or "self_attention" in name} - waited == set()
