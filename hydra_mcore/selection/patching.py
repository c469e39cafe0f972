# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The exact receiver effect (paper Eq 9-10) of every head, from two forward passes a batch of pairs.

Patching a head means: its output (its columns of the output projection's input) comes from the corrupt run, at
all positions, while the attention outputs of all later layers stay at their clean values. So the patch travels
only along residual stream and MLPs, which act on each position by itself, and the metric reads only the answer
positions. Hence the short way is no approximation: record both runs at the answer positions, add the patched
head's difference there, and run the MLPs above it over those few tokens, all heads of a layer as one batch.
``tests/support/naive_patching.py`` does it the long way, and ``tests/parity/test_patching.py`` compares.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from hydra_mcore.config import ModelShape

DECAY = 0.9  # lambda of Eq 9


@dataclass(frozen=True, eq=False)
class Trace:
    """What one forward pass left at the answer positions (p of them), one entry a layer."""

    residual_pbm: list[Tensor]  # the layer's input
    heads_pbhd: list[Tensor]  # what each head hands to the output projection
    attention_pbm: list[Tensor]  # the attention block's output
    logits_bpw: Tensor


@dataclass(frozen=True, eq=False)
class PairEffects:
    """The result for a batch of pairs."""

    effects_lhb: Tensor  # Eq 10, float64: 1 when a head alone moves the metric as far as the corrupt prompt does
    clean_b: Tensor  # m(x), in logits
    corrupt_b: Tensor  # m(x')
    solved_b: Tensor  # bool: the clean run's argmax is the answer at every position


def answer_metric(chosen_bp: Tensor, other_bp: Tensor, decay: float = DECAY) -> Tensor:
    """Eq 9: mean over answer positions j of z_j[a+] - z_j[a-], weighted by decay^j; [..., p] logits -> [...] in float64."""
    difference = chosen_bp.double() - other_bp.double()
    weight_p = decay ** torch.arange(difference.shape[-1], dtype=torch.float64, device=difference.device)
    return (difference * weight_p).sum(-1) / weight_p.sum()


@torch.no_grad()
def receiver_effects(
    model: GPTModel,
    clean_bs: Tensor,
    corrupt_bs: Tensor,
    answer_start: int,
    answer_bp: Tensor,
    distractor_bp: Tensor,
    decay: float = DECAY,
) -> PairEffects:
    """Eq 10 for all heads: (m(x) - m(x; O_lh <- O_lh(x'))) / (m(x) - m(x')).

    Args:
        model: a teacher (every head FA) in evaluation mode, whole on this rank.
        clean_bs, corrupt_bs: token ids, the answer teacher-forced from ``answer_start`` to the end in both.
        answer_bp, distractor_bp: the answer's tokens and those that the corrupt haystack has instead.

    Pairs whose metric the corruption does not move divide by about zero: judge by ``clean_b - corrupt_b``.
    """
    clean, corrupt = (_run(model, ids_bs, answer_start) for ids_bs in (clean_bs, corrupt_bs))
    metric = {}
    for name, trace in (("clean", clean), ("corrupt", corrupt)):
        chosen, other = (trace.logits_bpw.gather(-1, ids[..., None])[..., 0] for ids in (answer_bp, distractor_bp))
        metric[name] = answer_metric(chosen, other, decay)
    layers = range(len(clean.heads_pbhd))
    patched_lhb = torch.stack([_patched_metric(model, clean, corrupt, layer, answer_bp, distractor_bp, decay) for layer in layers])
    return PairEffects(
        effects_lhb=(metric["clean"] - patched_lhb) / (metric["clean"] - metric["corrupt"]),
        clean_b=metric["clean"],
        corrupt_b=metric["corrupt"],
        solved_b=(clean.logits_bpw.argmax(-1) == answer_bp).all(-1),
    )


def _patched_metric(
    model: GPTModel, clean: Trace, corrupt: Trace, layer_idx: int, answer_bp: Tensor, distractor_bp: Tensor, decay: float
) -> Tensor:
    """m(x; O_lh <- O_lh(x')) for each head of one layer: [h, b]."""
    projection_mhd = model.decoder.layers[layer_idx].self_attention.linear_proj.weight.unflatten(1, clean.heads_pbhd[0].shape[2:])
    change_pbhd = corrupt.heads_pbhd[layer_idx] - clean.heads_pbhd[layer_idx]
    change_phbm = torch.einsum("pbhd,mhd->phbm", change_pbhd, projection_mhd)
    num_heads, pairs = change_phbm.shape[1:3]

    x_phbm = clean.residual_pbm[layer_idx][:, None] + clean.attention_pbm[layer_idx][:, None] + change_phbm
    x_pnm = _mlp(model, layer_idx, x_phbm.flatten(1, 2))
    for later in range(layer_idx + 1, len(clean.attention_pbm)):
        x_pnm = _mlp(model, later, x_pnm + clean.attention_pbm[later].repeat(1, num_heads, 1))
    x_pnm = model.decoder.final_layernorm(x_pnm)

    # Two logits a position are read, so only their rows of the output weight are multiplied.
    x_hbpm = x_pnm.unflatten(1, (num_heads, pairs)).permute(1, 2, 0, 3)
    weight_wm = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else model.output_layer.weight
    chosen, other = ((x_hbpm * weight_wm[ids]).sum(-1) for ids in (answer_bp, distractor_bp))
    return answer_metric(chosen, other, decay)


def _mlp(model: GPTModel, layer_idx: int, x_pnm: Tensor) -> Tensor:
    """The second half of a layer: residual plus MLP."""
    layer = model.decoder.layers[layer_idx]
    return x_pnm + layer.mlp(layer.pre_mlp_layernorm(x_pnm))[0]


def _run(model: GPTModel, ids_bs: Tensor, answer_start: int) -> Trace:
    """One forward pass that keeps only the positions whose logits predict the answer."""
    length = ids_bs.shape[1]
    answer = slice(answer_start - 1, length - 1)
    trace: dict[str, list[Tensor]] = {"residual": [], "heads": [], "attention": []}
    position_ids_bs = torch.arange(length, device=ids_bs.device).expand_as(ids_bs)
    with _recording(model, answer, trace):
        logits_bpw = model(ids_bs, position_ids_bs, None)
    return Trace(trace["residual"], trace["heads"], trace["attention"], logits_bpw)


@contextlib.contextmanager
def _recording(model: GPTModel, answer: slice, trace: dict[str, list[Tensor]]) -> Iterator[None]:
    """Hooks that fill ``trace``, and let only the answer positions into the output layer (a vocabulary wide each)."""
    num_heads = model.config.num_attention_heads

    # Copies: a view would keep the whole sequence in memory, and Megatron adds to the attention output in place.
    def layer_input(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        trace["residual"].append((args[0] if args else kwargs["hidden_states"])[answer].clone())

    def head_outputs(module: Any, args: tuple) -> None:
        trace["heads"].append(args[0][answer].clone().unflatten(-1, (num_heads, -1)))

    def attention_output(module: Any, args: tuple, output: tuple) -> None:
        trace["attention"].append(output[0][answer].clone())

    def before_logits(module: Any, args: tuple) -> tuple:
        return (args[0][answer], *args[1:])

    hooks = [model.output_layer.register_forward_pre_hook(before_logits)]
    for layer in model.decoder.layers:
        hooks.append(layer.register_forward_pre_hook(layer_input, with_kwargs=True))
        hooks.append(layer.self_attention.linear_proj.register_forward_pre_hook(head_outputs))
        hooks.append(layer.self_attention.register_forward_hook(attention_output))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def patching_flops(shape: ModelShape, length: int, pairs: int, answer_tokens: int) -> float:
    """Floating-point operations of ``receiver_effects`` over ``pairs`` pairs, the output layer left out (few positions)."""
    heads = shape.num_heads * shape.head_dim
    mlp = 6 * shape.hidden_size * shape.ffn_hidden_size
    projections = 2 * shape.hidden_size * (2 * heads + 2 * shape.num_kv_groups * shape.head_dim)
    forward = length * shape.num_layers * (mlp + projections + 2 * length * heads)
    patched = answer_tokens * shape.num_heads * mlp * shape.num_layers * (shape.num_layers + 1) / 2
    return pairs * (2 * forward + patched)
