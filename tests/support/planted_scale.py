# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A random student and text that it wrote itself under one base of its log-position scale.

Nothing predicts a text better than what it was drawn from (Gibbs' inequality), so that base has the least loss.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape, teacher_card
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.build import build_model
from hydra_mcore.model.checkpoints import save_weights
from hydra_mcore.model.fa_heads import set_log_scale
from tests.support.launch import model_parallel

SHAPE = ModelShape(
    num_layers=2, hidden_size=32, num_heads=4, num_kv_groups=2, head_dim=8, ffn_hidden_size=48, vocab_size=64,
    native_length=64,
    rope_theta=1e4, norm_epsilon=1e-2,
)  # fmt: skip
HEAD_MAP = HeadMap.from_fa([(0, 0), (0, 1), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)], 2, 4, 2)
WINDOWS, LENGTH = 12, 160


def planted_run(rank: int, folder: Path, base: float | None) -> None:
    """Write folder/student, its tokenizer of 64 words, and folder/text.txt: windows written under ``base``, one after
    the other.
    """
    card = dataclasses.replace(
        teacher_card(SHAPE, "f" * 64), head_map=HEAD_MAP, options=HydraOptions(), stage="student"
    )
    with model_parallel():
        model = planted_model(card)
        save_weights([model], card, folder / "student")
        set_log_scale(model, base)
        words = [" ".join(f"w{token}" for token in row) for row in written(model).tolist()]
    tokenizer = Tokenizer(models.WordLevel({f"w{token}": token for token in range(SHAPE.vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "student" / "tokenizer")
    (folder / "text.txt").write_text(" ".join(words))


def planted_model(card: ModelCard) -> torch.nn.Module:
    """Weights so large that where attention looks decides the next token."""
    model, generator = build_model(card).eval(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.5 + 0.1 * noise if "norm" in name or "scale" in name else 0.5 * noise)
    return model


@torch.no_grad()
def written(model: torch.nn.Module) -> Tensor:
    """int64 [windows, length] drawn from the model, token by token."""
    generator = torch.Generator().manual_seed(6)
    ids_bs = torch.randint(SHAPE.vocab_size, (WINDOWS, 1), generator=generator)
    while ids_bs.shape[1] < LENGTH:
        logits_bsw = model(ids_bs, torch.arange(ids_bs.shape[1]).expand_as(ids_bs), None)
        ids_bs = torch.cat([ids_bs, torch.multinomial(logits_bsw[:, -1].softmax(-1), 1, generator=generator)], dim=1)
    return ids_bs
