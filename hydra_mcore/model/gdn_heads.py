# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The Gated DeltaNet heads of a layer (Yang et al., arXiv 2412.06464), grown out of the teacher's attention heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hydra_mcore.heads import HeadLayout
from hydra_mcore.kinds.gated_delta import GATED_DELTA
from hydra_mcore.kinds.recurrent import keys_values_by_head
from hydra_mcore.model.attention_plan import AttentionPlan
from hydra_mcore.model.branch import Branch, BranchOutput, GroupedKeysValues
from hydra_mcore.model.cache import LayerCache, left_behind
from hydra_mcore.model.imitation import WRITES, Imitation, decay_rates
from hydra_mcore.model.parameters import HeadLinear, PerHead, gathered, recomputed
from hydra_mcore.model.short_conv import ShortConv
from hydra_mcore.ops import fla_kernels
from hydra_mcore.ops.chunks import state_dtype
from hydra_mcore.ops.context_parallel import Group
from hydra_mcore.ops.gated_delta import gated_delta_rule
from hydra_mcore.ops.tiles import in_tiles
from hydra_mcore.sequence import SequencePart


class GatedDeltaRule(torch.nn.Module):
    """The delta rule over this rank's part of the sequence; a module, so that a profile tells its time apart."""

    def __init__(self, cp_group: Group) -> None:
        super().__init__()
        self.cp_group = cp_group

    def forward(
        self, part: SequencePart, states: dict[str, Tensor] | None, *inputs_sbh: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Queries, keys, values, log decays and write strengths -> outputs [s, b, h, v], and the state behind them."""
        out_bshd, state_bhdv = gated_delta_rule(
            *(t.transpose(0, 1) for t in inputs_sbh),
            part=part,
            cp_group=self.cp_group,
            initial_state_bhdv=None if states is None else states.get("state"),
            state_of_part=states is not None,
        )
        return out_bshd.transpose(0, 1), state_bhdv


class GatedDeltaHeads(Branch):
    """The gated delta rule on this rank's GDN heads.

    projections -> short conv -> per-head RMSNorm -> rotary -> L2 norm -> delta rule (order as in HALO).
    log decay = -exp(A_log) * softplus(W_a x + dt), write = max * sigmoid(W_b x + b); both projections start at
    zero, so every head starts with one half-life and a half-open write gate.
    """

    kind, core = GATED_DELTA.name, GatedDeltaRule

    def __init__(
        self,
        config: TransformerConfig,
        plan: AttentionPlan,
        layout: HeadLayout,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        kv_per_head = keys_values_by_head(plan.options, self.kind)
        super().__init__(config, plan, layout, pg_collection, kv_per_head=kv_per_head)
        per_head = (config, self.heads)
        if taps := self.option("conv_kernel"):
            self.conv = ShortConv(
                *per_head, 3 * config.kv_channels, taps, self.option("conv_activation"), pg_collection
            )
        if self.option("qk_norm") == "rms":
            self.add_qk_norms()
        self.add_decay()
        self.linear_write = HeadLinear(*per_head, 1, pg_collection, bias=True)
        self.A_log = PerHead(*per_head, (), pg_collection)
        self.delta_rule = self.core(self.cp_group)
        self.add_gate()
        self.reset_gates()

    def add_decay(self) -> None:
        """One decay a head."""
        self.linear_decay = HeadLinear(self.config, self.heads, 1, self.pg_collection, bias=True)

    def reset_gates(self) -> None:
        """Long memory: decay to half in ``gdn_half_life`` tokens, write gate half open, whatever the input."""
        if self.linear_decay.empty:
            return
        decay = math.log(2.0) / self.option("half_life")
        with torch.no_grad():
            self.linear_decay.weight.zero_()
            self.linear_decay.bias.fill_(math.log(math.expm1(decay)))
            self.linear_write.weight.zero_()
            self.linear_write.bias.zero_()
            self.A_log.weight.zero_()

    @torch.no_grad()
    def start_as(self, place: int, found: Imitation) -> None:
        """As ``Branch.start_as``; the gates' projections stay at zero, their biases are those of the memory."""
        super().start_as(place, found)
        rate = decay_rates(found.memory, self.config.kv_channels).view(self.linear_decay.rows, -1)[:, 0]
        self.linear_decay.bias.unflatten(0, (-1, self.linear_decay.rows))[place] = rate.expm1().log()
        share = min(found.memory.write / self.option("write_max"), WRITES[-1])
        self.linear_write.bias[place] = math.log(share / (1 - share))

    def forward(
        self,
        x_sbm: Tensor,
        part: SequencePart,
        rotary: Tensor,
        kv: GroupedKeysValues | None = None,
        cache: LayerCache | None = None,
    ) -> BranchOutput:
        """As ``Branch.forward``."""
        states = None if cache is None else cache.states[self.kind]
        qkv_sbhd = self.queries_keys_values(x_sbm, part, rotary, kv, states)
        delta_rule = partial(self.delta_rule, part, states)
        out_sbhd, state_bhdv = recomputed(self.config, delta_rule, *qkv_sbhd, *self._gates(x_sbm))
        if states is not None:
            states["state"] = left_behind(state_bhdv, part, self.cp_group)
        return BranchOutput((out_sbhd, None if self.gate is None else self.gate(x_sbm)))

    def queries_keys_values(
        self,
        x_sbm: Tensor,
        part: SequencePart,
        rotary: Tensor,
        kv: GroupedKeysValues | None = None,
        states: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the delta rule takes, each [s, b, h, d]; ``states`` has the convolution's last inputs."""
        qkv_sbhd = (self.linear_q(x_sbm), *self.keys_values_by_head(x_sbm, kv).chunk(2, dim=-1))
        if self.option("conv_kernel"):
            qkv_sbhd = self.conv(torch.cat(qkv_sbhd, dim=-1), part, states).chunk(3, dim=-1)
        q_sbhd, k_sbhd, v_sbhd = qkv_sbhd
        # Rotary without the attention factor, which the L2 norm would take away.
        q_sbhd = self.normed_and_turned(q_sbhd, rotary, "q_norm", then=_unit_length)
        k_sbhd = self.normed_and_turned(k_sbhd, rotary, "k_norm", then=_unit_length)
        return q_sbhd, k_sbhd, v_sbhd

    def _gates(self, x_sbm: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay (<= 0), [s, b, h] or [s, b, h, d], and write strength [s, b, h], in float32 at least."""
        logits_sbhx = self.decay_logits(x_sbm)
        log_decay_sbhx = in_tiles(self._log_decay, [logits_sbhx], [self._log_rate()], dtype=state_dtype(logits_sbhx))
        write_sbh = self._write(_precise(self.linear_write(x_sbm))).squeeze(-1)
        return log_decay_sbhx.squeeze(-1) if self.linear_decay.rows == 1 else log_decay_sbhx, write_sbh

    def decay_logits(self, x_sbm: Tensor) -> Tensor:
        """W_a x + dt, [s, b, h, 1]."""
        return self.linear_decay(x_sbm)

    def _log_rate(self) -> Tensor | None:
        """A_log, none where this rank has no heads."""
        return None if self.A_log.empty else gathered(self.A_log).weight

    def _log_decay(self, logits_sbhx: Tensor, log_rate_h: Tensor | None) -> Tensor:
        decay_sbhx = F.softplus(_precise(logits_sbhx))
        return -decay_sbhx if log_rate_h is None else -(decay_sbhx * _precise(log_rate_h).exp()[:, None])

    def _write(self, logits_sbh1: Tensor) -> Tensor:
        return self.option("write_max") * torch.sigmoid(logits_sbh1)

    def _mean_log_decay(self, logits_sbhx: Tensor) -> Tensor:
        """Over the channels of a head, [s, b, h, 1]."""
        return self._log_decay(logits_sbhx, self._log_rate()).mean(dim=-1, keepdim=True)

    def watched(self) -> dict[str, tuple[torch.nn.Module, Callable[[Tensor], Tensor]]]:
        return {"half-life": (self.linear_decay, self._mean_log_decay), "write gate": (self.linear_write, self._write)}


def _unit_length(x: Tensor) -> Tensor:
    return fla_kernels.unit_length(x) if fla_kernels.serve(x) else F.normalize(_precise(x), dim=-1).to(x.dtype)


def _precise(x: Tensor) -> Tensor:
    """In float32 at least: a decay to half in thousands of tokens is too near 1 for bf16."""
    return x.to(state_dtype(x))
