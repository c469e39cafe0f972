# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Communication between parts of a sequence against one process, in float64, gradients included."""

import itertools

import pytest
import torch

from hydra_mcore.errors import InputError
from hydra_mcore.ops.context_parallel import from_previous, gather_parts, swap_with_mirror
from hydra_mcore.sequence import SequencePart
from tests.support.launch import model_parallel, run_ranks
from tests.support.rules import LINEAR_ATTENTION, RULES, Rule

LENGTH = 12 * 25  # parts of 150, 100 and 75 tokens: none a multiple of the chunk
BOUNDS = {
    "dense": None,
    "one document over all parts": (0, LENGTH),
    "on part borders": (0, 75, 150, 225, LENGTH),
    "beside part borders": (0, 74, 76, 149, 151, 299, LENGTH),
    "one token each": (0, 99, 100, 101, 102, 200, LENGTH),
    "on chunk borders": (0, 64, 128, 192, LENGTH),
}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_recurrences_pass_their_state_on(ranks: int) -> None:
    run_ranks(_check_recurrences, ranks, ranks)


def _check_recurrences(rank: int, ranks: int) -> None:
    with model_parallel(cp=ranks):
        for rule, bounds in itertools.product(RULES, BOUNDS.values()):
            _check_recurrence(rule, bounds, rank, ranks)


def _check_recurrence(rule: Rule, bounds: tuple[int, ...] | None, rank: int, ranks: int) -> None:
    mine = slice(rank * LENGTH // ranks, (rank + 1) * LENGTH // ranks)
    whole = [x.requires_grad_() for x in rule.inputs(1 if bounds else 2, LENGTH, 3)[:-1]]
    documents = [rule.truth(*(x[:, a:b] for x in whole)) for a, b in itertools.pairwise(bounds or (0, LENGTH))]
    expected = torch.cat([out for out, _ in documents], dim=1)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(expected, whole, weight)
    leaves = [x.detach()[:, mine].clone().requires_grad_() for x in whole]
    part = SequencePart(LENGTH, ranks, rank, bounds)
    out, _ = rule.ours(*leaves, part=part, cp_group=torch.distributed.group.WORLD)
    torch.testing.assert_close(out, expected[:, mine], rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad(out, leaves, weight[:, mine])
    for x, y in zip(found, gradients, strict=True):
        torch.testing.assert_close(x, y[:, mine], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_state_after_a_part_is_known_on_request(ranks: int) -> None:
    run_ranks(_check_states, ranks, ranks)


def _check_states(rank: int, ranks: int) -> None:
    with model_parallel(cp=ranks):
        for rule in RULES:
            whole = rule.inputs(2, LENGTH, 3)[:-1]
            start, end = rank * LENGTH // ranks, (rank + 1) * LENGTH // ranks
            _, expected = rule.truth(*(x[:, :end] for x in whole))
            asked = {} if rule is LINEAR_ATTENTION else {"state_of_part": True}
            part, group = SequencePart(LENGTH, ranks, rank), torch.distributed.group.WORLD
            _, state = rule.ours(*(x[:, start:end] for x in whole), part=part, cp_group=group, **asked)
            torch.testing.assert_close(state, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_exchanges_and_their_gradients(ranks: int) -> None:
    run_ranks(_check_exchanges, ranks, ranks)


def _check_exchanges(rank: int, ranks: int) -> None:
    with model_parallel(cp=ranks):
        group = torch.distributed.group.WORLD
        x = torch.full((2, 3), float(rank + 1), requires_grad=True)
        seen = {
            "mirror": (swap_with_mirror(x, group), float(ranks - rank), float(10 ** (ranks - 1 - rank))),
            "previous": (from_previous(x, group), float(rank), float(10 ** (rank + 1)) if rank + 1 < ranks else 0.0),
        }
        for name, (out, value, gradient) in seen.items():
            assert out.eq(value).all(), name
            (found,) = torch.autograd.grad(out.sum() * 10.0**rank, x)
            assert found.eq(gradient).all(), name
        joined = gather_parts(x, group)
        assert joined[:, 0].tolist() == [float(r + 1) for r in range(ranks) for _ in range(2)]
        (found,) = torch.autograd.grad((joined * 10.0**rank).sum(), x)
        assert found.eq(sum(10.0**r for r in range(ranks))).all()  # every rank used every part


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("shares", [1, 2, 3])
@pytest.mark.parametrize("documents", [None, (0, 1, 2, 30, 31, 60, 120)])
def test_queries_of_all_ranks_are_all_queries_once(
    cp_size: int, shares: int, documents: tuple[int, ...] | None
) -> None:
    """Every pair of a query and a key it may see belongs to exactly one context- and tensor-parallel rank."""
    seen = torch.zeros(120, 120, dtype=torch.int)
    for cp_rank, share in itertools.product(range(cp_size), range(shares)):
        part = SequencePart(120, cp_size, cp_rank, documents)
        rows = part.query_rows(share, shares)
        for start, end, key_start, key_end in part.segments(rows):
            for query in range(key_end - (end - start), key_end):
                seen[query, key_start : query + 1] += 1
    bounds = documents or (0, 120)
    expected = torch.block_diag(
        *(torch.ones(b - a, b - a, dtype=torch.int).tril() for a, b in itertools.pairwise(bounds))
    )
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("shares", [1, 2, 4])
def test_causal_work_is_the_same_on_every_rank(shares: int) -> None:
    work = set()
    for cp_rank, share in itertools.product(range(4), range(shares)):
        part = SequencePart(4 * 64, 4, cp_rank)
        segments = part.segments(part.query_rows(share, shares))
        work.add(sum(sum(range(key_end - (end - start) + 1, key_end + 1)) for start, end, _, key_end in segments))
    assert len(work) == 1


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ((), "must start at 0"),
        ((0,), "hold at least one document"),
        ((1, 8), "must start at 0"),
        ((0, 4, 4, 8), "must increase from document to document, got 4 after 4"),
        ((0, 6, 5, 8), "got 5 after 6"),
        ((0, 4), "must end at the sequence length 8, got 4"),
        ((0, 4, 9), "must end at the sequence length 8, got 9"),
    ],
)
def test_wrong_boundaries_are_one_line(documents: tuple[int, ...], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        SequencePart(8, documents=documents)
    assert "\n" not in str(error.value)


def test_a_part_must_divide() -> None:
    with pytest.raises(InputError, match="context parallel size 3 does not divide a sequence of 8 tokens"):
        SequencePart(8, 3)
