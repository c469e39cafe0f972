# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Eq 10 and path patching by their definition: full forward passes for every head, by hooks.

Slow, and free of cleverness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor


def naive_receiver_effects(
    model,
    clean_bs: Tensor,
    corrupt_bs: Tensor,
    answer_start: int,
    answer_bp: Tensor,
    distractor_bp: Tensor,
    freeze: bool = True,
    step: float = 1.0,
) -> Tensor:
    """Effects [layers, heads, pairs]; ``freeze=False`` lets later attention layers react to the patch.

    Args:
        step: how far a head's output goes from its clean to its corrupt value.
    """
    num_heads, width = model.config.num_attention_heads, model.config.kv_channels
    clean_logits, clean_heads = _run(model, clean_bs)
    corrupt_logits, corrupt_heads = _run(model, corrupt_bs)
    effect = _effect_of(clean_logits, corrupt_logits, answer_start, answer_bp, distractor_bp)
    effects = torch.zeros(len(clean_heads), num_heads, len(answer_bp), dtype=torch.float64)
    for patched in range(len(clean_heads)):
        for head in range(num_heads):
            columns = slice(head * width, (head + 1) * width)

            def change(layer, heads_sbn, patched=patched, columns=columns):
                if layer > patched and freeze:
                    return clean_heads[layer]
                mixed = heads_sbn.clone()
                if layer == patched:
                    mixed[..., columns] += step * (corrupt_heads[layer] - mixed)[..., columns]
                return mixed

            patched_logits, _ = _run(model, clean_bs, change)
            effects[patched, head] = effect(patched_logits)
    return effects


def naive_sender_effects(
    model,
    clean_bs: Tensor,
    corrupt_bs: Tensor,
    answer_start: int,
    answer_bp: Tensor,
    distractor_bp: Tensor,
    receivers: Sequence[tuple[int, int]],
) -> Tensor:
    """Path patching (Wang et al., arXiv 2211.00593) of every head as the sender: effects [layers, heads, pairs].

    (C) The clean prompt, the sender's output from the corrupt run, every other head's from the clean run, receivers
    included; MLPs react. What the receivers compute there is recorded. It is not passed on: a sender reaches each
    receiver by the residual stream and MLPs, not through another receiver.
    (D) The clean prompt, only the receivers' outputs replaced by the recorded ones; all that follows reacts.

    A receiver at or below the sender records its clean output, so nothing needs to be left out here.
    """
    num_heads, width = model.config.num_attention_heads, model.config.kv_channels

    def columns(head):
        return slice(head * width, (head + 1) * width)

    clean_logits, clean_heads = _run(model, clean_bs)
    corrupt_logits, corrupt_heads = _run(model, corrupt_bs)
    effect = _effect_of(clean_logits, corrupt_logits, answer_start, answer_bp, distractor_bp)
    effects = torch.zeros(len(clean_heads), num_heads, len(answer_bp), dtype=torch.float64)
    for sender_layer in range(len(clean_heads)):
        for sender in range(num_heads):
            frozen = [heads_sbn.clone() for heads_sbn in clean_heads]
            frozen[sender_layer][..., columns(sender)] = corrupt_heads[sender_layer][..., columns(sender)]
            _, recorded = _run(model, clean_bs, lambda layer, heads_sbn, frozen=frozen: frozen[layer])

            def receive(layer, heads_sbn, recorded=recorded):
                mixed = heads_sbn.clone()
                for receiver_layer, receiver in receivers:
                    if receiver_layer == layer:
                        mixed[..., columns(receiver)] = recorded[layer][..., columns(receiver)]
                return mixed

            patched_logits, _ = _run(model, clean_bs, receive)
            effects[sender_layer, sender] = effect(patched_logits)
    return effects


def _run(model, ids_bs: Tensor, change: Callable[[int, Tensor], Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
    """Logits, and what each layer's heads computed before ``change`` put something else in its place."""
    computed = []

    def hook(module, args, layer):
        computed.append(args[0].clone())
        return args if change is None else (change(layer, args[0]),)

    hooks = [
        layer.self_attention.linear_proj.register_forward_pre_hook(partial(hook, layer=index))
        for index, layer in enumerate(model.decoder.layers)
    ]
    with torch.no_grad():
        logits_bsw = model(ids_bs, torch.arange(ids_bs.shape[1], device=ids_bs.device).expand_as(ids_bs), None)
    for handle in hooks:
        handle.remove()
    return logits_bsw, computed


def _effect_of(clean_logits: Tensor, corrupt_logits: Tensor, *pairs) -> Callable[[Tensor], Tensor]:
    """How far patched logits moved the metric, as a share of how far the corrupt prompt does."""
    clean_b, corrupt_b = _metric(clean_logits, *pairs), _metric(corrupt_logits, *pairs)
    return lambda patched_logits: (clean_b - _metric(patched_logits, *pairs)) / (clean_b - corrupt_b)


def _metric(logits_bsw: Tensor, answer_start: int, answer_bp: Tensor, distractor_bp: Tensor) -> Tensor:
    """Eq 9 for each pair: [b]."""
    values = []
    for b in range(len(answer_bp)):
        total = weight = 0.0
        for j in range(answer_bp.shape[1]):
            z_w = logits_bsw[b, answer_start - 1 + j].double()
            total += 0.9**j * (z_w[answer_bp[b, j]] - z_w[distractor_bp[b, j]])
            weight += 0.9**j
        values.append(total / weight)
    return torch.stack(values)
