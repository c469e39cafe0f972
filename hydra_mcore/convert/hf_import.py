# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model directory becomes the teacher's checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from tqdm import tqdm

from hydra_mcore.config import ModelCard, ModelShape
from hydra_mcore.convert.families import LAYER, Family, WeightRule, dimensions
from hydra_mcore.convert.hf_io import HfWeights, HuggingFaceError, read_config
from hydra_mcore.convert.target import check_target, copy_tokenizer
from hydra_mcore.model.build import build_model, save_weights, teacher_card


def import_hf(hf_dir: str | Path, checkpoint_dir: str | Path, dtype: torch.dtype = torch.float32) -> ModelCard:
    """Write the checkpoint of a pretrained model, its tokenizer beside it; needs process groups of TP 1 and PP 1.

    All of the input is checked before the first byte is written, names and shapes before the model is built.

    Raises:
        InputError: the directory cannot be used (``HuggingFaceError``, naming the key or tensor), or the target
            already holds a checkpoint.
    """
    check_target(checkpoint_dir)
    family, shape = read_config(hf_dir)
    weights = HfWeights(hf_dir)
    rules = expand_rules(family, shape)
    check_tensors(weights, rules, family, shape)
    model = build_model(teacher_card(shape, ""), dtype=dtype)
    card = teacher_card(shape, fill(model, weights, rules, shape))
    if shape.tied_embeddings:
        _check_tied(weights, family)
    copy_tokenizer(hf_dir, checkpoint_dir)
    save_weights([model], card, checkpoint_dir)
    return card


def expand_rules(family: Family, shape: ModelShape) -> dict[str, WeightRule]:
    """The rule of every tensor that such a model must have, by its Hugging Face name; ``{layer}`` filled in."""
    rules = family.weights if shape.tied_embeddings else (*family.weights, family.output_layer)
    expanded = {}
    for rule in rules:
        for layer_idx in range(shape.num_layers if LAYER in rule.hf else 1):
            name, ours = (text.replace(LAYER, str(layer_idx)) for text in (rule.hf, rule.ours))
            expanded[name] = WeightRule(name, ours, rule.dims, rule.mapping)
    return expanded


def check_tensors(weights: HfWeights, rules: dict[str, WeightRule], family: Family, shape: ModelShape) -> None:
    """Raise HuggingFaceError, naming the tensor, unless names and shapes are exactly those of the family."""
    optional = {family.output_layer.hf: family.output_layer} if shape.tied_embeddings else {}
    present = weights.names()
    for what, names in (("missing", set(rules) - set(present)), ("not part of this model", set(present) - {*rules, *optional})):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise HuggingFaceError(f"{weights.root}: tensor {min(names)} is {what}{more}")
    sizes = dimensions(shape)
    for name in present:
        expected = tuple(sizes[dim] for dim in (rules | optional)[name].dims)
        if weights.shape(name) != expected:
            raise HuggingFaceError(f"{weights.root}: tensor {name} has shape {weights.shape(name)}, config.json asks for {expected}")


def fill(model: GPTModel, weights: HfWeights, rules: dict[str, WeightRule], shape: ModelShape) -> str:
    """Stream all tensors into the model, each once, and return the fingerprint of the weights.

    The fingerprint is sha256 over name, shape and float32 values in the order of names, so it knows nothing of
    files, of the stored dtype, or of a tied output layer that is stored as well.

    Raises:
        HuggingFaceError: a tensor that is not finite floating point.
        ValueError: the rules do not fill every parameter exactly once (a mistake in the family's table).
    """
    parameters = dict(model.named_parameters())
    open_values = {name: parameter.numel() for name, parameter in parameters.items()}
    digest = hashlib.sha256()
    for name in tqdm(sorted(rules), desc="import", unit="tensor"):
        tensor, rule = weights.read(name), rules[name]
        open_values[rule.ours] -= rule.mapping.from_hf(tensor, parameters[rule.ours], shape)
        _add_to_digest(digest, name, tensor)
    wrong = sorted(name for name, count in open_values.items() if count)
    if wrong:
        raise ValueError(f"parameter {wrong[0]} is not filled exactly once by the family's table")
    return digest.hexdigest()


def _add_to_digest(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.float().contiguous().numpy())


def _check_tied(weights: HfWeights, family: Family) -> None:
    """A stored output layer of a tied model must be the embedding itself."""
    name = family.output_layer.hf
    if name in weights.names() and not torch.equal(weights.read(name), weights.read(family.embedding)):
        raise HuggingFaceError(
            f"{weights.root}: tensor {name} differs from {family.embedding}, but config.json says tie_word_embeddings true"
        )
