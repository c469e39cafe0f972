# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Needle accuracy while training: does the student still find what it read, on the layout that it trains on."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region, gather_from_tensor_model_parallel_region
from torch import Tensor

from hydra_mcore.config import ConfigError
from hydra_mcore.evaluation.forward import rows_a_forward
from hydra_mcore.evaluation.scoring import Score
from hydra_mcore.ops.sequence import SequencePart
from hydra_mcore.selection.needles import NeedlePrompt, build_prompts
from hydra_mcore.selection.probes import check_seed, load_format, load_tokenizer
from hydra_mcore.train.pair import hidden_and_weight

TASKS = {"needle single-key": "niah_single_1", "needle multi-key": "niah_multikey_1"}  # panel -> task of RULER
SEED = 500_000  # below evaluation's, so that published numbers are never looked at, and far from selection's own


def make_prompts(args: argparse.Namespace, checkpoint_dir: Path, vocab_size: int) -> dict[str, list[NeedlePrompt]]:
    """The prompts of each panel, hidden in noise; every rank and every restart makes the same. None unless asked for.

    Raises:
        InputError: a length that the layout cannot hold; no tokenizer beside the checkpoint, one that cannot word the
            prompts, or one of another model.
    """
    if not args.needle_interval:
        return {}
    check_seed(SEED)
    length = args.needle_length or args.seq_length
    ranks = (2 * args.context_parallel_size if args.context_parallel_size > 1 else 1, args.tensor_model_parallel_size)
    divisor = ranks[0] * (ranks[1] if args.sequence_parallel else 1)
    if length % divisor:
        raise ConfigError(f"needle-length {length} does not divide by {divisor}, as this layout needs; change it")
    tokenizer, wording = load_tokenizer(checkpoint_dir), load_format(checkpoint_dir)
    noise = np.resize(np.asarray(tokenizer.encode(wording.noise, add_special_tokens=False), dtype=np.int64), length)
    try:
        drawn = {panel: build_prompts(task, wording, tokenizer, noise, length, args.needle_prompts, SEED) for panel, task in TASKS.items()}
    except ValueError as error:
        raise ConfigError(f"needle prompts of {length} tokens: {error}; change needle-length, or set needle-interval to 0") from None
    largest = max(int(prompt.ids.max()) for prompts in drawn.values() for prompt in prompts)
    if largest >= vocab_size:
        raise ConfigError(
            f"the tokenizer of {checkpoint_dir} gives token {largest}, the model knows {vocab_size}; they are not of one model"
        )
    return drawn


def needle_accuracy(students: list[GPTModel], prompts: dict[str, list[NeedlePrompt]]) -> dict[str, Score]:
    """Exact match of greedy decoding on each panel, as in ``evaluation.scoring``; called by all ranks, each gets all scores.

    Data-parallel ranks share the prompts out. The students are in training mode before and after, and neither weights nor
    random numbers are touched.

    Args:
        students: this rank's model chunks, without the wrappers of training.
    """
    groups = students[0].pg_collection
    counts = torch.zeros(len(prompts), 2, device=torch.cuda.current_device())
    with evaluating(students):
        for drawn, count in zip(prompts.values(), counts, strict=True):
            mine, start = drawn[groups.dp.rank() :: groups.dp.size()], drawn[0].answer_start
            size = rows_a_forward(len(drawn[0].ids))
            for first in range(0, len(mine), size):
                ids_bs = torch.from_numpy(np.stack([prompt.ids for prompt in mine[first : first + size]])).to(counts.device)
                wrong_b = _wrong(students, ids_bs, start)
                if wrong_b is not None and groups.tp.rank() == groups.cp.rank() == 0:
                    count += torch.stack([(wrong_b == 0).sum(), wrong_b.new_tensor(len(wrong_b))])
    torch.distributed.all_reduce(counts)
    return {panel: Score(*pair) for panel, pair in zip(prompts, counts.int().tolist(), strict=True)}


@contextlib.contextmanager
def evaluating(students: list[GPTModel]) -> Iterator[None]:
    """The students in evaluation mode (no dropout) and without gradients, then as they were."""
    for student in students:
        student.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for student in students:
            student.train()


def _wrong(students: list[GPTModel], ids_bs: Tensor, start: int) -> Tensor | None:
    """How many of the answer's tokens (from ``start`` on) the argmax misses: [b]; None but on the last pipeline stage."""
    (batch, length), config, groups = ids_bs.shape, students[0].config, students[0].pg_collection
    part = SequencePart(length, groups.cp.size(), groups.cp.rank())
    mine = slice(part.start, part.start + part.num_tokens)
    rows = part.num_tokens // (groups.tp.size() if config.sequence_parallel else 1)
    position_ids_bs = torch.arange(mine.start, mine.stop, device=ids_bs.device).expand(batch, -1)
    pipe = P2PCommunicator(groups.pp, config)
    for student in students:
        # of virtual stages, the later ones get what went around the ring of ranks
        student.set_input_tensor(pipe.recv_forward((rows, batch, config.hidden_size), student.pre_process))
        processor = {"output_processor": hidden_and_weight} if student.post_process else {}
        out = student(ids_bs[:, mine], position_ids_bs, None, **processor)
        pipe.send_forward(out, student.post_process)
    if not students[-1].post_process:
        return None
    hidden_sbm, weight_wm = out
    if config.sequence_parallel:
        hidden_sbm = gather_from_sequence_parallel_region(hidden_sbm, group=groups.tp)
    wrong_b = torch.zeros(batch, device=ids_bs.device)
    first, last = max(start, mine.start + 1), min(length, mine.stop + 1)  # the answer's tokens that this part's tokens predict
    if first < last:
        logits_pbw = F.linear(hidden_sbm[first - 1 - mine.start : last - 1 - mine.start], weight_wm)
        predicted_pb = gather_from_tensor_model_parallel_region(logits_pbw, group=groups.tp).argmax(-1)
        wrong_b += (predicted_pb != ids_bs[:, first:last].T).sum(0)
    torch.distributed.all_reduce(wrong_b, group=groups.cp)
    return wrong_b
