# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Patching finds the heads that were planted, and none of those that only look as if they did the work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from hydra_mcore.heads import Head
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.selection.observe import observed_scores
from hydra_mcore.selection.probes import ProbeBatch
from hydra_mcore.selection.receivers import PairEffects, receiver_effects
from hydra_mcore.selection.score import CRITICAL, HeadScores, ProbeEffects
from hydra_mcore.selection.scoring import Scoring
from hydra_mcore.selection.senders import SenderRuns
from hydra_mcore.selection.teacher import Teacher
from tests.support.naive_patching import naive_sender_effects
from tests.support.planted import (
    BYSTANDERS,
    CHAIN,
    CHAIN_MATES,
    LOOKALIKES,
    OTHERS,
    OVERRIDDEN,
    PROMPT,
    RECEIVERS,
    SENDERS,
    SHAPE,
    Pairs,
    attention_weights,
    planted_chain,
    planted_model,
    planted_pairs,
)

PAIRS, NEEDLES_BN = planted_pairs(8, seed=0)


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    with process_groups():
        yield


@pytest.fixture
def model() -> GPTModel:
    return planted_model()


@pytest.fixture
def chain() -> GPTModel:
    return planted_chain()


def batch_of(pairs: Pairs = PAIRS) -> ProbeBatch:
    return ProbeBatch("planted", "retrieval", *pairs, source_bp=NEEDLES_BN[:, 1:2])


def measured(model: GPTModel, pairs: Pairs = PAIRS) -> PairEffects:
    return receiver_effects(Teacher(model), batch_of(pairs))


def as_receivers(model: GPTModel) -> Tensor:
    """Effects [l, h, b]."""
    return measured(model).effects_rlhb[0]


def as_senders(model: GPTModel, receivers: list[Head]) -> Tensor:
    """Effects [l, h, b]."""
    runs = SenderRuns(Teacher(model), batch_of(), receivers)
    return torch.stack([runs.effects(layer_idx) for layer_idx in range(SHAPE.num_layers)])


def scored(model: GPTModel, folder: Path) -> ProbeEffects:
    (probe,) = Scoring(Teacher(model), {"planted": [batch_of()]}, folder, {}).exact().values()
    return probe


def critical(effects_lhb: Tensor) -> list[Head]:
    return [tuple(head) for head in (effects_lhb.mean(-1).abs() >= CRITICAL).nonzero().tolist()]


def at(values_lh: Tensor, heads: list[Head]) -> Tensor:
    return torch.stack([values_lh[head] for head in heads])


def mass_on(model: GPTModel, positions_bn: Tensor) -> Tensor:
    """Attention from the asked key to some positions, mean over pairs: [l, h]."""
    weights_lbhs = torch.stack(attention_weights(model, PAIRS[0]))[:, :, :, PROMPT - 1]
    seen_bs = torch.zeros_like(PAIRS[0], dtype=torch.float64).scatter(1, positions_bn, 1.0)
    return torch.einsum("lbhs,bs->lh", weights_lbhs, seen_bs) / len(seen_bs)


def top(values_lh: Tensor, count: int) -> set[Head]:
    return {divmod(index, SHAPE.num_heads) for index in values_lh.flatten().topk(count).indices.tolist()}


def test_every_pair_is_solved_and_the_other_value_turns_it_round(model: GPTModel) -> None:
    clean_bs, corrupt_bs, start, answer_bp, distractor_bp = PAIRS
    turned = corrupt_bs, clean_bs, start, distractor_bp, answer_bp
    for effects in measured(model), measured(model, turned):
        assert effects.solved_b.all()
        assert effects.clean_b.min() > 5 and effects.corrupt_b.max() < -5


def test_critical_heads_are_exactly_the_receivers(model: GPTModel) -> None:
    effects_lhb = as_receivers(model)
    assert critical(effects_lhb) == RECEIVERS
    torch.testing.assert_close(
        at(effects_lhb.mean(-1), RECEIVERS), torch.full((2,), 0.5, dtype=torch.float64), rtol=0, atol=0.05
    )
    assert at(effects_lhb.abs().mean(-1), OTHERS).max() > 1e-5  # they are not dead


def test_overridden_bystanders_would_count_if_nothing_overrode_them(model: GPTModel) -> None:
    with torch.no_grad():
        model.decoder.layers[2].mlp.linear_fc2.weight.zero_()
    effects_lhb = as_receivers(model)
    assert critical(effects_lhb) == sorted(RECEIVERS + OVERRIDDEN)
    assert at(effects_lhb.mean(-1), OVERRIDDEN).min() > 0.2


def test_attention_on_the_needle_cannot_tell_receivers_from_bystanders(model: GPTModel) -> None:
    mass_lh = mass_on(model, NEEDLES_BN)
    assert top(mass_lh, len(RECEIVERS) + len(BYSTANDERS)) == {*RECEIVERS, *BYSTANDERS}
    assert at(mass_lh, BYSTANDERS + RECEIVERS).min() > 0.999
    assert at(mass_lh, SENDERS + LOOKALIKES + OTHERS).max() < 0.1


def test_attention_on_the_value_alone_names_bystanders_only(model: GPTModel) -> None:
    mass_lh = mass_on(model, NEEDLES_BN[:, 1:2])
    assert top(mass_lh, 2) == {(1, 4), (1, 5)} <= {*BYSTANDERS}
    assert at(mass_lh, RECEIVERS).max() < 0.01


def test_attention_weights_are_those_of_the_model(model: GPTModel) -> None:
    """With the model's own values they give what its heads hand to the output projection."""
    values, handed = [], []
    for layer in model.decoder.layers:
        attention = layer.self_attention
        attention.fa.linear_kv.register_forward_hook(
            lambda module, args, output: values.append(output.chunk(2, dim=-1)[1])
        )
        attention.linear_proj.register_forward_pre_hook(lambda module, args: handed.append(args[0]))
    for weights_bhqk, v_sbgd, out_sbn in zip(attention_weights(model, PAIRS[0]), values, handed, strict=True):
        v_sbhd = v_sbgd.double().repeat_interleave(SHAPE.num_heads // SHAPE.num_kv_groups, dim=2)
        expected_sbhd = torch.einsum("bhqk,kbhd->qbhd", weights_bhqk, v_sbhd)
        torch.testing.assert_close(out_sbn.double(), expected_sbhd.flatten(2), rtol=0, atol=1e-5)


def test_the_sender_is_no_receiver_and_carries_the_whole_value(model: GPTModel) -> None:
    """A head that looks where the sender looks is none, nor is a bystander, nor are receivers to each other."""
    effects_lhb = as_senders(model, RECEIVERS)
    assert critical(effects_lhb) == SENDERS
    assert at(effects_lhb.mean(-1), SENDERS).item() == pytest.approx(1.0, abs=0.05)
    assert at(as_receivers(model).mean(-1), SENDERS).abs().max() < 1e-4
    looks_bhs = attention_weights(model, PAIRS[0])[0]
    torch.testing.assert_close(*(looks_bhs[:, head] for _, head in SENDERS + LOOKALIKES), rtol=0, atol=1e-3)


def test_a_sender_counts_by_the_receivers_that_are_asked_for(model: GPTModel) -> None:
    (sender,) = SENDERS
    for some, expected in (([], 0.0), (RECEIVERS[:1], 0.5), (RECEIVERS[1:], 0.5), (SENDERS, 0.0), (OVERRIDDEN, 0.0)):
        effects_lhb = as_senders(model, some)
        assert effects_lhb.mean(-1)[sender].item() == pytest.approx(expected, abs=0.05)


def test_a_scoring_run_ranks_the_circuit_first_and_says_who_sends_to_whom(model: GPTModel, tmp_path: Path) -> None:
    probe = scored(model, tmp_path)
    assert probe.receivers == (
        tuple(RECEIVERS),
    )  # the only sender stands in the first layer, so there is no second round
    scores = HeadScores(SHAPE, "", {"planted": probe})
    assert scores.ranking()[:3] == SENDERS + sorted(RECEIVERS, key=lambda head: -scores.scores_lh[head])
    assert scores.scores_lh[SENDERS[0]] == 1.0 and {
        tuple(head) for head in zip(*scores.scores_lh.nonzero(), strict=True)
    } == {
        *SENDERS,
        *RECEIVERS,
    }


def test_a_chain_solves_every_pair_and_only_its_last_head_is_a_receiver(chain: GPTModel) -> None:
    effects = measured(chain)
    assert effects.solved_b.all()
    assert effects.clean_b.min() > 2 and effects.corrupt_b.max() < -2
    assert critical(effects.effects_rlhb[0]) == CHAIN[:1]


def test_the_heads_beside_a_chain_look_where_it_looks(chain: GPTModel) -> None:
    looks = attention_weights(chain, PAIRS[0])
    for (layer_idx, head_idx), (_, mate_idx) in zip(CHAIN, CHAIN_MATES, strict=True):
        of_both = (looks[layer_idx][:, index] for index in (head_idx, mate_idx))
        torch.testing.assert_close(*of_both, rtol=0, atol=0.05)


def test_each_round_goes_one_step_back_along_a_chain(chain: GPTModel, tmp_path: Path) -> None:
    probe = scored(chain, tmp_path)
    receiver, relay, _ = CHAIN
    assert probe.receivers == ((receiver,), (relay,))
    effects_rlhb = torch.from_numpy(probe.effects_rlhb)
    assert [critical(effects_lhb) for effects_lhb in effects_rlhb] == [[head] for head in CHAIN]
    for effects_lhb, head in zip(effects_rlhb, CHAIN, strict=True):
        torch.testing.assert_close(
            effects_lhb[head], torch.ones_like(effects_lhb[head]), rtol=0, atol=0.05
        )  # on every pair
    for effects_lhb, receivers in zip(effects_rlhb[1:], probe.receivers, strict=True):
        naive_lhb = naive_sender_effects(chain, *PAIRS, receivers)
        torch.testing.assert_close(effects_lhb.mean(-1), naive_lhb.mean(-1), rtol=0, atol=1e-4)


def test_a_sender_two_steps_back_needs_a_round_of_its_own(chain: GPTModel) -> None:
    """Together with the relay, the receiver hands on what it saw while the relay was held: nothing new."""
    receiver, relay, sender = CHAIN
    for receivers, expected in (([relay], 1.0), ([receiver], 0.0), ([receiver, relay], 0.0)):
        assert as_senders(chain, receivers).mean(-1)[sender].item() == pytest.approx(expected, abs=0.01)


def test_a_scoring_run_ranks_a_whole_chain_first(chain: GPTModel, tmp_path: Path) -> None:
    scores = HeadScores(SHAPE, "", {"planted": scored(chain, tmp_path)})
    assert set(scores.ranking()[:3]) == set(CHAIN)
    for values_lh in scores.scores_lh, scores.effects_lh:
        assert [values_lh[head] for head in CHAIN] == pytest.approx([1.0] * 3, abs=0.05)
        assert max(values_lh[head] for head in scores.ranking()[3:]) < CRITICAL


def test_observed_scores_are_the_attention_on_the_value(model: GPTModel) -> None:
    mass_lhb, copied_lhb = observed_scores(Teacher(model), batch_of())
    torch.testing.assert_close(mass_lhb.mean(-1), mass_on(model, NEEDLES_BN[:, 1:2]), rtol=1e-4, atol=1e-6)
    assert {tuple(head) for head in (copied_lhb.mean(-1) > 0.5).nonzero().tolist()} == {
        (1, 4),
        (1, 5),
    }  # bystanders, both


def test_observed_scores_of_a_longer_answer_follow_each_of_its_tokens(model: GPTModel) -> None:
    clean_bs, corrupt_bs, *_ = PAIRS
    start = clean_bs.shape[1] - 3
    source_bp = torch.stack([torch.arange(at, at + 3) for at in range(5, 5 + len(clean_bs))])
    pairs = (clean_bs, corrupt_bs, start, clean_bs[:, start:], corrupt_bs[:, start:])
    mass_lhb, copied_lhb = observed_scores(
        Teacher(model), ProbeBatch("longer", "retrieval", *pairs, source_bp=source_bp)
    )
    for layer_idx, weight_bhss in enumerate(attention_weights(model, clean_bs)):
        asking_bhps = weight_bhss[:, :, start - 1 : -1]
        for b, positions in enumerate(source_bp):
            torch.testing.assert_close(
                mass_lhb[layer_idx, :, b], asking_bhps[b, :, :, positions].sum(-1).mean(-1), rtol=1e-4, atol=1e-6
            )
            torch.testing.assert_close(
                copied_lhb[layer_idx, :, b], (asking_bhps[b].argmax(-1) == positions).double().mean(-1)
            )
    assert copied_lhb.any()
