# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The losses of the three stages, on tensors that may be sharded over the tensor-parallel group."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

Group = torch.distributed.ProcessGroup


def align_loss(student_sbm: Tensor, teacher_sbm: Tensor, kind: str, tp_group: Group | None) -> Tensor:
    """Squared error of one layer's attention output (paper Eq 15), a scalar.

    "squared": summed over the width, averaged over tokens. "relative": each sequence's error over the square of
    the teacher's own output there, averaged over sequences; 1 means "no better than zero" in every layer, and the
    value does not depend on how sequences are dealt to micro-batches.

    Args:
        tp_group: the group that the sequence is sharded over (sequence parallelism), or None.
    """
    error_b = (student_sbm.float() - teacher_sbm.float()).square().sum(dim=(0, 2))
    scale_b = teacher_sbm.float().square().sum(dim=(0, 2)) if kind == "relative" else torch.full_like(error_b, student_sbm.shape[0])
    if tp_group is not None and tp_group.size() > 1:
        error_b = reduce_from_tensor_model_parallel_region(error_b, group=tp_group)
        scale_b = reduce_from_tensor_model_parallel_region(scale_b, group=tp_group)
    return (error_b / scale_b).mean()


def kl_divergence(teacher_bsw: Tensor, student_bsw: Tensor, temperature: float, tp_group: Group) -> Tensor:
    """KL(teacher, student) of each token over the whole vocabulary (paper Eq 16), times temperature^2: [b, s].

    Both logits hold this rank's columns of the vocabulary.
    """
    teacher = teacher_bsw.float() / temperature
    student = student_bsw.float() / temperature
    log_z_teacher = _log_normaliser(teacher, tp_group)
    log_z_student = _log_normaliser(student, tp_group)
    probability = (teacher - log_z_teacher[..., None]).exp()
    difference_bs = (probability * (teacher - student)).sum(dim=-1)
    difference_bs = reduce_from_tensor_model_parallel_region(difference_bs, group=tp_group)
    return temperature**2 * (difference_bs - log_z_teacher + log_z_student)


def _log_normaliser(logits_bsw: Tensor, tp_group: Group) -> Tensor:
    """log sum exp over the whole vocabulary, every rank holding some columns: [b, s]."""
    peak_bs = logits_bsw.detach().amax(dim=-1)
    if tp_group.size() > 1:
        torch.distributed.all_reduce(peak_bs, op=torch.distributed.ReduceOp.MAX, group=tp_group)
    total_bs = (logits_bsw - peak_bs[..., None]).exp().sum(dim=-1)
    return peak_bs + reduce_from_tensor_model_parallel_region(total_bs, group=tp_group).log()


def cross_entropy(logits_bsw: Tensor, labels_bs: Tensor, tp_group: Group) -> Tensor:
    """Next-token loss of each token, logits sharded over the vocabulary: [b, s]."""
    logits_sbw = logits_bsw.float().transpose(0, 1).contiguous()
    return vocab_parallel_cross_entropy(logits_sbw, labels_bs.transpose(0, 1).contiguous(), tp_group=tp_group).transpose(0, 1)
