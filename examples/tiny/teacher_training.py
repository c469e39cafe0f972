# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Train the tiny teacher: tokenizer, model, batches, steps, and the table of what it finds.

Values that the sequence has shown before are supervised in full. Text has a smaller weight.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.tiny import corpus
from examples.tiny.curriculum import EVALUATION_SEED, Phase, learning_rate, phase_at
from hydra_mcore.commands import sole_writer
from hydra_mcore.files import replacing, write_json
from hydra_mcore.progress import Progress
from hydra_mcore.ruler.haystack import Haystack
from hydra_mcore.ruler.material import PromptMaterial
from hydra_mcore.ruler.needles import NEEDLE_TASKS, needle_prompt
from hydra_mcore.ruler.prompts import Prompt
from hydra_mcore.ruler.sets import draw_prompts
from hydra_mcore.ruler.wording import format_wording
from hydra_mcore.selection.capabilities import BUILT_IN, RETRIEVAL

VOCAB_SIZE = 1024
NATIVE_LENGTH = 512
HELD_OUT_TOKENS = 200_000
TOKENIZER_CHARACTERS = 4_000_000
TASKS = BUILT_IN[RETRIEVAL]  # what heads are scored for later


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer on the corpus.

    Key words and value pieces are added as whole tokens: with 400 merges BPE would not learn them.
    """
    fmt = corpus.TINY_FORMAT
    added = [f" {key}" for key in fmt.keys] + list(fmt.value_pieces)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(added),
        special_tokens=[corpus.END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts, size = [], 0
    for text in corpus.read_texts("train"):
        texts.append(text)
        size += len(text)
        if size > TOKENIZER_CHARACTERS:
            break
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=corpus.END_OF_DOCUMENT,
        pad_token=corpus.END_OF_DOCUMENT,
        clean_up_tokenization_spaces=False,
    )
    for text in added:
        ids = fast.encode(text, add_special_tokens=False)
        assert len(ids) == 1 and fast.decode(ids) == text, (text, ids)
    assert len(fast) == VOCAB_SIZE, len(fast)
    return fast


def model_config() -> Qwen3Config:
    """The teacher's shape: 4 layers, 8 query heads, 4 kv groups, width 128."""
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=NATIVE_LENGTH,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        # With 0.05 and more it never left the guessing plateau.
        initializer_range=0.02,
        attention_bias=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


class Batches:
    """Makes training batches; all randomness comes from one seed and the step."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text_ids: np.ndarray, seed: int) -> None:
        self.tokenizer, self.text_ids, self.seed = tokenizer, text_ids, seed
        self.material = needle_material(tokenizer, text_ids)

    def sample(self, phase: Phase, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids `[b, s]` and loss weights `[b, s]` of one step."""
        rng = np.random.default_rng([self.seed, step])
        rows, weights = [], []
        for _ in range(phase.batch):
            kind = rng.random()
            if kind < phase.prompts:
                ids, weight = self._prompt(phase.length, rng)
            elif kind < phase.prompts + phase.plain:
                start = int(rng.integers(len(self.text_ids) - phase.length))
                ids = self.text_ids[start : start + phase.length]
                weight = np.full(phase.length, phase.text_weight)
            else:
                ids, kinds = corpus.recurring_sequence(
                    self.tokenizer,
                    corpus.TINY_FORMAT,
                    self.text_ids,
                    phase.length,
                    gap=float(rng.choice(phase.gaps)),
                    rng=rng,
                    pool=phase.pools[int(rng.integers(len(phase.pools)))],
                )
                weight = np.where(kinds == corpus.TEXT, phase.text_weight, 0.0)
                weight[kinds == corpus.REPEATED_VALUE] = 1.0
            rows.append(ids)
            weights.append(weight)
        return torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(weights)).float()

    def _prompt(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        task = TASKS[int(rng.integers(len(TASKS)))]
        prompt = needle_prompt(task, length, self.material, rng.random(NEEDLE_TASKS[task].placed).tolist(), rng)
        weight = np.zeros(length)
        weight[len(prompt.ids) :] = 1.0
        return whole(prompt), weight


def needle_material(tokenizer: PreTrainedTokenizerFast, text_ids: np.ndarray) -> PromptMaterial:
    """What needle prompts are made of: the teacher's own needles in this text."""
    return PromptMaterial(tokenizer, format_wording(corpus.TINY_FORMAT), Haystack.of(tokenizer, text_ids))


def whole(prompt: Prompt) -> np.ndarray:
    """int64 `[s]`: the prompt and its answer."""
    return np.concatenate([prompt.ids, prompt.answer_ids]).astype(np.int64)


@torch.no_grad()
def evaluate(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text_ids: np.ndarray,
    length: int,
    count: int,
    seed: int = EVALUATION_SEED,
) -> dict[str, float]:
    """Exact match by teacher forcing, 0 to 1, for each task on `count` prompts of `length`."""
    model.eval()
    result, material = {}, needle_material(tokenizer, text_ids)
    for task in TASKS:
        prompts = list(draw_prompts(task, length, count, seed, material))
        size = prompts[0].room
        right = 0
        for start in range(0, count, 20):
            ids = torch.from_numpy(np.stack([whole(prompt) for prompt in prompts[start : start + 20]]))
            logits = model(ids, logits_to_keep=size + 1).logits[:, :-1]
            right += int((logits.argmax(-1) == ids[:, -size:]).all(1).sum())
        result[task] = right / count
    model.train()
    return result


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the Hugging Face directory file by file, each beside its place, then renamed."""
    beside = output.parent / f".{output.name}.writing"
    beside.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    model.config._name_or_path = ""
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    # transformers 5 writes a class name of its own, and marks of this machine.
    config = json.loads((beside / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("model_max_length", "is_local", "local_files_only"):
        config.pop(name, None)
    write_json(beside / "tokenizer_config.json", config, indent=2)
    corpus.TINY_FORMAT.save(beside / "needles.json")
    for path in sorted(beside.iterdir()):
        os.replace(path, output / path.name)
    beside.rmdir()


def save_state(path: Path, state: dict[str, object]) -> None:
    """Write a resumable training state, never leaving half a file under its name."""
    with replacing(path, alone=True) as beside:
        torch.save(state, beside)


def train_step(
    model: Qwen3ForCausalLM,
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[float, float]:
    """Take one step; return the mean loss of repeated values and that of text (nan if none)."""
    logits = model(ids).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    flat = weights[:, 1:].flatten()
    loss = (losses * flat).sum() / flat.sum()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    losses = losses.detach()
    return float(losses[flat == 1].mean()), float(losses[(flat > 0) & (flat < 1)].mean())


def train(args: argparse.Namespace) -> Qwen3ForCausalLM:
    """Run the curriculum, from the saved state if there is one, and return the trained model."""
    tokenizer = load_or_train_tokenizer(args.output)
    text_ids = corpus.load_text(tokenizer, "train", args.text_tokens)
    held_out = corpus.load_text(tokenizer, "held_out", HELD_OUT_TOKENS)
    torch.manual_seed(args.seed)
    model = Qwen3ForCausalLM(model_config()).float()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    first = 0
    if args.state.exists():
        state = torch.load(args.state, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = int(state["step"])
    batches = Batches(tokenizer, text_ids, args.seed)
    start = time.time()
    bar = Progress(range(first, args.steps), initial=first, total=args.steps, desc="teacher")
    losses = []
    for step in bar:
        phase = phase_at(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        losses.append(train_step(model, optimizer, *batches.sample(phase, step)))
        if (step + 1) % args.report == 0 or step + 1 == args.steps:
            values, text = np.nanmean(losses, axis=0)
            found = evaluate(model, tokenizer, held_out, phase.length, 40, args.seed)
            bar.write(
                f"step {step + 1} length {phase.length} values {values:.3f} text {text:.3f} "
                f"{' '.join(f'{v:.2f}' for v in found.values())} {time.time() - start:.0f} s"
            )
            losses.clear()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(args.state, {**state, "step": step + 1})
            save(model, tokenizer, args.output)
    return model


def load_or_train_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Take the tokenizer from `folder`, where a stopped run or a release left it, or train it."""
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    return train_tokenizer()


def print_table(model: Qwen3ForCausalLM, folder: Path, lengths: Sequence[int], count: int) -> None:
    """Print the exact match of each task at each length, on prompts never seen."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    held_out = corpus.load_text(tokenizer, "held_out", HELD_OUT_TOKENS)
    print(f"{'task':<18}" + "".join(f"{length:>8}" for length in lengths))
    columns = [evaluate(model, tokenizer, held_out, length, count) for length in lengths]
    for task in TASKS:
        print(f"{task:<18}" + "".join(f"{100 * column[task]:7.1f}%" for column in columns))


def run(args: argparse.Namespace) -> None:
    """Train, and print the table at the native length and at twice that."""
    torch.set_num_threads(args.threads)
    with sole_writer(args.output):
        model = train(args)
    print_table(model, args.output, (NATIVE_LENGTH, 2 * NATIVE_LENGTH), args.prompts)
