# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Small real tokenizers of the kinds that prompts must be exact for, and a text to hide needles in."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hydra_mcore.ruler.haystack import Haystack, read_haystack

TEXT = "\n\n".join(topics[name] for name in sorted(topics))[:150_000]
KINDS = ("gpt2", "qwen", "llama", "byte")
# How Qwen's tokenizers cut a text into words: every digit alone, lines ends with the signs before them.
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
_THINK = "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"


@cache
def small_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """One of KINDS: two byte-level BPEs, of which the second has a chat template, one in the manner of SentencePiece
    that puts a BOS and a space before every text, and bytes."""
    if kind == "byte":
        return ByT5Tokenizer()
    return {"gpt2": _gpt2, "qwen": _qwen, "llama": _llama}[kind]()


@cache
def haystack(kind: str) -> Haystack:
    """TEXT for one of KINDS."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text(TEXT, encoding="utf-8")
        return read_haystack(small_tokenizer(kind), path)


def _trained(tokenizer: Tokenizer, special: list[str]) -> Tokenizer:
    letters = pre_tokenizers.ByteLevel.alphabet() if isinstance(tokenizer.decoder, decoders.ByteLevel) else []
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([TEXT[:100_000], "0123456789 " * 50], trainer)
    return tokenizer


def _gpt2() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=_trained(tokenizer, ["<|endoftext|>"]), eos_token="<|endoftext|>")


def _qwen() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_QWEN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = _trained(tokenizer, ["<|im_end|>", "<|im_start|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=_CHAT + _THINK,
    )


def _llama() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[^▁\n]+|\n|▁"), behavior="isolated")
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer = _trained(tokenizer, ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")
