# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule beside other people's functions, and its two decays beside each other. What it shares with other
recurrences is in ``test_recurrences.py``.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.ssm.gated_delta_net.common import torch_chunk_gated_delta_rule
from torch import Tensor

from tests.support.rules import CHANNEL_DECAY, HEAD_DECAY, assert_same, outputs_and_gradients


@pytest.mark.parametrize("s", [1, 63, 64, 65, 200])
def test_equals_megatron_core_in_float32(s: int) -> None:
    inputs = HEAD_DECAY.inputs(b=2, s=s, d=32, v=16, dtype=torch.float32)

    def megatron(*x: Tensor) -> tuple[Tensor, Tensor]:
        return torch_chunk_gated_delta_rule(*x[:5], initial_state=x[5], output_final_state=True)

    assert_same(outputs_and_gradients(HEAD_DECAY.ours, inputs), outputs_and_gradients(megatron, inputs), 1e-5)


@pytest.mark.parametrize("s", [1, 8, 63, 130])
def test_equal_decays_of_all_channels_are_a_decay_of_the_head(s: int) -> None:
    inputs = HEAD_DECAY.inputs(b=2, s=s)

    def by_channel(q: Tensor, k: Tensor, v: Tensor, log_decay_bsh: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        return CHANNEL_DECAY.ours(q, k, v, log_decay_bsh[..., None].expand_as(q), *others)

    actual = outputs_and_gradients(by_channel, inputs)  # autograd sums the decays' gradients over channels
    assert_same(actual, outputs_and_gradients(HEAD_DECAY.ours, inputs), 1e-10)


@pytest.mark.parametrize("s", [1, 64, 150])
def test_equals_flash_linear_attention_in_float32(s: int) -> None:
    reference = pytest.importorskip("fla.ops.kda.naive", reason="needs flash-linear-attention")
    inputs = CHANNEL_DECAY.inputs(b=2, s=s, d=32, v=16, dtype=torch.float32)

    def recurrent(*x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.naive_recurrent_kda(*x[:5], initial_state=x[5], output_final_state=True)

    assert_same(outputs_and_gradients(CHANNEL_DECAY.ours, inputs), outputs_and_gradients(recurrent, inputs), 1e-5)
