# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding as it is meant: each token from a whole forward pass over all before it."""

import torch
from torch import Tensor


@torch.no_grad()
def naive_decoding(model: torch.nn.Module, ids_bs: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """The next ``room`` tokens, [b, room], and the logits that chose them, [b, room, w], of a model whole on this
    process.

    A random model may say one token for ever, which would prove little: the tokens are checked to vary.
    """
    length, chosen = ids_bs.shape[1], []
    for _ in range(room):
        chosen.append(model(ids_bs, torch.arange(ids_bs.shape[1]).expand_as(ids_bs), None)[:, -1])
        ids_bs = torch.cat([ids_bs, chosen[-1].argmax(-1, keepdim=True)], dim=1)
    tokens_bs = ids_bs[:, length:]
    assert len(tokens_bs.unique()) > room // 2, f"decoded tokens hardly vary: {tokens_bs.tolist()}"
    return tokens_bs, torch.stack(chosen, dim=1)
