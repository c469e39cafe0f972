# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Whole rows through a model on any layout, up to where logits would be made."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from hydra_mcore.model.cache import DecodingCache
from hydra_mcore.model.parameters import gathered
from hydra_mcore.model.te_layers import without_fp8
from hydra_mcore.ops.rows import positions
from hydra_mcore.sequence import SequencePart


def last_hidden(
    chunks: list[GPTModel], ids_bs: Tensor, documents: tuple[int, ...] | None = None, cache: DecodingCache | None = None
) -> tuple[Tensor, Tensor] | None:
    """What enters the output layer, and that layer's weight; called by all ranks of a model alike.

    Args:
        chunks: this rank's pipeline stages, several where they are virtual.
        ids_bs: int64 [b, s], the whole rows; s divides as the layout needs.
        documents: boundaries of the documents packed into the one row.
        cache: what the rows' earlier tokens left behind, ready for these ones; they leave theirs.

    Returns:
        On the last pipeline stage the hidden states [s, b, m] of this context-parallel rank's part, whole also under
        sequence parallelism, and this rank's rows of the weight [w, m]. None on the others.

    Raises:
        InputError: a length that context parallelism does not divide, or boundaries that are none.
    """
    config, groups, (batch, length) = chunks[0].config, chunks[0].pg_collection, ids_bs.shape
    device, pipe = torch.cuda.current_device(), P2PCommunicator(groups.pp, config)
    part = SequencePart(length, groups.cp.size(), groups.cp.rank(), documents) if cache is None else cache.part
    packed = None
    if documents is not None:
        cu_seqlens = torch.tensor(documents, dtype=torch.int32)  # on the host, where the layers read it
        packed = PackedSeqParams("thd", cu_seqlens, cu_seqlens, max_seqlen_q=length, max_seqlen_kv=length)
    divisor = groups.tp.size() if config.sequence_parallel else 1
    mine_bs = ids_bs[:, part.start : part.start + part.num_tokens].to(device)
    mine_bs, position_ids_bs = (
        F.pad(x_bs, (0, -part.num_tokens % divisor))  # of the few tokens of a decoding step
        for x_bs in (mine_bs, positions(part, device).expand_as(mine_bs))
    )
    rows = mine_bs.shape[1] // divisor
    for chunk in chunks:
        # of virtual stages, the later ones get what went around the ring of ranks
        chunk.set_input_tensor(pipe.recv_forward((rows, batch, config.hidden_size), chunk.pre_process))
        processor = {"output_processor": hidden_and_weight} if chunk.post_process else {}
        with without_fp8(config):  # in training too: prompts have any length
            out = chunk(mine_bs, position_ids_bs, None, inference_context=cache, packed_seq_params=packed, **processor)
        pipe.send_forward(out, chunk.post_process)
    if not chunks[-1].post_process:
        return None
    hidden_sbm, weight_wm = out
    if config.sequence_parallel:
        hidden_sbm = gather_from_sequence_parallel_region(hidden_sbm, group=groups.tp)
    return hidden_sbm[: part.num_tokens], weight_wm


def hidden_and_weight(
    hidden_states: Tensor, output_layer: torch.nn.Module, output_weight: Tensor | None, **_: Any
) -> tuple[Tensor, Tensor]:
    """The last hidden state and this rank's rows of the output layer, in place of logits (Megatron's
    ``output_processor``).
    """
    return hidden_states, gathered(output_layer).weight if output_weight is None else output_weight
