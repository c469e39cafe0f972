# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A prompt's score is what greedy decoding earns, whether it decodes or not; replicas share the work without a
trace.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hydra_mcore.costs.batch_sizes import rows_a_forward
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.loading import describe, open_model
from hydra_mcore.evaluation.models import EvaluatedModel
from hydra_mcore.evaluation.scoring import Score, check_seed, score_prompts, shared_out
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.ruler.material import PromptMaterial
from hydra_mcore.ruler.prompts import Prompt
from hydra_mcore.ruler.sets import prompt_set
from hydra_mcore.ruler.wording import load_wording
from tests.support.paths import TINY_TEACHER

SEED, VOCAB, LENGTH = 1_000_000, 1024, 64
ROWS = rows_a_forward(LENGTH)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(TINY_TEACHER)


class Rule:
    """A model by a rule: the next token follows from all before it. Counts rows of its batches."""

    replica, replicas = 0, 1

    def __init__(self, after: Callable[[np.ndarray], int]) -> None:
        self.after, self.batches = after, []

    def predicted(self, ids_bs: Tensor, start: int) -> Tensor:
        self.batches.append(len(ids_bs))
        return torch.tensor([[self.after(ids[:place]) for place in range(start, len(ids))] for ids in ids_bs.numpy()])

    def generated(self, ids_bs: Tensor, room: int, stop: frozenset[int]) -> Tensor:
        self.batches.append(len(ids_bs))
        for _ in range(room):
            ids_bs = torch.cat([ids_bs, torch.tensor([[self.after(ids)] for ids in ids_bs.numpy()])], dim=1)
        return ids_bs[:, -room:]

    def collect(self, mine: list) -> list[list]:
        return [mine]


def mixing(ids: np.ndarray) -> int:
    """A token that depends on all before it and their order."""
    return int((ids * np.arange(1, len(ids) + 1)).sum() % VOCAB)


def placed(ids: np.ndarray) -> int:
    """A token that depends on the prompt and the place alone, so that a wrong token is followed by right ones."""
    return int(ids[: LENGTH - 7].sum() * len(ids) % VOCAB)


def question(
    ids: np.ndarray, answer_ids: Sequence[int] = (), answers: tuple[str, ...] = ("x",), room: int | None = None
) -> Prompt:
    right = np.asarray(answer_ids, dtype=np.int32)
    return Prompt(np.asarray(ids, dtype=np.int32), len(right) if room is None else room, answers, right, (), ())


def right_and_wrong(model: EvaluatedModel, sizes: Sequence[int]) -> tuple[list[Prompt], list[float]]:
    """Prompts of ``LENGTH`` whose answers have these sizes: what the model does say, then every near miss."""
    prompts, expected = [], []
    for index, size in enumerate(sizes):
        ids = np.random.default_rng(index).integers(VOCAB, size=LENGTH - size)
        said = model.generated(torch.from_numpy(ids)[None], size, frozenset())[0].numpy()
        prompts.append(question(ids, said))
        expected.append(1.0)
        for place in range(size):
            near = said.copy()
            near[place] = (near[place] + 1) % VOCAB
            prompts.append(question(ids, near))
            expected.append(0.0)
    return prompts, expected


def scored(
    model: EvaluatedModel, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerFast, by_generation: bool
) -> list[float]:
    return [score for batch in score_prompts(model, prompts, tokenizer, by_generation) for score in batch]


@pytest.mark.parametrize("rule", [mixing, placed])
def test_right_means_every_answer_token_either_way(
    tokenizer: PreTrainedTokenizerFast, rule: Callable[[np.ndarray], int]
) -> None:
    """Answers of unlike sizes stand in one batch, so that each has its own beginning."""
    model = Rule(rule)
    prompts, expected = right_and_wrong(model, [5, 7, 5, 1, 3] * 4)
    assert len(prompts) > ROWS
    for by_generation in (False, True):
        model.batches.clear()
        assert scored(model, prompts, tokenizer, by_generation) == expected
        assert sum(model.batches) == len(prompts) and (by_generation or model.batches == [ROWS, len(prompts) - ROWS])


def test_an_answer_is_scored_at_once_and_not_later(tokenizer: PreTrainedTokenizerFast) -> None:
    answer = tokenizer.encode(" maple")
    late = Rule(lambda ids: 7 if len(ids) == LENGTH - len(answer) else answer[0])
    prompt = question(np.zeros(LENGTH - len(answer)), answer)
    assert scored(late, [prompt], tokenizer, True) == scored(late, [prompt], tokenizer, False) == [0.0]


@pytest.mark.parametrize(
    ("answers", "said", "expected"),
    [
        (("1234567", "7654321"), "are 7654321 and 1234567.", 1.0),
        (("1234567", "7654321", "1111111", "2222222"), "are 12345678, 2222", 0.25),
        (("Maple", "oak"), "MAPLE, or a cloak", 1.0),
        (("maple",), "map le", 0.0),
    ],
)
def test_decoded_text_earns_the_share_of_answers_in_it(
    tokenizer: PreTrainedTokenizerFast, answers: tuple[str, ...], said: str, expected: float
) -> None:
    ids, prompt_ids = tokenizer.encode(said), np.arange(20)
    model = Rule(lambda seen: [*ids, *[0] * 40][len(seen) - 20])  # 0 ends the text
    assert tokenizer.eos_token_id == 0
    assert scored(model, [question(prompt_ids, answers=answers, room=40)], tokenizer, False) == [expected]


def test_replicas_share_each_batch_and_keep_the_order() -> None:
    """Two replicas in two threads, which wait for each other as ranks do."""
    barrier, board = threading.Barrier(2, timeout=20), {}

    class Replica(Rule):
        replicas = 2

        def __init__(self, replica: int) -> None:
            super().__init__(mixing)
            self.replica = replica

        def collect(self, mine: list) -> list[list]:
            board[self.replica] = mine
            barrier.wait()
            lists = [board[0], board[1]]
            barrier.wait()
            return lists

    def run(replica: int) -> tuple[list[list[int]], list[list[int]]]:
        batches: list[list[int]] = []

        def square(items: Sequence[int]) -> list[int]:
            batches.append(list(items))
            return [item**2 for item in items]

        return batches, list(shared_out(Replica(replica), range(7), 2, square))

    with ThreadPoolExecutor(2) as pool:
        (first, of_first), (second, of_second) = pool.map(run, (0, 1))
    assert first == [[0, 2], [4, 6]] and second == [[1, 3], [5]]
    assert of_first == of_second == [[0, 1, 4, 9], [16, 25, 36]]


@pytest.fixture
def teacher(tiny_teacher: Path) -> Iterator[EvaluatedModel]:
    with process_groups():
        yield open_model(describe(tiny_teacher), torch.float32)


def test_both_ways_agree_on_the_tiny_teacher(teacher: EvaluatedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Beyond its native length, where it sometimes fails."""
    source = PromptMaterial(tokenizer, load_wording(None, tokenizer, TINY_TEACHER), None)
    prompts = prompt_set("niah_single_1", 1024, 12, SEED, source).prompts
    forced, decoded = (scored(teacher, prompts, tokenizer, by_generation) for by_generation in (False, True))
    assert forced == decoded and 0 < sum(forced) < len(forced)


# Newcombe, Statistics in Medicine 17 (1998), table I, method 3; and by hand at the edges: n / (n + z^2).
@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert Score(correct, total).interval == pytest.approx((low, high), abs=5e-5)
    assert Score(total - correct, total).interval == pytest.approx((1 - high, 1 - low), abs=5e-5)
    assert low <= Score(correct, total).accuracy <= high


def test_an_interval_ends_at_none_and_at_all() -> None:
    assert all(Score(0, n).interval[0] == 0.0 and Score(n, n).interval[1] == 1.0 for n in range(1, 500))


def test_scores_between_0_and_1_add_up() -> None:
    both = Score.of([0.25, 1.0, 0.5]) + Score.of([0.0])
    assert both == Score(1.75, 4) and both.accuracy == 0.4375
    low, high = both.interval
    assert Score(1, 4).interval[0] < low < 0.4375 < high < Score(2, 4).interval[1]


def test_seeds_of_training_are_refused() -> None:
    check_seed(SEED)
    with pytest.raises(InputError, match="seed 999999: evaluation uses 1000000 and above"):
        check_seed(SEED - 1)


def test_prompts_are_not_changed(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = question(np.arange(LENGTH - 2), [3, 4])
    before = dataclasses.replace(prompt, ids=prompt.ids.copy(), answer_ids=prompt.answer_ids.copy())
    scored(Rule(mixing), [prompt], tokenizer, False)
    assert np.array_equal(prompt.ids, before.ids) and np.array_equal(prompt.answer_ids, before.answer_ids)
