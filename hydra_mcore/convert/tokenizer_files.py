# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A tokenizer travels with its model: the files, what makes transformers choose the same class, and a proof that ids
are equal.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from hydra_mcore.convert.hf_config import CONFIG_NAME, read_object
from hydra_mcore.errors import InputError
from hydra_mcore.files import write_json
from hydra_mcore.tokenizer import has_tokenizer, open_tokenizer

TOKENIZER_DIR = "tokenizer"
SETTINGS = "tokenizer_config.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    SETTINGS,
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates",  # a folder
    GENERATION,
    "needles.json",
)
CHOICE = ("model_type", "tokenizer_class")  # the keys of config.json by which transformers chooses a tokenizer's class
# Scripts, numbers, quotes, spaces, line ends and letters in two parts, on which tokenizers differ that share a
# vocabulary.
TEXT = (
    " It's  don't WE'LL 1234567 3.14 -5\r\n\n\ta=b(c) ...!? #x_y naïve café e\u0301 Ünïcödé \ufb01 ½ "
    "① „Ä“ «х» Привет Γειά "  # noqa: RUF001
    "שלום سلام हिन्दी বাংলা தமிழ் မြန်မာ ไทย 你好\uff0c世界。こんにちは 한국어 👍🏽 👨\u200d👩\u200d👧"
    " \u200b\u00a0\u3000end \n"
)
# What asks for a cache that can be cut or has a form of its own, for maps of attention, or for code from the hub: a
# HydraHead model has none of the first two, and its export shall need no code but its own.
NOT_OURS = (
    *(
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "return_legacy_cache",
        "compile_config",
        "output_attentions",
    ),
    *(
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
        "assistant_early_exit",
        "use_mtp",
        "speculation_type",
        "is_assistant",
    ),
    *(
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_ensemble_weight",
    ),
    *("assistant_lookbehind", "target_lookbehind", "penalty_alpha", "dola_layers", "low_memory"),
    *("num_beam_groups", "diversity_penalty", "constraints", "force_words_ids"),
)


def import_tokenizer(hf_dir: str | Path, folder: Path) -> None:
    """Copy a model directory's tokenizer, if it has one, and its generation settings to a checkpoint's ``folder``.

    Raises:
        InputError: files that do not load, or a copy that would give other ids.
    """
    _check_generation(Path(hf_dir))
    copy_tokenizer(hf_dir, folder)
    if has_tokenizer(hf_dir):
        config = read_object(Path(hf_dir) / CONFIG_NAME)
        write_json(folder / CONFIG_NAME, {key: config[key] for key in CHOICE if key in config})
        if problem := difference(open_tokenizer(hf_dir), open_tokenizer(folder)):
            raise InputError(
                f"{hf_dir}: its tokenizer and the checkpoint's copy {folder.name}/ differ: {problem}; {_SAVE_ANEW}"
            )


def export_tokenizer(checkpoint_dir: str | Path, folder: Path, is_teacher: bool) -> None:
    """Copy a checkpoint's tokenizer and generation settings beside the config.json in ``folder``; raises as
    ``import_tokenizer``.

    A student's generation settings lose what its cache cannot do.
    """
    own = Path(checkpoint_dir) / TOKENIZER_DIR
    copy_tokenizer(own, folder)
    if not is_teacher and (folder / GENERATION).is_file():
        write_json(
            folder / GENERATION,
            {key: value for key, value in read_object(folder / GENERATION).items() if key not in NOT_OURS},
            indent=2,
        )
    if not has_tokenizer(own):
        return
    ours = open_tokenizer(own)
    if not difference(ours, open_tokenizer(folder)):
        return
    # of another model_type transformers chooses another class, unless told
    settings = read_object(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    write_json(folder / SETTINGS, settings | {"tokenizer_class": type(ours).__name__}, indent=2)
    if problem := difference(ours, open_tokenizer(folder)):
        raise InputError(
            f"{own}: this tokenizer and that of the export {folder.with_suffix('').name} differ: {problem};"
            f" {_SAVE_ANEW}"
        )


def copy_tokenizer(source_dir: str | Path, target_dir: str | Path) -> None:
    """Copy the tokenizer's files that ``source_dir`` has."""
    present = [path for name in TOKENIZER_FILES if (path := Path(source_dir) / name).exists()]
    if present:
        Path(target_dir).mkdir(parents=True, exist_ok=True)
    for path in present:
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, Path(target_dir) / path.name)


def difference(left: PreTrainedTokenizerBase, right: PreTrainedTokenizerBase) -> str:
    """How two tokenizers differ: on a text of many scripts, on all added tokens, in what they say of themselves; empty
    if they do not.
    """
    tokens = [*left.added_tokens_decoder.values(), *right.added_tokens_decoder.values()]
    added = [token.content for token in tokens]
    for text in (TEXT, " ".join(added), "".join(f"a{token}b {token} " for token in added)):
        ids = [tokenizer(text, verbose=False)["input_ids"] for tokenizer in (left, right)]
        if ids[0] != ids[1]:
            return (
                f"{type(left).__name__} makes {len(ids[0])} tokens of a text, {type(right).__name__} {len(ids[1])}"
                " others"
            )
    for name in ("eos_token_id", "bos_token_id", "pad_token_id", "chat_template"):
        if getattr(left, name) != getattr(right, name):
            return f"they have another {name}"
    return ""


def _check_generation(hf_dir: Path) -> None:
    """Raise InputError for a generation_config.json that transformers cannot use, so that no export could."""
    if not (path := hf_dir / GENERATION).is_file():
        return
    read_object(path)
    try:
        GenerationConfig.from_pretrained(hf_dir, local_files_only=True)
    except Exception as error:  # whatever its checks run into
        raise InputError(
            f"{path}: transformers cannot use it ({str(error).strip().splitlines()[-1]}); correct or remove it"
        ) from None


_SAVE_ANEW = "load it with transformers and save it anew with save_pretrained"
