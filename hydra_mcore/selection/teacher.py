# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The teacher as patching needs it: run whole and recorded, or walked through layer by layer; one rank's part of it.

Every rank makes the same calls. A rank holds some heads (tensor parallel) of some layers (pipeline parallel); what
comes out at the end of the model, metrics and logits, is known on the last stage only.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from hydra_mcore.selection.probes import ProbeBatch

DECAY = 0.9  # lambda of Eq 9
TOKENS_A_BATCH = 16_384  # tokens that go through an MLP or an attention at once


@dataclass(frozen=True, eq=False)
class Trace:
    """What one forward pass left behind at some positions (s of them), for this rank's layers and heads."""

    heads_sbhd: dict[int, Tensor]  # what each of this rank's heads hands to the output projection, by layer_idx
    residual_sbm: dict[int, Tensor]  # each layer's input
    attention_sbm: dict[int, Tensor]  # each attention block's output
    final_pbm: Tensor | None  # last stage: what enters the output layer, at the answer positions
    logits_bpw: Tensor | None  # last stage: this rank's part of the vocabulary


class Teacher:
    """A pretrained model (every head FA) in evaluation mode."""

    def __init__(self, model: GPTModel) -> None:
        groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "pp"])
        self.model, self.tp_group = model.requires_grad_(False), groups.tp
        self.pipe = P2PCommunicator(groups.pp, model.config)
        self.first, self.last = self.pipe.is_pp_first_stage, self.pipe.is_pp_last_stage
        self.layers: dict[int, TransformerLayer] = {layer.layer_number - 1: layer for layer in model.decoder.layers}
        self.num_layers, self.num_heads = model.config.num_layers, model.config.num_attention_heads
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def own_heads(self, layer_idx: int) -> list[int]:
        """The heads this rank holds, in the order in which they stand in its activations."""
        return list(self.layers[layer_idx].self_attention.linear_proj.heads.ordinals)

    # ---- the whole model

    def run(
        self, ids_bs: Tensor, answer: slice, keep: slice, only: Literal["heads_sbhd", "residual_sbm"] | None = None
    ) -> Trace:
        """One forward pass; logits for the positions ``answer``, everything else for the positions ``keep``.

        Args:
            only: what alone is asked for, so that nothing else is kept.
        """
        trace = Trace({}, {}, {}, None, None)
        final: list[Tensor] = []

        # Copies: a view would keep the whole sequence in memory, and Megatron adds to the attention output in place.
        def record(layer_idx: int, layer: TransformerLayer) -> Iterator[Any]:
            own = len(self.own_heads(layer_idx))

            def layer_input(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
                trace.residual_sbm[layer_idx] = (args[0] if args else kwargs["hidden_states"])[keep].clone()

            def head_outputs(module: Any, args: tuple) -> None:
                trace.heads_sbhd[layer_idx] = args[0][keep].clone().unflatten(-1, (own, self.model.config.kv_channels))

            def attention_output(module: Any, args: tuple, output: tuple) -> None:
                trace.attention_sbm[layer_idx] = output[0][keep].clone()

            if only != "residual_sbm":
                yield layer.self_attention.linear_proj.register_forward_pre_hook(head_outputs)
            if only != "heads_sbhd":
                yield layer.register_forward_pre_hook(layer_input, with_kwargs=True)
            if only is None:
                yield layer.self_attention.register_forward_hook(attention_output)

        with contextlib.ExitStack() as hooks:
            for at in self.layers.items():
                for hook in record(*at):
                    hooks.enter_context(hook)
            logits_bpw = self.forward(ids_bs, answer, final)
        return dataclasses.replace(trace, final_pbm=final[0] if self.last else None, logits_bpw=logits_bpw)

    def forward(self, ids_bs: Tensor, answer: slice, final: list[Tensor] | None = None) -> Tensor | None:
        """[b, p, w / tp] logits on the last stage, None on the others; only the answer enters the output layer."""

        def before_logits(module: Any, args: tuple) -> tuple:
            hidden_pbm = args[0][answer]
            if final is not None:
                final.append(hidden_pbm)
            return (hidden_pbm, *args[1:])

        batch, length = ids_bs.shape
        position_ids_bs = torch.arange(length, device=ids_bs.device).expand_as(ids_bs)
        self.model.set_input_tensor(self.receive(length, batch))
        with (
            self.model.output_layer.register_forward_pre_hook(before_logits) if self.last else contextlib.nullcontext()
        ):
            out = self.model(ids_bs, position_ids_bs, None)
        self.send(out)
        return out if self.last else None

    def solved(self, logits_bpw: Tensor, answer_bp: Tensor) -> Tensor:
        """Whether the model's own choice is the answer at every position: bool [b]; last stage only."""
        return (gather_from_tensor_model_parallel_region(logits_bpw, group=self.tp_group).argmax(-1) == answer_bp).all(
            -1
        )

    # ---- its pieces

    def mlp(self, layer_idx: int, x_sbm: Tensor) -> Tensor:
        """The second half of a layer, residual plus MLP, which acts on each token by itself."""
        layer, tokens = self.layers[layer_idx], x_sbm.flatten(0, 1)[:, None]
        parts = [part + layer.mlp(layer.pre_mlp_layernorm(part))[0] for part in tokens.split(TOKENS_A_BATCH)]
        return torch.cat(parts).view_as(x_sbm)

    def attend(self, layer_idx: int, x_sbm: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
        """A layer's attention output [s, b, m] for the input x of whole rows.

        ``edit`` gets what this rank's heads hand to the output projection, [s, b, h, d], and says what they hand
        instead.
        """
        layer = self.layers[layer_idx]

        def before_projection(module: Any, args: tuple) -> tuple:
            return (edit(args[0].unflatten(-1, (-1, self.model.config.kv_channels))).flatten(2), *args[1:])

        with layer.self_attention.linear_proj.register_forward_pre_hook(before_projection):
            return layer.self_attention(
                layer.input_layernorm(x_sbm), rotary_pos_emb=self.model.rotary_pos_emb(len(x_sbm))
            )[0]

    def written(self, layer_idx: int, heads_sbhd: Tensor, wanted: range) -> Tensor:
        """What each of the ``wanted`` heads adds to the residual stream: [s, wanted, b, m], on every rank.

        Args:
            heads_sbhd: of this rank's heads, before the output projection.
        """
        weight_mhd = self.layers[layer_idx].self_attention.linear_proj.weight.unflatten(1, heads_sbhd.shape[2:])
        s, b = heads_sbhd.shape[:2]
        out_shbm = heads_sbhd.new_zeros(s, len(wanted), b, weight_mhd.shape[0])
        for own, head_idx in enumerate(self.own_heads(layer_idx)):
            if head_idx in wanted:
                out_shbm[:, wanted.index(head_idx)] = heads_sbhd[:, :, own] @ weight_mhd[:, own].T
        return reduce_from_tensor_model_parallel_region(out_shbm, group=self.tp_group)

    def metric(self, x_pnm: Tensor, batch: ProbeBatch) -> Tensor:
        """Eq 9 of rows that left the last layer, before its final norm: [n] with the pairs innermost -> [n / b, b]."""
        return self.final_metric(self.model.decoder.final_layernorm(x_pnm), batch)

    def final_metric(self, x_pnm: Tensor, batch: ProbeBatch) -> Tensor:
        """The metric of hidden states after the final norm. It needs two logits a position, so only the rows of these
        two are multiplied.
        """
        model, pairs = self.model, len(batch.answer_bp)
        x_pnm = copy_to_tensor_model_parallel_region(
            x_pnm, group=self.tp_group
        )  # its gradient is summed over the vocabulary
        weight_wm = (
            model.shared_embedding_or_output_weight()
            if model.share_embeddings_and_output_weights
            else model.output_layer.weight
        )
        exact = torch.promote_types(self.dtype, torch.float32)  # a bf16 product would round to a tenth of a logit
        x_rbpm = x_pnm.unflatten(1, (-1, pairs)).permute(1, 2, 0, 3).to(exact)
        logits = []
        for ids_bp in (batch.answer_bp, batch.distractor_bp):
            local_bp = ids_bp - self.tp_group.rank() * len(weight_wm)
            here_bp = (local_bp >= 0) & (local_bp < len(weight_wm))
            row_bpm = weight_wm[local_bp.clamp(0, len(weight_wm) - 1)].to(exact) * here_bp[..., None]
            logits.append((x_rbpm * row_bpm).sum(-1))
        chosen_rbp, other_rbp = reduce_from_tensor_model_parallel_region(torch.stack(logits), group=self.tp_group)
        return answer_metric(chosen_rbp, other_rbp)

    # ---- neighbours in the pipeline

    def receive(self, tokens: int, rows: int) -> Tensor | None:
        """[tokens, rows, m] from the previous stage; None on the first."""
        return self.pipe.recv_forward((tokens, rows, self.model.config.hidden_size), self.first)

    def send(self, x_sbm: Tensor) -> None:
        """To the next stage, if there is one."""
        self.pipe.send_forward(x_sbm.contiguous(), self.last)

    def whole(self, partial: Tensor) -> Tensor:
        """The sum of what the ranks of one model hold: each filled in its own heads of its own layers."""
        for group in (self.tp_group, self.pipe.pp_group):
            torch.distributed.all_reduce(partial, group=group)
        return partial

    def from_last(self, value: Tensor) -> Tensor:
        """The last stage's value on all stages."""
        last = torch.distributed.get_global_rank(self.pipe.pp_group, self.pipe.pp_group.size() - 1)
        torch.distributed.broadcast(value, last, group=self.pipe.pp_group)
        return value


def answer_metric(chosen_bp: Tensor, other_bp: Tensor, decay: float = DECAY) -> Tensor:
    """Eq 9: mean over answer positions j of z_j[a+] - z_j[a-], weighted by decay^j; [..., p] logits -> [...] in
    float64.
    """
    difference = chosen_bp.double() - other_bp.double()
    weight_p = decay ** torch.arange(difference.shape[-1], dtype=torch.float64, device=difference.device)
    return (difference * weight_p).sum(-1) / weight_p.sum()
