# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint becomes a Hugging Face directory: a teacher one of its own family, a student a HydraHead model."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hydra_mcore.config import ConfigError, ModelCard
from hydra_mcore.convert import hydra_family
from hydra_mcore.convert.families import EMBEDDING
from hydra_mcore.convert.hf_code import copy_model_code
from hydra_mcore.convert.hf_config import CONFIG_NAME
from hydra_mcore.convert.hf_weights import INDEX_NAME, SINGLE_NAME
from hydra_mcore.convert.model_card import write_model_card
from hydra_mcore.convert.output_folder import HEAD_MAP_NAME, check_target, new_folder
from hydra_mcore.convert.tensor_table import TensorRule, is_teacher, output_layer_rule, tensor_rules
from hydra_mcore.convert.tokenizer_files import export_tokenizer
from hydra_mcore.errors import InputError
from hydra_mcore.files import write_json
from hydra_mcore.model.checkpoints import trainings
from hydra_mcore.model.streaming import StoredTensors
from hydra_mcore.progress import Progress


def export_hf(
    checkpoint_dir: str | Path,
    hf_dir: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    evaluation: str | Path | None = None,
    base_model: str = "",
    license: str = "",
) -> ModelCard:
    """Write a model's Hugging Face directory, holding one shard in memory; returns the checkpoint's card.

    Args:
        dtype: of all tensors; unless given a teacher's are those of the directory it was imported from, a student's
            those of the checkpoint.
        max_shard_bytes: largest size of a safetensors file (a single tensor may be larger).
        evaluation, base_model, license: for the model card, as in ``write_model_card``.

    Raises:
        InputError: no complete checkpoint, one that does not fit its card, weights that are not finite, or a target
            that cannot be written. Nothing is left of the target then.
    """
    check_target(hf_dir)
    card = ModelCard.load(checkpoint_dir)
    card = dataclasses.replace(card, stages=trainings(card, checkpoint_dir))
    stored = StoredTensors(checkpoint_dir)
    _check_fit(card, stored)
    rules = _rules_to_write(card)
    dtypes = _dtypes(card, rules, stored, dtype)
    sizes = {name: math.prod(rule.shape) * dtypes[name].itemsize for name, rule in rules.items()}
    with new_folder(hf_dir, sum(sizes.values())) as folder:
        _write_shards(folder, _shards(sizes, max_shard_bytes), rules, _Reader(stored, dtypes))
        usual = str(max(dtypes.values(), key=list(dtypes.values()).count)).removeprefix("torch.")
        if is_teacher(card):
            config = card.source["config"]
            rounded = {} if dtype is None else {"torch_dtype" if "torch_dtype" in config else "dtype": usual}
            write_json(folder / CONFIG_NAME, config | rounded, indent=2)
        else:
            write_json(folder / CONFIG_NAME, hydra_family.to_config(card, usual), indent=2)
            card.head_map.save(folder / HEAD_MAP_NAME)
            copy_model_code(folder)
        export_tokenizer(checkpoint_dir, folder, is_teacher(card))
        write_model_card(folder, card, evaluation, base_model, license)
    return card


def _check_fit(card: ModelCard, stored: StoredTensors) -> None:
    """Raise ConfigError, naming the tensor, unless the checkpoint holds exactly the numbers that its card's
    model has.
    """
    filled: Counter[str] = Counter()
    for rule in tensor_rules(card).values():
        filled[rule.stored] += math.prod(rule.shape)
    for name, count in filled.items():
        if math.prod(shape := stored.shape(name)) != count:
            raise ConfigError(
                f"{stored.folder}: tensor {name} has shape {list(shape)}, so it is not of the model that its card"
                " describes"
            )


def _rules_to_write(card: ModelCard) -> dict[str, TensorRule]:
    """The rule of every tensor to write, a tied output layer included where the teacher's directory stored one too."""
    rules = tensor_rules(card)
    if not is_teacher(card):
        return rules
    if "config" not in card.source:
        raise ConfigError("the checkpoint's card lacks the teacher's config.json; import the teacher again")
    if card.shape.tied_embeddings and card.source["output_layer_stored"]:
        copy = output_layer_rule(card.shape)
        rules[copy.hf] = TensorRule(copy.hf, rules[EMBEDDING.hf].stored, copy.shape, copy.mapping)
    return rules


def _dtypes(
    card: ModelCard, rules: dict[str, TensorRule], stored: StoredTensors, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """The dtype of every tensor to write."""
    kept = {name: stored.dtype(rule.stored) for name, rule in rules.items()}
    if dtype is not None:
        return dict.fromkeys(kept, dtype)
    if not is_teacher(card):
        return kept
    usual, others = card.source["dtype"], card.source["other_dtypes"]
    return {name: getattr(torch, others.get(name, usual)) for name in kept}


def _shards(sizes: dict[str, int], max_bytes: float) -> list[list[str]]:
    """Tensor names file by file, in order; a file takes tensors until the next one would not fit."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


class _Reader:
    """Hugging Face tensors out of a checkpoint's; the last stored one is kept, as it may hold the next one too."""

    def __init__(self, stored: StoredTensors, dtypes: dict[str, torch.dtype]) -> None:
        self.stored, self.dtypes = stored, dtypes
        self.name, self.tensor = "", torch.empty(0)

    def read(self, rule: TensorRule) -> Tensor:
        if self.name != rule.stored:
            self.tensor = torch.empty(0)  # let go of the last one before the next is read
            self.name, self.tensor = rule.stored, self.stored.read(rule.stored)
            if not self.tensor.isfinite().all():
                raise ConfigError(
                    f"{self.stored.folder}: tensor {rule.stored} holds NaN or infinity; export an earlier checkpoint"
                )
        return rule.mapping.to_hf(self.tensor, rule.shape).to(self.dtypes[rule.hf])


def _write_shards(folder: Path, shards: list[list[str]], rules: dict[str, TensorRule], reader: _Reader) -> None:
    """One safetensors file, or numbered ones with their index, as transformers names them."""
    weight_map: dict[str, str] = {}
    total = 0
    with Progress(total=len(rules), desc="export", unit="tensor") as progress:
        for number, names in enumerate(shards, 1):
            file_name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name in names:
                tensors[name] = reader.read(rules[name])
                progress.update()
            try:
                save_file(tensors, folder / file_name, metadata={"format": "pt"})
            except SafetensorError as error:
                raise InputError(
                    f"{folder.with_suffix('')}: {file_name} cannot be written ({error}); nothing is left of it"
                ) from None
            (folder / file_name).chmod(folder.stat().st_mode & 0o666)  # the library's own choice shuts colleagues out
            weight_map |= dict.fromkeys(names, file_name)
            total += sum(tensor.nbytes for tensor in tensors.values())
            del tensors  # before the next file's
    if len(shards) > 1:
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
