# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The Gated DeltaNet heads of a layer (Yang et al., arXiv 2412.06464), grown out of the teacher's attention heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hydra_mcore.heads import HeadLayout
from hydra_mcore.kinds.gated_delta import GATED_DELTA
from hydra_mcore.model.attention_plan import AttentionPlan
from hydra_mcore.model.branch import Branch, BranchOutput, GroupedKeysValues
from hydra_mcore.model.cache import LayerCache, left_behind
from hydra_mcore.model.parameters import HeadLinear, PerHead, gathered, recomputed
from hydra_mcore.model.short_conv import ShortConv
from hydra_mcore.ops import fla_kernels
from hydra_mcore.ops.gated_delta import gated_delta_rule
from hydra_mcore.ops.tiles import in_tiles
from hydra_mcore.sequence import SequencePart


class GatedDeltaHeads(Branch):
    """The gated delta rule on this rank's GDN heads.

    projections -> short conv -> per-head RMSNorm -> rotary -> L2 norm -> delta rule (order as in HALO).
    log decay = -exp(A_log) * softplus(W_a x + dt), write = max * sigmoid(W_b x + b); both projections start at
    zero, so every head starts with one half-life and a half-open write gate.
    """

    kind, core = GATED_DELTA.name, "gated_delta_rule"

    def __init__(
        self,
        config: TransformerConfig,
        plan: AttentionPlan,
        layout: HeadLayout,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        options = plan.options
        super().__init__(config, plan, layout, pg_collection, kv_per_head=options.gdn_kv == "per_head")
        per_head = (config, self.heads)
        if options.gdn_conv_kernel:
            taps, activation = options.gdn_conv_kernel, options.gdn_conv_activation
            self.conv = ShortConv(*per_head, 3 * config.kv_channels, taps, activation, pg_collection)
        if options.gdn_qk_norm == "rms":
            self.add_qk_norms()
        self.linear_decay = HeadLinear(*per_head, 1, pg_collection, bias=True)
        self.linear_write = HeadLinear(*per_head, 1, pg_collection, bias=True)
        self.A_log = PerHead(*per_head, (), pg_collection)
        self.add_gate()
        self.reset_gates()

    def reset_gates(self) -> None:
        """Long memory: decay to half in ``gdn_half_life`` tokens, write gate half open, whatever the input."""
        if self.linear_decay.empty:
            return
        decay = math.log(2.0) / self.options.gdn_half_life
        with torch.no_grad():
            self.linear_decay.weight.zero_()
            self.linear_decay.bias.fill_(math.log(math.expm1(decay)))
            self.linear_write.weight.zero_()
            self.linear_write.bias.zero_()
            self.A_log.weight.zero_()

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
        qkv_sbhd = torch.cat([self.linear_q(x_sbm), self.keys_values_by_head(x_sbm, kv)], dim=-1)
        if self.options.gdn_conv_kernel:
            qkv_sbhd = self.conv(qkv_sbhd, part, states)
        q_sbhd, k_sbhd, v_sbhd = qkv_sbhd.chunk(3, dim=-1)
        q_sbhd, k_sbhd = self._directed(q_sbhd, rotary, "q_norm"), self._directed(k_sbhd, rotary, "k_norm")
        delta_rule = partial(self._delta_rule, part, states)
        out_sbhd, state_bhdv = recomputed(self.config, delta_rule, q_sbhd, k_sbhd, v_sbhd, *self._gates(x_sbm))
        if states is not None:
            states["state"] = left_behind(state_bhdv, part, self.cp_group)
        return BranchOutput((out_sbhd, None if self.gate is None else self.gate(x_sbm)))

    def _directed(self, x_sbhd: Tensor, rotary: Tensor, norm: str) -> Tensor:
        """Queries or keys as the delta rule takes them: per-head RMSNorm, rotary, length 1."""
        weight_d = [gathered(getattr(self, norm)).used_weight()] if self.options.gdn_qk_norm == "rms" else []
        return in_tiles(self._direct, [x_sbhd, rotary], weight_d)

    def _direct(self, x_sbhd: Tensor, rotary: Tensor, *weight_d: Tensor) -> Tensor:
        for weight in weight_d:
            x_sbhd = F.rms_norm(x_sbhd, weight.shape, weight, self.config.layernorm_epsilon)
        if self.options.gdn_position == "rope":  # without the attention factor, which the L2 norm would take away
            x_sbhd = apply_rotary_pos_emb(x_sbhd, rotary, self.config, cp_group=self.cp_group)
        return _unit_length(x_sbhd)

    def _gates(self, x_sbm: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay (<= 0) and write strength of each token and head, both [s, b, h], float32."""
        log_decay_sbh1 = self._log_decay(self.linear_decay(x_sbm).float())
        return log_decay_sbh1.squeeze(-1), self._write(self.linear_write(x_sbm).float()).squeeze(-1)

    def _log_decay(self, logits_sbh1: Tensor) -> Tensor:
        decay_sbh1 = F.softplus(logits_sbh1)
        if not self.A_log.empty:
            decay_sbh1 = decay_sbh1 * gathered(self.A_log).weight.float().exp()[:, None]
        return -decay_sbh1

    def _write(self, logits_sbh1: Tensor) -> Tensor:
        return self.options.gdn_write_max * torch.sigmoid(logits_sbh1)

    def _delta_rule(
        self, part: SequencePart, states: dict[str, Tensor] | None, *inputs_sbh: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        out_bshd, state_bhdv = gated_delta_rule(
            *(t.transpose(0, 1) for t in inputs_sbh),
            part=part,
            cp_group=self.cp_group,
            initial_state_bhdv=None if states is None else states.get("state"),
            state_of_part=states is not None,
        )
        return out_bshd.transpose(0, 1), state_bhdv

    def watched(self) -> dict[str, tuple[torch.nn.Module, Callable[[Tensor], Tensor]]]:
        return {"half-life": (self.linear_decay, self._log_decay), "write gate": (self.linear_write, self._write)}


def _unit_length(x: Tensor) -> Tensor:
    return fla_kernels.unit_length(x) if fla_kernels.serve(x) else F.normalize(x.float(), dim=-1).to(x.dtype)
