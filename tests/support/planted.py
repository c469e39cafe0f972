# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Two teachers whose retrieval circuits are known, because their weights are set by hand.

A prompt hides needles ``key value end`` in noise and asks for one of them by ``marker key``; every key has an end token
of its own. The residual stream has a place for every fact, one axis a token (CONST, SELF, ... below).

``planted_model`` takes the value in one hop, and has heads that only look as if they did:

    SENDERS      layer 0        look one token back and note that token in PREV: so an end token knows its needle's
        value
    RECEIVERS    layers 1, 2    look from the asked key to its end token and copy the value from PREV to OUT, which the
                                logits read; each does half of the work
    OVERRIDDEN   layer 1        look at the needle just as hard, and write the value to SHADOW, which the logits read as
                                well; but the MLP of layer 2 erases it
    SILENT       layers 1, 2    look at the needle just as hard, and write nothing, or where nobody reads
    LOOKALIKES   layer 0        look one token back as the senders do, and write where nobody reads
    OTHERS                      random heads

``planted_chain`` takes it in two hops, by the three heads of CHAIN:

    sender       layer 0        as above: the end token knows the value
    relay        layer 1        looks one token back and carries the value on from PREV to RELAYED, so that the token
    after
                                the end token knows it
    receiver     layer 2        looks from the asked key to that token, which the sender told that the end token stands
                                before it, and copies the value from RELAYED to OUT
    CHAIN_MATES                 look where these three look, and write where nobody reads

All other weights are small and random. A swapped value changes what the heads carry, not where they look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from hydra_mcore.config import ModelShape, teacher_card
from hydra_mcore.heads import Head
from hydra_mcore.model.build import build_model

# Tokens
KEYS, ENDS, VALUES, NOISE, MARKER, VOCABULARY = range(4), range(4, 8), range(8, 16), range(16, 23), 23, 24

# Axes of the residual stream. CONST is large, so that a row's RMS hardly depends on what else was written to the row.
CONST, SELF, PREV, OUT, SHADOW, UNREAD = 0, range(1, 25), range(25, 49), range(49, 57), range(57, 65), range(65, 89)
RELAYED = SHADOW  # the chain has nothing to put in a shadow
LEVEL = 10.0  # of CONST; a fact has about 1

SHAPE = ModelShape(
    num_layers=3, hidden_size=96, num_heads=6, num_kv_groups=3, head_dim=32, ffn_hidden_size=33, vocab_size=VOCABULARY,
    native_length=64, rope_theta=1e6, tied_embeddings=False, qk_norm=False,
)  # fmt: skip

# Rotary pairs (j, j + HALF) of a head: the first turn fast and tell positions apart; the last turn by a thousandth over
# a whole prompt, so that they can hold names.
HALF = SHAPE.head_dim // 2
FAST, SLOW = range(4), range(HALF - len(KEYS), HALF)
TURN = [SHAPE.rope_theta ** (-pair / HALF) for pair in range(HALF)]  # radians a token

# (layer_idx, head_idx). Heads 2g and 2g + 1 share keys and values.
SENDERS, LOOKALIKES = [(0, 3)], [(0, 2)]
RECEIVERS = [(1, 0), (2, 3)]
OVERRIDDEN, SILENT = [(1, 1), (1, 4)], [(1, 5), (2, 2)]
BYSTANDERS = OVERRIDDEN + SILENT
_HEADS = [(layer, head) for layer in range(SHAPE.num_layers) for head in range(SHAPE.num_heads)]
OTHERS = [at for at in _HEADS if at not in SENDERS + LOOKALIKES + RECEIVERS + BYSTANDERS]

CHAIN = [(2, 3), (1, 0), (0, 3)]  # receiver, relay, sender
CHAIN_MATES = [(2, 2), (1, 1), (0, 2)]

PROMPT, BLOCK, NEEDLES = 40, 12, 3  # tokens before the answer; a needle stands in each of the first blocks

Pairs = tuple[Tensor, Tensor, int, Tensor, Tensor]  # the arguments of receiver_effects after the model


@torch.no_grad()
def planted_model() -> GPTModel:
    """The model of one hop, in evaluation mode; needs Megatron's process groups."""
    model = _noting_model(OTHERS)
    for answer in (OUT, SHADOW):
        _join(model.output_layer.weight, VALUES, answer, 6.0)

    noted, present = _of(PREV, VALUES), _of(SELF, VALUES)
    _look_for_needle(model, 1, heads=(0, 1), by=_of(SELF, ENDS))
    _copy(model, 1, read=noted, write={0: OUT, 1: SHADOW})
    _look_for_needle(model, 1, heads=(4, 5), by=_of(PREV, KEYS))  # at the value itself, which the key precedes
    _copy(model, 1, read=present, write={4: SHADOW, 5: ()})
    _look_for_needle(model, 2, heads=(2, 3), by=_of(SELF, ENDS))
    _copy(model, 2, read=noted, write={2: UNREAD[: len(VALUES)], 3: OUT})
    _erase_shadow(model, 2)
    return model


@torch.no_grad()
def planted_chain() -> GPTModel:
    """The model of two hops, for the same prompts."""
    model = _noting_model([at for at in _HEADS if at not in CHAIN + CHAIN_MATES])
    _join(model.output_layer.weight, VALUES, OUT, 6.0)

    unread = UNREAD[: len(VALUES)]
    _look_one_back(model, 1, heads=(0, 1))
    _copy(model, 1, read=_of(PREV, VALUES), write={0: RELAYED, 1: unread})
    _look_for_needle(model, 2, heads=(2, 3), by=_of(PREV, ENDS))  # at the token that the end token precedes
    _copy(model, 2, read=RELAYED, write={2: unread, 3: OUT})
    return model


def _noting_model(others: Sequence[Head]) -> GPTModel:
    """What both models begin with: embeddings, the sender and its lookalike in layer 0, random heads."""
    model = build_model(teacher_card(SHAPE, "0" * 64)).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() == 2:  # norm weights stay 1
            parameter.normal_(0.0, 0.002, generator=generator)
    for layer, head in others:  # alive, but no part of this
        for weight in (
            _queries(model, layer)[head],
            *_keys_values(model, layer, head),
            _projections(model, layer)[:, head],
        ):
            weight.normal_(0.0, 0.02, generator=generator)
    embedding = model.embedding.word_embeddings.weight
    embedding[:, CONST] += LEVEL
    _join(embedding, range(VOCABULARY), SELF, 1.0)
    _look_one_back(model, 0, heads=(2, 3))
    _copy(model, 0, read=SELF, write={2: UNREAD, 3: PREV})
    return model


def _of(axes: range, tokens: range) -> range:
    """The axes of some tokens."""
    return axes[tokens.start : tokens.stop]


def _join(weight: Tensor, outputs: Sequence[int], inputs: Sequence[int], gain: float) -> None:
    """The first output reads the first input, the second the second, and so on."""
    weight[list(outputs), list(inputs)] += gain


def _queries(model: GPTModel, layer_idx: int) -> Tensor:
    """[h, d, m], a view as the two below are."""
    return model.decoder.layers[layer_idx].self_attention.fa.linear_q.weight.unflatten(0, (SHAPE.num_heads, -1))


def _keys_values(model: GPTModel, layer_idx: int, head_idx: int) -> tuple[Tensor, Tensor]:
    """[d, m] each: those of the head's group."""
    weight = model.decoder.layers[layer_idx].self_attention.fa.linear_kv.weight
    return weight.unflatten(0, (SHAPE.num_kv_groups, 2, -1))[head_idx * SHAPE.num_kv_groups // SHAPE.num_heads].unbind(
        0
    )


def _projections(model: GPTModel, layer_idx: int) -> Tensor:
    """[m, h, d]."""
    return model.decoder.layers[layer_idx].self_attention.linear_proj.weight.unflatten(1, (SHAPE.num_heads, -1))


def _look_one_back(model: GPTModel, layer_idx: int, heads: Sequence[int]) -> None:
    """Constant queries and keys, the queries turned back by one token: their product is greatest at distance 1."""
    gain, keys = 1.5, _keys_values(model, layer_idx, heads[0])[0]
    for pair in FAST:
        keys[pair, CONST] += gain
        for head in heads:
            query = _queries(model, layer_idx)[head]
            query[pair, CONST] += gain * math.cos(TURN[pair])
            query[pair + HALF, CONST] -= gain * math.sin(TURN[pair])


def _look_for_needle(model: GPTModel, layer_idx: int, heads: Sequence[int], by: range) -> None:
    """A key token looks where ``by`` has what belongs to it."""
    gain = 11.0
    _join(_keys_values(model, layer_idx, heads[0])[0], SLOW, by, gain)
    for head in heads:
        _join(_queries(model, layer_idx)[head], SLOW, _of(SELF, KEYS), gain)


def _copy(model: GPTModel, layer_idx: int, read: range, write: Mapping[int, Sequence[int]]) -> None:
    """The heads in ``write``, all of one group, copy the axes ``read`` of where they look to those given here."""
    _join(_keys_values(model, layer_idx, min(write))[1], range(len(read)), read, 1.0)
    for head, axes in write.items():
        _join(_projections(model, layer_idx)[:, head], axes, range(len(axes)), 1.0)


def _erase_shadow(model: GPTModel, layer_idx: int) -> None:
    """An MLP that takes away what stands in SHADOW: its gates see CONST alone and are all alike."""
    mlp = model.decoder.layers[layer_idx].mlp
    gate, up = mlp.linear_fc1.weight.chunk(2)
    # Beside CONST, the asked key then holds one fact each in SELF and PREV, two in UNREAD, and twice the value in OUT
    # and SHADOW.
    rms = math.sqrt((LEVEL**2 + 4 + 2 * 2**2) / SHAPE.hidden_size)
    open_gate = 4.0
    gate[: len(SHADOW), CONST] += open_gate * rms / LEVEL
    _join(up, range(len(SHADOW)), SHADOW, rms)
    _join(mlp.linear_fc2.weight, SHADOW, range(len(SHADOW)), -1.0 / F.silu(torch.tensor(open_gate)).item())


def planted_pairs(count: int, seed: int) -> tuple[Pairs, Tensor]:
    """Pairs for ``receiver_effects``, and the positions [b, 3] of the asked needle's tokens."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(tokens: range, number: int) -> Tensor:
        return tokens.start + torch.randperm(len(tokens), generator=generator)[:number]

    clean, corrupt, needles, answers, distractors = [], [], [], [], []
    for _ in range(count):
        ids_s = NOISE.start + torch.randint(len(NOISE), (PROMPT + 1,), generator=generator)
        keys, (*values, distractor) = drawn(KEYS, NEEDLES), drawn(VALUES, NEEDLES + 1)
        places = BLOCK * torch.arange(NEEDLES) + torch.randint(BLOCK - 2, (NEEDLES,), generator=generator)
        for place, key, value in zip(places, keys, values, strict=True):
            ids_s[place : place + 3] = torch.stack([key, value, key + ENDS.start])
        asked = int(torch.randint(NEEDLES, (), generator=generator))
        ids_s[-3:] = torch.stack([torch.tensor(MARKER), keys[asked], values[asked]])
        clean.append(ids_s)
        corrupt.append(ids_s.clone())
        corrupt[-1][places[asked] + 1] = distractor
        needles.append(places[asked] + torch.arange(3))
        answers.append(values[asked][None])
        distractors.append(distractor[None])
    pairs = torch.stack(clean), torch.stack(corrupt), PROMPT, torch.stack(answers), torch.stack(distractors)
    return pairs, torch.stack(needles)


@torch.no_grad()
def attention_weights(model: GPTModel, ids_bs: Tensor) -> list[Tensor]:
    """Where every head of a planted model looks: [b, h, s, s] for each layer, from its queries and keys."""
    queries, keys, hooks = [], [], []
    for layer in model.decoder.layers:
        heads = layer.self_attention.fa
        hooks.append(heads.linear_q.register_forward_hook(lambda module, args, output: queries.append(output)))
        hooks.append(
            heads.linear_kv.register_forward_hook(lambda module, args, output: keys.append(output.chunk(2, dim=-1)[0]))
        )
    positions = torch.arange(ids_bs.shape[1])
    model(ids_bs, positions.expand_as(ids_bs), None)
    for hook in hooks:
        hook.remove()
    later = positions[None] > positions[:, None]
    result = []
    for q_sbhd, k_sbgd in zip(queries, keys, strict=True):
        k_sbhd = k_sbgd.repeat_interleave(SHAPE.num_heads // SHAPE.num_kv_groups, dim=2)
        scores_bhqk = torch.einsum("qbhd,kbhd->bhqk", _turned(q_sbhd), _turned(k_sbhd)) / math.sqrt(SHAPE.head_dim)
        result.append(scores_bhqk.masked_fill(later, -math.inf).softmax(-1))
    return result


def _turned(x_sbhd: Tensor) -> Tensor:
    """Rotary positions as complex numbers: pair (j, j + HALF) times exp(i * position * TURN[j])."""
    angles_sd = torch.arange(x_sbhd.shape[0])[:, None] * torch.tensor(TURN, dtype=torch.float64)
    pairs = (
        torch.complex(*x_sbhd.double().chunk(2, dim=-1))
        * torch.polar(torch.ones_like(angles_sd), angles_sd)[:, None, None]
    )
    return torch.cat([pairs.real, pairs.imag], dim=-1)
