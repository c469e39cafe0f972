# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a folder with a model holds, known in a moment, and the model itself."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import torch

from hydra_mcore.config import CARD_NAME, ConfigError, ModelCard
from hydra_mcore.convert.hf_config import CONFIG_NAME, HuggingFaceError, read_config
from hydra_mcore.convert.hydra_family import MODEL_TYPE
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.hugging_face import HuggingFaceModel, load_config
from hydra_mcore.evaluation.models import EvaluatedModel, ModelFacts
from hydra_mcore.evaluation.parallel import ParallelModel
from hydra_mcore.evaluation.server import ServedModel, ServerError, is_url, served_folder
from hydra_mcore.model.build import build_model
from hydra_mcore.model.checkpoints import latest_iteration, load_weights
from hydra_mcore.model.rotary import yarn_scaling
from hydra_mcore.tokenizer import has_tokenizer

BLOCK_BYTES, BLOCKS = 2**16, 32  # of a large file so many blocks are read, evenly spaced: 2 MiB, whatever its size


def describe(folder: str | Path, yarn: float | None = None) -> ModelFacts:
    """What is known of a model before its weights are read.

    Args:
        folder: a checkpoint of ours, or a Hugging Face directory (an export of ours, or any that transformers can
            run); or the address of a server that serves such a directory.
        yarn: factor by which YaRN (arXiv:2309.00071) is to stretch its positions.

    Raises:
        InputError: a folder of neither kind, one without weights or tokenizer, a model that YaRN cannot stretch, or a
            server that does not answer.
    """
    if is_url(str(folder)):
        if yarn is not None:
            raise ServerError(f"{folder}: a server's model is as it is; leave --yarn out")
        facts = describe(served_folder(str(folder)))
        fingerprint_there = hashlib.sha256(f"served {facts.fingerprint}".encode()).hexdigest()
        return dataclasses.replace(facts, url=str(folder), fingerprint=fingerprint_there)
    folder = Path(folder)
    if (folder / CARD_NAME).is_file():
        card = _stretched(ModelCard.load(folder), folder, yarn)
        files = [folder / CARD_NAME, *filter(Path.is_file, latest_iteration(folder).iterdir())]
        return _facts_of_card(card, folder, files, folder / "tokenizer", yarn)
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(
            f"{folder}: neither a checkpoint of hydra_mcore ({CARD_NAME}) nor a Hugging Face directory ({CONFIG_NAME})"
        )
    config = load_config(folder, yarn)
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if not weights:
        raise HuggingFaceError(f"{folder}: no weights beside its {CONFIG_NAME}; copy them there")
    files = [folder / CONFIG_NAME, *weights]
    if config.model_type == MODEL_TYPE:
        return _facts_of_card(read_config(folder), folder, files, folder, yarn)
    text = config.get_text_config()
    try:
        return ModelFacts(
            folder=folder,
            fingerprint=fingerprint(files, yarn),
            lineage="",
            stage=config.model_type,
            strategy="",
            num_fa=None,
            num_heads=text.num_hidden_layers * text.num_attention_heads,
            native_length=text.max_position_embeddings,
            vocab_size=text.vocab_size,
            tokenizer_dir=_with_tokenizer(folder),
            yarn=yarn,
        )
    except AttributeError as error:
        raise HuggingFaceError(f"{folder / CONFIG_NAME}: {error}; such models are not compared here") from None


def open_model(facts: ModelFacts, dtype: torch.dtype) -> EvaluatedModel:
    """The model that was described, its parameters in ``dtype``; inside process groups
    (``model.runtime.process_groups``).

    A checkpoint of ours takes the layout of the groups; of a Hugging Face directory every process holds the whole
    model.

    Raises:
        InputError: a layout that cannot hold the model, or weights that do not fit it.
    """
    if facts.url:
        return ServedModel(facts.url)
    if not (facts.folder / CARD_NAME).is_file():
        return HuggingFaceModel(facts.folder, dtype, facts.yarn)
    model = build_model(_stretched(ModelCard.load(facts.folder), facts.folder, facts.yarn), dtype=dtype)
    load_weights([model], facts.folder)
    return ParallelModel([model.eval()])


def fingerprint(files: list[Path], yarn: float | None) -> str:
    """sha256 over names, sizes and samples of files: quick for 100 GB, and another after any step of training."""
    digest = hashlib.sha256(f"yarn {yarn}".encode())
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"\0{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for offset in range(0, size, max(BLOCK_BYTES, size // BLOCKS)):
                file.seek(offset)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _facts_of_card(
    card: ModelCard, folder: Path, files: list[Path], tokenizer_dir: Path, yarn: float | None
) -> ModelFacts:
    return ModelFacts(
        folder=folder,
        fingerprint=fingerprint(files, yarn),
        lineage=card.fingerprint,
        stage=card.stage,
        strategy=card.head_map.strategy,
        num_fa=card.head_map.num_fa,
        num_heads=card.shape.num_layers * card.shape.num_heads,
        native_length=card.shape.native_length,
        vocab_size=card.shape.vocab_size,
        tokenizer_dir=_with_tokenizer(tokenizer_dir),
        yarn=yarn,
    )


def _stretched(card: ModelCard, folder: Path, yarn: float | None) -> ModelCard:
    """The card with its positions stretched by YaRN, if asked for; raises ConfigError where that has no meaning."""
    if yarn is None:
        return card
    if card.options.fa_position != "rope":
        raise ConfigError(f"{folder}: its FA heads read no positions that YaRN could stretch; leave YaRN out")
    try:
        scaling = yarn_scaling(yarn, card.shape.native_length, card.shape.rope_scaling)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    return dataclasses.replace(card, shape=dataclasses.replace(card.shape, rope_scaling=scaling))


def _with_tokenizer(folder: Path) -> Path:
    """The folder; raises InputError unless a tokenizer is in it."""
    if not (
        has_tokenizer(folder) or (folder / "tokenizer_config.json").is_file()
    ):  # which may name one that needs no vocabulary
        raise InputError(f"{folder}: no tokenizer there; copy the Hugging Face tokenizer files to it")
    return folder
