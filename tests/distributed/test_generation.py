# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding from memory on every layout gives what whole forward passes on one process give."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_mcore.config import HydraOptions, ModelCard
from hydra_mcore.sequence import SequencePart
from tests.distributed.test_evaluation_layouts import build
from tests.support.launch import model_parallel, run_ranks
from tests.support.naive_decoding import naive_decoding
from tests.support.stages import SHAPE, make_run

ROOM = 6
LENGTHS = (5, 263, 264)  # too short to be divided; ranks that divide it leave one token or three; they leave none
TWO = [{"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"cp": 2}, {"pp": 2}]
SHARED_HEADS = {"tp": 2, "cp": 2, "sequence_parallel": True, "fa_balance": "queries"}
FOUR = [{"tp": 2, "cp": 2}, {"cp": 4}, {"pp": 2, "cp": 2}, {"tp": 2, "pp": 2}, {"pp": 2, "vpp": 2}]


def prompts(length: int) -> Tensor:
    return torch.randint(SHAPE.vocab_size, (2, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("generation"))


@pytest.fixture(scope="module")
def expected(students: Path) -> dict[int, tuple[Tensor, Tensor]]:
    """Of each length's prompts: tokens and logits."""
    return run_ranks(_naive, 1, students / "student")[0]


def _naive(rank: int, checkpoint: Path) -> dict[int, tuple[Tensor, Tensor]]:
    from hydra_mcore.model.build import load_model

    with model_parallel():
        _, model = load_model(checkpoint)
        return {length: naive_decoding(model, prompts(length), ROOM) for length in LENGTHS}


def _decoded(
    rank: int, checkpoint: Path, layouts: list[dict[str, Any]]
) -> list[dict[int, tuple[Tensor, Tensor | None]]]:
    """On each layout: every rank's tokens and, where this rank chose them, its part of the logits [b, step, w]."""
    from hydra_mcore.evaluation.generation import from_memory, greedy
    from hydra_mcore.evaluation.parallel import ParallelModel
    from hydra_mcore.model.checkpoints import load_weights

    found = []
    for layout in layouts:
        sizes = {name: size for name, size in layout.items() if name in ("tp", "cp", "pp", "vpp")}
        with model_parallel(**sizes), torch.no_grad():
            kind = (layout.get("vpp", 1), layout.get("sequence_parallel", False), layout.get("fa_balance", "heads"))
            chunks = build(ModelCard.load(checkpoint), *kind)
            load_weights(chunks, checkpoint)
            model = ParallelModel([chunk.eval() for chunk in chunks])
            found.append({LENGTHS[0]: (greedy(model, prompts(LENGTHS[0]), ROOM, frozenset()), None)})
            for length in LENGTHS[1:]:
                tokens, logits = zip(*itertools.islice(from_memory(model, prompts(length), ROOM), ROOM), strict=True)
                chose = logits[0] is not None and model.groups.cp.rank() == model.groups.cp.size() - 1
                found[-1][length] = (
                    torch.stack(tokens, 1),
                    (model.groups.tp.rank(), torch.stack(logits, 1)) if chose else None,
                )
    return found


def check(
    students: Path, expected: dict[int, tuple[Tensor, Tensor]], ranks: int, layouts: list[dict[str, Any]]
) -> None:
    by_rank = run_ranks(_decoded, ranks, students / "student", layouts)
    for (number, layout), length in itertools.product(enumerate(layouts), LENGTHS):
        tokens_bs, logits_bsw = expected[length]
        choosers = 0
        for found in by_rank:
            found_bs, chosen = found[number][length]
            assert torch.equal(found_bs, tokens_bs), f"{layout}, {length} tokens"
            if chosen is not None:
                tp_rank, part_bsw = chosen
                whole_bsw = logits_bsw.chunk(layout.get("tp", 1), dim=-1)[tp_rank]
                torch.testing.assert_close(
                    part_bsw, whole_bsw, rtol=0, atol=1e-5, msg=lambda text, at=layout: f"{at}: {text}"
                )
                choosers += 1
        assert length == LENGTHS[0] or choosers == ranks // layout.get("cp", 1) // layout.get("pp", 1)


def test_two_ranks(students: Path, expected: dict[int, tuple[Tensor, Tensor]]) -> None:
    check(students, expected, 2, TWO)


def test_heads_shared_by_ranks_that_also_divide_the_row(
    students: Path, expected: dict[int, tuple[Tensor, Tensor]]
) -> None:
    check(students, expected, 4, [SHARED_HEADS])


@pytest.mark.slow
def test_other_layouts_of_four_ranks(students: Path, expected: dict[int, tuple[Tensor, Tensor]]) -> None:
    check(students, expected, 4, FOUR)


@pytest.mark.slow
def test_keys_and_values_of_both_branches(tmp_path: Path) -> None:
    """Shared projections, whose kv groups tensor-parallel ranks must split, and short convolutions of many taps."""
    options = HydraOptions(
        gdn_kv="per_group", qkv="shared", gdn_conv_kernel=8, fusion="competition", fa_position="rope"
    )
    folder = make_run(tmp_path, options=options)
    check(folder, run_ranks(_naive, 1, folder / "student")[0], 4, [SHARED_HEADS, *FOUR[:2]])


# What crosses ranks, by itself.


def test_states_and_softmax_of_parts_are_those_of_the_whole() -> None:
    run_ranks(_check_parts, 3)


def _check_parts(rank: int) -> None:
    from hydra_mcore.ops import fla_kernels
    from hydra_mcore.ops.chunked_delta_rule import chunked_delta_rule
    from hydra_mcore.ops.context_parallel import from_last, merge_softmax
    from hydra_mcore.ops.gated_delta import gated_delta_rule

    def kernel(*, q, k, v, g, beta, scale, initial_state, output_final_state):
        """Flash-linear-attention's names on the torch reference."""
        assert output_final_state
        return chunked_delta_rule(q, k, v, g, beta, scale=scale, initial_state_bhdv=initial_state)

    torch.manual_seed(0)
    with model_parallel(cp=3):
        group, s = torch.distributed.group.WORLD, 70
        q, k = (F.normalize(torch.randn(2, 3 * s, 4, 8), dim=-1) for _ in range(2))
        v, log_decay, write = torch.randn(2, 3 * s, 4, 6), -0.1 * torch.rand(2, 3 * s, 4), torch.rand(2, 3 * s, 4)
        inputs, mine = (q, k, v, log_decay, write), slice(rank * s, (rank + 1) * s)
        expected, _ = gated_delta_rule(*inputs)
        _, state = gated_delta_rule(*(x[:, : mine.stop] for x in inputs))
        mine_only, part = [x[:, mine] for x in inputs], SequencePart(3 * s, 3, rank)
        found = gated_delta_rule(*mine_only, part=part, cp_group=group, state_of_part=True)
        torch.testing.assert_close(found, (expected[:, mine], state), rtol=0, atol=2e-6)
        fla_kernels.kernels = lambda: SimpleNamespace(delta=kernel)  # in this process
        fla_kernels.serve = lambda x: x.numel() > 0
        found = gated_delta_rule(*mine_only, part=part, cp_group=group, state_of_part=True)
        torch.testing.assert_close(found, (expected[:, mine], state), rtol=0, atol=2e-6)
        score, value = (
            300 * torch.randn(2, 4, 5, 3 * s, dtype=torch.float64),
            torch.randn(2, 4, 3 * s, 6, dtype=torch.float64),
        )
        own, own_value = score[..., mine], value[:, :, mine]
        merged = merge_softmax(own.softmax(-1) @ own_value, own.logsumexp(-1, keepdim=True), group)
        torch.testing.assert_close(merged, score.softmax(-1) @ value, rtol=0, atol=1e-12)
        assert from_last(torch.full((2,), rank), group).tolist() == [2, 2]
