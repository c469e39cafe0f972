# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Scale-normalised fusion of a layer's branches (paper Eq 13-14)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hydra_mcore.config import HydraOptions
from hydra_mcore.heads import HeadLayout
from hydra_mcore.model.attention_plan import HeadSet
from hydra_mcore.model.parameters import PerHead, RMSNorm, gathered, new_index, new_parameter, replicated
from hydra_mcore.ops.tiles import in_tiles


class Fusion(MegatronModule):
    """Brings heads of all kinds to one scale: gate, RMSNorm over each head, one learned factor a head, side by side.

    In deep layers outputs of recurrent heads are several times larger than those of FA heads (paper Fig 5), while the
    inherited output projection expects the teacher's magnitudes. The norm removes the one, the factor restores the
    other.
    """

    def __init__(
        self,
        config: TransformerConfig,
        options: HydraOptions,
        layout: HeadLayout,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.options, self.tp_group = options, pg_collection.tp
        self.eps, self.head_dim = config.layernorm_epsilon, config.kv_channels
        heads = HeadSet.of_layer(layout, self.tp_group.rank())
        self.num_heads = layout.num_heads
        if options.fusion != "none" and options.fusion_norm_weight == "branch":
            norm = {"eps": self.eps, "tp_group": self.tp_group, "partial_gradient": True}
            self.norms = torch.nn.ModuleDict({kind: RMSNorm(config, self.head_dim, **norm) for kind in layout.layer})
        if options.fusion in ("scale", "competition"):
            self.scale = PerHead(config, heads, (), pg_collection)
            for parameter in self.scale.parameters():
                torch.nn.init.ones_(parameter)
        if options.fusion == "competition":
            self.competition = new_parameter(config, self.num_heads, config.hidden_size)
            self.register_buffer("heads", new_index(config, heads.ordinals + heads.shared), persistent=False)

    def forward(self, branches: dict[str, tuple[Tensor, Tensor | None]], x_sbm: Tensor, shared: bool = False) -> Tensor:
        """Join the kinds' (output, gate) pairs: [s, b, h, d] in the rank's own head order.

        With ``shared``, of the heads that all ranks share; x_sbm is then the rows that this rank computes.
        """
        scale_h, heads, scaled = None, 0, []
        if self.options.fusion in ("scale", "competition") and any(
            out_sbhd.shape[2] for out_sbhd, _ in branches.values()
        ):
            scale = gathered(self.scale)
            scale_h = scale.shared_parameter("weight") if shared else scale.weight
        for kind, (out_sbhd, gate) in branches.items():
            of_branch = None if scale_h is None else scale_h[heads : heads + out_sbhd.shape[2]]
            scaled.append(self._scaled(kind, out_sbhd, gate, of_branch))
            heads += out_sbhd.shape[2]
        out_sbhd = torch.cat(scaled, dim=2)
        if self.options.fusion == "competition":
            own = len(self.heads) - len(self.scale.heads.shared)
            out_sbhd = out_sbhd * self._competition(x_sbm, self.heads[own:] if shared else self.heads[:own])
        return out_sbhd

    def _scaled(self, kind: str, out_sbhd: Tensor, gate: Tensor | None, scale_h: Tensor | None) -> Tensor:
        """One branch: gate, norm and scale."""
        if gate is None and self.options.fusion == "none":
            return out_sbhd
        weight_d = None
        if self.options.fusion != "none" and self.options.fusion_norm_weight == "branch":
            weight_d = gathered(self.norms[kind]).used_weight()
        return in_tiles(self._chain, [out_sbhd, gate], [weight_d, scale_h])

    def _chain(self, out_sbhd: Tensor, gate: Tensor | None, weight_d: Tensor | None, scale_h: Tensor | None) -> Tensor:
        if gate is not None and self.options.gate_order == "before_norm":
            out_sbhd = out_sbhd * gate
        if self.options.fusion != "none":
            out_sbhd = F.rms_norm(out_sbhd, (self.head_dim,), weight_d, self.eps)
        if gate is not None and self.options.gate_order == "after_norm":
            out_sbhd = out_sbhd * gate
        return out_sbhd if scale_h is None else out_sbhd * scale_h[:, None]

    def _competition(self, x_sbm: Tensor, heads: Tensor) -> Tensor:
        """Softmax over all heads of the layer, times their number (1 at the start): [s, b, h, 1] of the given heads."""
        logits_sbh = F.linear(x_sbm, replicated(self.competition, self.tp_group))
        exact = torch.promote_types(x_sbm.dtype, torch.float32)
        share_sbh = self.num_heads * logits_sbh.softmax(dim=-1, dtype=exact).to(x_sbm.dtype)
        return share_sbh.index_select(-1, heads)[..., None]
