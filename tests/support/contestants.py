# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Small random models with real tokenizers, to be compared by tools/evaluate.py."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape, teacher_card
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.build import build_model
from hydra_mcore.model.checkpoints import save_weights
from hydra_mcore.model.runtime import process_groups
from tests.support.paths import TINY_TEACHER

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_groups=2,
    head_dim=8,
    ffn_hidden_size=48,
    vocab_size=1024,
    native_length=192,
    rope_theta=1e4,
)


def write_contestants(root: Path) -> Path:
    """root/teacher and root/student with the tiny teacher's tokenizer, root/other with one of its own, and
    root/text.txt.
    """
    text = Path(dataclasses.__file__).read_text(encoding="utf-8")[:16_000]
    (root / "text.txt").write_text(text, encoding="utf-8")
    head_map = HeadMap.from_fa([(0, 1), (1, 0), (1, 3)], SHAPE.num_layers, SHAPE.num_heads, SHAPE.num_kv_groups)
    teacher = teacher_card(SHAPE, "f" * 64)
    student = dataclasses.replace(teacher, head_map=head_map, options=HydraOptions(), stage="extend")
    cards = {"teacher": teacher, "student": student, "other": teacher}
    with process_groups():
        for seed, (name, card) in enumerate(cards.items()):
            model = random_model(card, seed)
            save_weights([model], card, root / name)
            (root / name / "tokenizer").mkdir()
            for file in ("tokenizer.json", "tokenizer_config.json", "needles.json") if name != "other" else ():
                shutil.copyfile(TINY_TEACHER / file, root / name / "tokenizer" / file)
    byte_level(text).save_pretrained(root / "other" / "tokenizer")
    return root


def random_model(card: ModelCard, seed: int) -> GPTModel:
    """Weights large enough that what it predicts varies with position and content."""
    model = build_model(card).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return model


def byte_level(text: str, words: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of so many words, trained on a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=words, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
