# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Eq 10 by its definition: one full forward pass of the model for every head, by hooks. Slow, and free of cleverness."""

from __future__ import annotations

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
) -> Tensor:
    """Effects [layers, heads, pairs]; ``freeze=False`` lets later attention layers react to the patch."""
    layers = model.decoder.layers
    heads_in, attention_out = {}, {}

    def run(ids_bs, hooks=()):
        positions = torch.arange(ids_bs.shape[1]).expand_as(ids_bs)
        with torch.no_grad():
            logits_bsw = model(ids_bs, positions, None)
        for hook in hooks:
            hook.remove()
        return logits_bsw

    def keep_input(key):
        return lambda module, args: heads_in.__setitem__(key, args[0].clone())

    def keep_output(key):
        return lambda module, args, output: attention_out.__setitem__(key, output[0].clone())

    logits = {}
    for name, ids_bs in (("clean", clean_bs), ("corrupt", corrupt_bs)):
        hooks = []
        for index, layer in enumerate(layers):
            hooks.append(layer.self_attention.linear_proj.register_forward_pre_hook(keep_input((name, index))))
            hooks.append(layer.self_attention.register_forward_hook(keep_output((name, index))))
        logits[name] = run(ids_bs, hooks)

    def metric(logits_bsw):
        values = []
        for b in range(len(answer_bp)):
            total = weight = 0.0
            for j in range(answer_bp.shape[1]):
                z_w = logits_bsw[b, answer_start - 1 + j].double()
                total += 0.9**j * (z_w[answer_bp[b, j]] - z_w[distractor_bp[b, j]])
                weight += 0.9**j
            values.append(total / weight)
        return torch.stack(values)

    clean_b, corrupt_b = metric(logits["clean"]), metric(logits["corrupt"])
    num_heads, width = model.config.num_attention_heads, model.config.kv_channels
    effects = torch.zeros(len(layers), num_heads, len(answer_bp), dtype=torch.float64)
    for patched in range(len(layers)):
        for head in range(num_heads):
            columns = slice(head * width, (head + 1) * width)

            def patch(module, args, patched=patched, columns=columns):
                mixed = args[0].clone()
                mixed[..., columns] = heads_in["corrupt", patched][..., columns]
                return (mixed,)

            hooks = [layers[patched].self_attention.linear_proj.register_forward_pre_hook(patch)]
            for later in range(patched + 1, len(layers)) if freeze else ():
                hooks.append(
                    layers[later].self_attention.register_forward_hook(
                        # a copy: Megatron adds the residual to it in place
                        lambda module, args, output, later=later: (attention_out["clean", later].clone(), None)
                    )
                )
            effects[patched, head] = (clean_b - metric(run(clean_bs, hooks))) / (clean_b - corrupt_b)
    return effects
