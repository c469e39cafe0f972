# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The recurrences of linear heads as tests see them: random inputs, our functions, and slow truth in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_mcore.ops.chunked_delta_rule import chunked_delta_rule
from hydra_mcore.ops.chunked_linear_attention import chunked_linear_attention
from hydra_mcore.ops.gated_delta import gated_delta_rule
from hydra_mcore.ops.linear_attention import linear_attention
from hydra_mcore.sequence import SequencePart
from tests.support.naive_gated_delta import naive_gated_delta_rule
from tests.support.naive_linear_attention import naive_linear_attention

# The tensors of a rule's tokens [b, s, h, ...] in the order of its signature; an initial state may follow.
Inputs = list[Tensor]
Results = tuple[Tensor, Tensor]  # outputs, and the last state of each row or document
Apply = Callable[..., Results]


@dataclass(frozen=True)
class Rule:
    """A recurrence.

    Args:
        decay: "head" or "channel" where every token brings a decay and a write gate, "fixed" where heads have theirs.
        function: over whole rows, packed documents and parts of rows.
        chunked: its torch part, which takes boundaries and the size of chunks.
        naive: token by token in float64.
    """

    name: str
    decay: str
    function: Apply
    chunked: Apply
    naive: Apply

    @property
    def num_tensors(self) -> int:
        """How many tensors a token brings: q, k, v, and of the delta rule a log decay and a write gate."""
        return 3 if self.decay == "fixed" else 5

    def inputs(
        self, b: int = 1, s: int = 70, h: int = 2, d: int = 8, v: int = 6, *, documents: int = 1, dtype=torch.float64
    ) -> Inputs:
        """Random inputs with beta up to 2, mild decays and an initial state for every row or document."""
        rng = torch.Generator().manual_seed(1000 * s + b)
        randn = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)  # noqa: E731
        rand = lambda *shape: torch.rand(shape, generator=rng, dtype=torch.float64)  # noqa: E731
        inputs = [F.normalize(randn(b, s, h, d), dim=-1), F.normalize(randn(b, s, h, d), dim=-1), randn(b, s, h, v)]
        if self.decay != "fixed":
            inputs += [-0.2 * rand(b, s, h, *([d] if self.decay == "channel" else [])), 2 * rand(b, s, h)]
        inputs.append(randn(b * documents, h, d, v))
        return [x.to(dtype) for x in inputs]

    def ours(self, *inputs: Tensor, **options) -> Results:
        """``function`` of the inputs, the last of which may be an initial state."""
        return self._apply(self.function, inputs, options)

    def in_chunks(self, *inputs: Tensor, **options) -> Results:
        """``chunked`` of the same."""
        return self._apply(self.chunked, inputs, options)

    def truth(self, *inputs: Tensor) -> Results:
        """``naive`` of the same."""
        return self._apply(self.naive, inputs, {})

    def packed(self, bounds: Sequence[int]) -> Apply:
        """``ours`` over documents packed at ``bounds``."""
        return lambda *inputs: self.ours(*inputs, part=SequencePart(inputs[0].shape[1], documents=tuple(bounds)))

    def one_by_one(self, apply: Apply, bounds: Sequence[int]) -> Apply:
        """``apply`` over each document by itself, results joined as packing joins them."""

        def joined(*inputs: Tensor) -> Results:
            results = [
                apply(*(x[:, start:end] for x in inputs[: self.num_tensors]), inputs[-1][document : document + 1])
                for document, (start, end) in enumerate(itertools.pairwise(bounds))
            ]
            outs, states = zip(*results, strict=True)
            return torch.cat(outs, dim=1), torch.cat(states)

        return joined

    def _apply(self, function: Apply, inputs: Sequence[Tensor], options: dict) -> Results:
        tokens, state = inputs[: self.num_tensors], inputs[self.num_tensors :]
        return function(*tokens, initial_state_bhdv=state[0] if state else None, **options)


def linear_attention_rule(*log_decays: float) -> Rule:
    """Linear attention whose heads decay at these rates, again and again."""

    def fixed(function: Apply) -> Apply:
        def apply(q_bshd: Tensor, k_bshd: Tensor, v_bshv: Tensor, **options) -> Results:
            rates = list(itertools.islice(itertools.cycle(log_decays), q_bshd.shape[2]))
            rate_h = torch.tensor(rates, dtype=torch.float64, device=q_bshd.device)
            return function(q_bshd, k_bshd, v_bshv, rate_h, **options)

        return apply

    functions = (linear_attention, chunked_linear_attention, naive_linear_attention)
    return Rule("linear attention", "fixed", *map(fixed, functions))


HEAD_DECAY = Rule("head decay", "head", gated_delta_rule, chunked_delta_rule, naive_gated_delta_rule)
CHANNEL_DECAY = Rule("channel decay", "channel", gated_delta_rule, chunked_delta_rule, naive_gated_delta_rule)
LINEAR_ATTENTION = linear_attention_rule(-0.2, -0.01, -0.05)
RULES = (HEAD_DECAY, CHANNEL_DECAY, LINEAR_ATTENTION)


def outputs_and_gradients(apply: Apply, inputs: Inputs) -> list[Tensor]:
    """Output, final state and the gradients of all inputs, with random gradients into both results."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, state = apply(*leaves)
    rng = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=rng, dtype=torch.float64)).sum() for x in (out, state))
    return [out.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Compare tensor by tensor: root mean square of the difference over that of the expected tensor, or over 1 where
    the truth is exactly 0.
    """
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        name = ("outputs", "last state")[i] if i < 2 else f"gradient of input {i - 2}"
        assert x.shape == y.shape, name
        error = _rms(x.double() - y.double()) / (_rms(y.double()) or 1.0)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
