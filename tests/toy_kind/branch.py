# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The toy heads of a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hydra_mcore.heads import HeadLayout
from hydra_mcore.model.attention_plan import AttentionPlan
from hydra_mcore.model.branch import Branch, BranchOutput, GroupedKeysValues
from hydra_mcore.model.cache import LayerCache, left_behind
from hydra_mcore.ops.context_parallel import state_from_previous
from hydra_mcore.sequence import SequencePart


class ToyHeads(Branch):
    """S_t = decay S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(d), all tokens of a part at once."""

    kind, core = "toy", "decayed_scores"

    def __init__(
        self,
        config: TransformerConfig,
        plan: AttentionPlan,
        layout: HeadLayout,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, plan, layout, pg_collection, kv_per_head=True)

    def forward(
        self,
        x_sbm: Tensor,
        part: SequencePart,
        rotary: Tensor,
        kv: GroupedKeysValues | None = None,
        cache: LayerCache | None = None,
    ) -> BranchOutput:
        q_sbhd, (k_sbhd, v_sbhd) = self.linear_q(x_sbm), self.keys_values_by_head(x_sbm, kv).chunk(2, dim=-1)
        states = {} if cache is None else cache.states[self.kind]
        decay, (first, last), s = self.options.toy_decay, (part.bounds[1], part.bounds[-2]), part.num_tokens
        age_s = torch.arange(s, device=x_sbm.device)

        def after(tokens: slice) -> Tensor:
            weight_s = decay ** (s - 1 - age_s[tokens]).to(torch.float32)
            return torch.einsum("s,sbhd,sbhv->bhdv", weight_s, k_sbhd[tokens].float(), v_sbhd[tokens].float())

        before_bhdv = states.get("state")
        if part.cp_size > 1:
            hands_on = float(part.continues and part.cp_rank < part.cp_size - 1)
            offset_bhdv = hands_on * after(slice(last, s))
            whole = hands_on * decay**s if len(part.bounds) == 2 else 0.0
            eye = torch.eye(q_sbhd.shape[-1], device=x_sbm.device).expand_as(offset_bhdv)
            before_bhdv = state_from_previous(whole * eye, offset_bhdv, self.cp_group)
        out_sbhv = decayed_scores(q_sbhd, k_sbhd, v_sbhd, decay, part.bounds)
        if before_bhdv is not None:
            weight_s = decay ** (age_s[:first] + 1).to(torch.float32)
            from_before = torch.einsum("s,sbhd,bhdv->sbhv", weight_s, q_sbhd[:first].float(), before_bhdv)
            out_sbhv = torch.cat([out_sbhv[:first] + from_before, out_sbhv[first:]])
        if cache is not None:
            state_bhdv = after(slice(0, s)) if before_bhdv is None else after(slice(0, s)) + decay**s * before_bhdv
            states["state"] = left_behind(state_bhdv, part, self.cp_group)
        return BranchOutput(((out_sbhv * q_sbhd.shape[-1] ** -0.5).to(x_sbm.dtype), None))

    def watched(self) -> dict[str, tuple[torch.nn.Module, Callable[[Tensor], Tensor]]]:
        return {"query size": (self.linear_q, lambda q_sbhd: q_sbhd.abs().mean(dim=-1, keepdim=True))}


def decayed_scores(q_sbhd: Tensor, k_sbhd: Tensor, v_sbhd: Tensor, decay: float, bounds: tuple[int, ...]) -> Tensor:
    """What the tokens of a part give each other within their documents, float32."""
    position_s = torch.arange(q_sbhd.shape[0], device=q_sbhd.device)
    document_s = torch.bucketize(position_s, torch.tensor(bounds[1:-1], device=q_sbhd.device), right=True)
    age_st = position_s[:, None] - position_s
    seen_st = (age_st >= 0) & (document_s[:, None] == document_s)
    weight_st = torch.where(seen_st, decay ** age_st.clamp(min=0).to(torch.float32), 0.0)
    score_bhst = torch.einsum("sbhd,tbhd->bhst", q_sbhd.float(), k_sbhd.float()) * weight_st
    return torch.einsum("bhst,tbhv->sbhv", score_bhst, v_sbhd.float())
