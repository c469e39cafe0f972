# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The Gated DeltaNet heads of a layer (Yang et al., arXiv 2412.06464), grown out of the teacher's attention heads."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hydra_mcore.config import HydraOptions
from hydra_mcore.heads import HeadLayout, HeadRole
from hydra_mcore.model.cache import LayerMemory
from hydra_mcore.model.gates import OutputGate
from hydra_mcore.model.parameters import GroupLinear, HeadLinear, PerHead, RMSNorm, gathered, recomputed
from hydra_mcore.ops import fla_kernels
from hydra_mcore.ops.context_parallel import Group, from_last, from_previous
from hydra_mcore.ops.gated_delta import gated_delta_rule
from hydra_mcore.ops.sequence import SequencePart
from hydra_mcore.ops.short_convolution import short_convolution
from hydra_mcore.ops.tiles import in_tiles


class GatedDeltaHeads(MegatronModule):
    """The gated delta rule on this rank's GDN heads.

    projections -> short conv -> per-head RMSNorm -> rotary -> L2 norm -> delta rule (order as in HALO).
    log decay = -exp(A_log) * softplus(W_a x + dt), write = max * sigmoid(W_b x + b); both projections start at
    zero, so every head starts with one half-life and a half-open write gate.
    """

    def __init__(
        self,
        config: TransformerConfig,
        options: HydraOptions,
        layout: HeadLayout,
        pg_collection: ProcessGroupCollection,
        shared_kv: bool,
    ) -> None:
        super().__init__(config)
        self.options = options
        self.cp_group = pg_collection.cp
        heads, branch = layout.ranks[pg_collection.tp.rank()].gdn, layout.layer.gdn
        per_head = (config, [branch.index(h) for h in heads], len(branch))
        d = config.kv_channels
        self.linear_q = HeadLinear(*per_head, d, pg_collection, bias=config.add_qkv_bias)
        if options.gdn_kv == "per_head":
            self.linear_kv = HeadLinear(*per_head, 2 * d, pg_collection, bias=config.add_qkv_bias)
        elif not shared_kv:
            self.linear_kv = GroupLinear(config, layout, heads, 2 * d, pg_collection, HeadRole.GDN)
        if options.gdn_conv_kernel:
            self.conv = ShortConv(*per_head, 3 * d, options.gdn_conv_kernel, options.gdn_conv_activation, pg_collection)
        if options.gdn_qk_norm == "rms":
            norm = {"eps": config.layernorm_epsilon, "tp_group": pg_collection.tp, "partial_gradient": True}
            self.q_norm, self.k_norm = RMSNorm(config, d, **norm), RMSNorm(config, d, **norm)
        self.linear_decay = HeadLinear(*per_head, 1, pg_collection, bias=True)
        self.linear_write = HeadLinear(*per_head, 1, pg_collection, bias=True)
        self.A_log = PerHead(*per_head, (), pg_collection)
        if options.gdn_gate != "none":
            self.gate = OutputGate(*per_head, options.gdn_gate, options.gate_activation, pg_collection)
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

    def gates(self, x_sbm: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay (<= 0, float32) and write strength of each token and head, both [s, b, h]."""
        decay_sbh = F.softplus(self.linear_decay(x_sbm).squeeze(-1).float())
        if not self.A_log.empty:
            decay_sbh = decay_sbh * gathered(self.A_log).weight.float().exp()
        write_sbh = torch.sigmoid(self.linear_write(x_sbm).squeeze(-1).float())
        return -decay_sbh, self.options.gdn_write_max * write_sbh

    def forward(
        self,
        x_sbm: Tensor,
        part: SequencePart,
        rotary: Tensor,
        kv_sbhd: Tensor | None,
        memory: LayerMemory | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Head outputs [s, b, h, d] and their gate ([s, b, h, d or 1], or None), which fusion applies.

        x_sbm is the ``part`` of the sequence that this rank holds, ``rotary`` the angles of its positions, and
        ``kv_sbhd`` the heads' keys and values where both branches share them. ``memory`` has what the tokens before the
        part left behind, and gets what this part leaves.
        """
        q_sbhd = self.linear_q(x_sbm)
        qkv_sbhd = torch.cat([q_sbhd, self._keys_values(x_sbm) if kv_sbhd is None else kv_sbhd], dim=-1)
        if self.options.gdn_conv_kernel:
            qkv_sbhd = self.conv(qkv_sbhd, part, memory)
        q_sbhd, k_sbhd, v_sbhd = qkv_sbhd.chunk(3, dim=-1)
        q_sbhd, k_sbhd = self._directed(q_sbhd, rotary, "q_norm"), self._directed(k_sbhd, rotary, "k_norm")
        delta_rule = partial(self._delta_rule, part, memory)
        out_sbhd, state_bhdv = recomputed(self.config, delta_rule, q_sbhd, k_sbhd, v_sbhd, *self.gates(x_sbm))
        if memory is not None:
            memory.state_bhdv = _left_behind(state_bhdv, part, self.cp_group)
        gate = self.gate(x_sbm) if self.options.gdn_gate != "none" else None
        return out_sbhd, gate

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

    def _keys_values(self, x_sbm: Tensor) -> Tensor:
        kv = self.linear_kv(x_sbm)
        return kv.index_select(2, self.linear_kv.group_of_head) if isinstance(self.linear_kv, GroupLinear) else kv

    def _delta_rule(
        self, part: SequencePart, memory: LayerMemory | None, *inputs_sbh: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        out_bshd, state_bhdv = gated_delta_rule(
            *(t.transpose(0, 1) for t in inputs_sbh),
            initial_state_bhdv=None if memory is None else memory.state_bhdv,
            cu_seqlens=torch.tensor(part.documents) if part.packed else None,
            cp_group=self.cp_group if part.cp_size > 1 else None,
            state_of_part=memory is not None,
        )
        return out_bshd.transpose(0, 1), state_bhdv


class ShortConv(PerHead):
    """Causal depthwise convolution over a few tokens, the identity at the start: [s, b, h, channels] -> same."""

    def __init__(
        self,
        config: TransformerConfig,
        heads: list[int],
        total: int,
        channels: int,
        taps: int,
        activation: str,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, heads, total, (channels, taps), pg_collection)
        self.activation, self.cp_group = activation, pg_collection.cp
        if not self.empty:
            with torch.no_grad():
                self.weight.zero_()
                self.weight[:, -1] = 1.0

    def forward(self, x_sbhc: Tensor, part: SequencePart, memory: LayerMemory | None = None) -> Tensor:
        """No token sees another document; the first ones of a part see the last ones of the previous rank's.

        Raises:
            ValueError: a part is shorter than what its successor needs to see of it.
        """
        if self.empty:
            return x_sbhc
        length, before = x_sbhc.shape[0], self.block[1] - 1
        if part.cp_size > 1 and length < before:
            raise ValueError(
                f"a context-parallel part of {length} tokens is shorter than the {before} the short convolution looks"
                " back"
            )
        fused = fla_kernels.serve(x_sbhc)
        if part.past:
            padded = torch.cat([memory.taps_sbhc, x_sbhc])
        elif part.cp_size > 1 and before:
            padded = torch.cat([from_previous(x_sbhc[length - before :], self.cp_group), x_sbhc])
        elif memory is not None or not fused:
            padded = F.pad(x_sbhc, (0, 0, 0, 0, 0, 0, before, 0))
        else:
            padded = x_sbhc  # the kernel sees zeros before the first token by itself
        if memory is not None:
            memory.taps_sbhc = _left_behind(padded[length:], part, self.cp_group)
        if fused:
            return self._fused(padded, part)[len(padded) - length :]
        weight_hct = self.weight.unflatten(0, (len(self.heads), self.block[0]))
        out = short_convolution(padded, weight_hct, part.positions(x_sbhc.device) if part.packed else None)
        return F.silu(out) if self.activation == "silu" else out

    def _fused(self, padded_sbhc: Tensor, part: SequencePart) -> Tensor:
        """The same in one kernel of flash-linear-attention, of the padding too."""
        bounds = None
        if part.packed:  # a document may begin in the padding, among the previous rank's tokens, or at its end
            shift = len(padded_sbhc) - part.num_tokens - part.start
            bounds = (
                0,
                *(bound + shift for bound in part.documents if 0 < bound + shift < len(padded_sbhc)),
                len(padded_sbhc),
            )
        return fla_kernels.short_conv(
            padded_sbhc, self.weight, bounds, None if self.activation == "none" else self.activation
        )


def _unit_length(x: Tensor) -> Tensor:
    return fla_kernels.unit_length(x) if fla_kernels.serve(x) else F.normalize(x.float(), dim=-1).to(x.dtype)


def _left_behind(x: Tensor, part: SequencePart, cp_group: Group) -> Tensor:
    """What the rank of the last part leaves behind, on all ranks; what follows a prompt is alike on all of them
    anyway.
    """
    return from_last(x, cp_group) if part.cp_size > 1 else x.clone()  # of a slice, whose whole can go
