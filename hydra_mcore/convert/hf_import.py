# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model directory becomes a checkpoint: a pretrained model the teacher's, a HydraHead model a
student's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydra_mcore.config import ModelCard
from hydra_mcore.convert.families import EMBEDDING, OUTPUT_LAYER, SHAPE_KEYS
from hydra_mcore.convert.hf_config import CONFIG_NAME, HuggingFaceError, read_config
from hydra_mcore.convert.hf_weights import HfWeights
from hydra_mcore.convert.origin import origin
from hydra_mcore.convert.output_folder import HEAD_MAP_NAME, check_target, new_folder
from hydra_mcore.convert.tensor_table import TensorRule, is_teacher, output_layer_rule, tensor_rules
from hydra_mcore.convert.tokenizer_files import TOKENIZER_DIR, import_tokenizer
from hydra_mcore.model.streaming import save_streamed
from hydra_mcore.progress import Progress


def import_hf(hf_dir: str | Path, checkpoint_dir: str | Path, dtype: torch.dtype | None = None) -> ModelCard:
    """Write a model's checkpoint, its tokenizer beside it, tensor by tensor; needs process groups of one rank.

    Names, shapes and dtypes are checked before the first byte is written, values as they are read.

    Args:
        dtype: of the weights written; unless given bfloat16 if all tensors are, else float32: nothing is rounded.

    Raises:
        InputError: the directory cannot be used (``HuggingFaceError``, naming the key or tensor), or the target
            cannot be written. Nothing is left of the target then.
    """
    check_target(checkpoint_dir)
    card = read_config(hf_dir)
    weights = HfWeights(hf_dir, card.shape.tied_embeddings)
    rules = tensor_rules(card)
    check_tensors(weights, rules, card)
    if card.shape.tied_embeddings:
        _check_tied(weights)
    card = dataclasses.replace(card, source=card.source | origin(hf_dir) | _stored_as(weights))
    if dtype is None:
        dtype = torch.bfloat16 if {weights.dtype(name) for name in rules} == {"bfloat16"} else torch.float32
    num_bytes = sum(math.prod(rule.shape) for rule in rules.values()) * dtype.itemsize
    with (
        new_folder(checkpoint_dir, num_bytes) as folder,
        Progress(total=len(rules), desc="import", unit="tensor") as progress,
    ):
        import_tokenizer(hf_dir, folder / TOKENIZER_DIR)
        if not is_teacher(card):
            card.head_map.save(folder / HEAD_MAP_NAME)
        source = _ImportedTensors(weights, rules, dtype, progress)
        save_streamed(card, dtype, source.read, folder)
        if is_teacher(card):
            card = dataclasses.replace(card, fingerprint=combined_fingerprint(source.digests))
            card.save(folder)
    return card


def check_tensors(weights: HfWeights, rules: dict[str, TensorRule], card: ModelCard) -> None:
    """Raise HuggingFaceError, naming the tensor, unless names, shapes and dtypes are those of the model."""
    optional = {OUTPUT_LAYER.hf: output_layer_rule(card.shape)} if card.shape.tied_embeddings else {}
    present = weights.names()
    for what, names in (
        ("missing", set(rules) - set(present)),
        ("not part of this model", set(present) - {*rules, *optional}),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise HuggingFaceError(f"{weights.root}: tensor {min(names)} is {what}{more}{_left_out(card)}")
    for name in present:
        expected = (rules | optional)[name].shape
        if weights.shape(name) != expected:
            raise HuggingFaceError(
                f"{weights.root}: tensor {name} has shape {weights.shape(name)}, config.json asks for"
                f" {expected}{_left_out(card)}"
            )
        weights.dtype(name)


def _left_out(card: ModelCard) -> str:
    """The sizes that config.json does not say, where tensors are not of the sizes that transformers takes for them."""
    names = [key for key in SHAPE_KEYS.values() if key not in card.source["config"]]
    return f" ({CONFIG_NAME} lacks {', '.join(names)})" if names else ""


class _ImportedTensors:
    """The tensors of a checkpoint, put together from those of a directory; the fingerprint of each as it passes."""

    def __init__(
        self, weights: HfWeights, rules: dict[str, TensorRule], dtype: torch.dtype, progress: Progress
    ) -> None:
        self.weights, self.dtype, self.progress = weights, dtype, progress
        self.parts: dict[str, list[TensorRule]] = {}
        for rule in rules.values():
            self.parts.setdefault(rule.stored, []).append(rule)
        self.digests: dict[str, str] = {}

    def read(self, stored: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor as a checkpoint stores it.

        Raises:
            HuggingFaceError: a tensor that cannot be read, or is not finite.
            ValueError: the rules do not fill it exactly once (a mistake in a family's table).
        """
        tensor, count = torch.empty(shape, dtype=self.dtype), 0
        for rule in self.parts.get(stored, ()):
            hf = self.weights.read(rule.hf)
            self.digests[rule.hf] = fingerprint_of(rule.hf, hf)
            count += rule.mapping.from_hf(hf, tensor)
            self.progress.update()
        if count != tensor.numel():
            raise ValueError(f"tensor {stored} is not filled exactly once by the family's table")
        return tensor


def fingerprint_of(name: str, tensor: Tensor) -> str:
    """Sha256 of a tensor's name, shape and float32 values: the same for any stored dtype that holds these values."""
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)}\n".encode())
    for rows in tensor.split(4096):  # a copy of some rows, not of the whole tensor
        digest.update(rows.float().contiguous().numpy())
    return digest.hexdigest()


def combined_fingerprint(digests: dict[str, str]) -> str:
    """The fingerprint of a model's weights: sha256 over those of its tensors in the order of their names.

    It knows nothing of files, of stored dtypes, or of a tied output layer that is stored as well.
    """
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def _stored_as(weights: HfWeights) -> dict[str, Any]:
    """What an export must know to write the tensors as they came: their dtypes, and whether a tied output layer was
    stored.
    """
    dtypes = {name: weights.dtype(name) for name in weights.names()}
    usual = Counter(dtypes.values()).most_common(1)[0][0]
    others = {name: dtype for name, dtype in dtypes.items() if dtype != usual}
    return {"dtype": usual, "other_dtypes": others, "output_layer_stored": OUTPUT_LAYER.hf in dtypes}


def _check_tied(weights: HfWeights) -> None:
    """A stored output layer of a tied model must be the embedding itself."""
    name = OUTPUT_LAYER.hf
    if name in weights.names() and not torch.equal(weights.read(name), weights.read(EMBEDDING.hf)):
        raise HuggingFaceError(
            f"{weights.root}: tensor {name} differs from {EMBEDDING.hf}, but config.json says tie_word_embeddings true"
        )
