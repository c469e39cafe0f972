# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Paths of training, selection, evaluation and decoding on a fake GPU: python -m tests.support.fake_gpu_run TP REGEX.

Prints JSON of the paths whose names match: name -> the lines where the host waited for the GPU, or the error it ended
in. A process of its own, since it is told that it has a GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiled or not, an operation has the same device

import torch
from torch import Tensor

from tests.support import fake_gpu

fake_gpu.pretend()

from hydra_mcore import compat  # noqa: E402

compat.install()

from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

from hydra_mcore.compat import cpu  # noqa: E402
from hydra_mcore.config import HydraOptions, ModelCard, ModelShape, StageOptions, teacher_card  # noqa: E402
from hydra_mcore.convert.inherit import head_output_rms, inherit  # noqa: E402
from hydra_mcore.evaluation.parallel import ParallelModel  # noqa: E402
from hydra_mcore.heads import HeadMap, HeadsByKind  # noqa: E402
from hydra_mcore.model.build import (  # noqa: E402
    apply_card,
    build_model,
    contiguous_parts,
    model_config,
    transformer_config,
)
from hydra_mcore.ops import fla_kernels  # noqa: E402
from hydra_mcore.selection import knock_out  # noqa: E402
from hydra_mcore.selection.attribution import attributed_effects  # noqa: E402
from hydra_mcore.selection.observe import observed_scores  # noqa: E402
from hydra_mcore.selection.probes import ProbeBatch  # noqa: E402
from hydra_mcore.selection.receivers import receiver_effects  # noqa: E402
from hydra_mcore.selection.senders import SenderRuns  # noqa: E402
from hydra_mcore.selection.teacher import Teacher  # noqa: E402
from hydra_mcore.stages import STAGES  # noqa: E402
from hydra_mcore.train.data import MicroBatch  # noqa: E402
from hydra_mcore.train.step import forward_step  # noqa: E402
from tests.support.hf_model import fresh  # noqa: E402

SHAPE = ModelShape(
    num_layers=3, hidden_size=64, num_heads=4, num_kv_groups=2, head_dim=16, ffn_hidden_size=64, vocab_size=96,
    native_length=128
)  # fmt: skip
LAYERS = (
    HeadsByKind(fa=(0, 3), gdn=(1, 2)),
    HeadsByKind(fa=(2,), gdn=(0,), kda=(1,), lightning=(3,)),
    HeadsByKind(gdn=(0, 1), kda=(2, 3)),
)
OPTIONS = {
    "default": {},
    "all gates": {
        "fa_log_scale": "always", "fa_gate": "headwise", "gdn_gate": "elementwise", "kda_gate": "headwise",
        "gdn_conv_activation": "silu", "kda_kv": "per_group", "gate_order": "after_norm", "fusion": "competition",
    },
    "shared keys and values, no convolution": {"qkv": "shared", "gdn_conv_kernel": 0, "fusion": "none"},
}  # fmt: skip
LENGTH = 64
BOUNDS = torch.tensor([0, 1, 20, LENGTH], dtype=torch.int32)  # of documents; the host's, with values
Call = tuple[str, Callable[[], object]]  # a path's name and itself


def student_card(**options: object) -> ModelCard:
    head_map = HeadMap(num_heads=SHAPE.num_heads, num_kv_groups=SHAPE.num_kv_groups, layers=LAYERS)
    teacher = teacher_card(SHAPE, "f" * 64)
    return dataclasses.replace(teacher, head_map=head_map, options=HydraOptions(**options), stage="student")


def batch(packed: bool) -> MicroBatch:
    """As ``train.data.fetch_micro_batch`` gives them: on the GPU, boundaries on the host."""
    tokens_bs = torch.zeros(1 if packed else 2, LENGTH, dtype=torch.long, device="cuda")
    documents = PackedSeqParams("thd", BOUNDS, BOUNDS, max_seqlen_q=LENGTH, max_seqlen_kv=LENGTH) if packed else None
    position_ids_bs = torch.arange(LENGTH, device="cuda").expand_as(tokens_bs)
    return MicroBatch(tokens_bs, tokens_bs, torch.ones_like(tokens_bs).float(), position_ids_bs, documents)


def on_gpu[M: torch.nn.Module](model: M) -> M:
    """The model, whose parameters and buffers are there."""
    elsewhere = [name for name, x in (*model.named_parameters(), *model.named_buffers()) if not x.is_cuda]
    assert not elsewhere, f"on the CPU: {elsewhere}"
    return model


def trained_model(card: ModelCard, stage: str, dtype: torch.dtype) -> GPTModel:
    """As training builds it: with sequence parallelism and shared FA heads, where there are several ranks."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    transformer = transformer_config(card.shape, dtype, groups.tp.size())
    transformer.sequence_parallel = groups.tp.size() > 1
    config = model_config(card, stage, transformer)
    apply_card(config, card, stage, fa_balance="queries")
    return on_gpu(contiguous_parts(config.get_builder_cls()(config).build_model(groups), card.shape))


def train(stage: str, card: ModelCard, packed: bool, dtype: torch.dtype) -> None:
    row = STAGES[stage]
    teacher = trained_model(teacher_card(SHAPE, card.fingerprint), stage, dtype).requires_grad_(False)
    student = trained_model(card, stage, dtype)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(row.trains in name)
    teacher.post_process = row.needs_teacher_logits
    step = forward_step(StageOptions(stage=stage, head_statistics_interval=1), lambda *_: batch(packed), lambda: 1)
    step.prepare([student], [teacher] if row.needs_teacher else [])
    output, to_loss = step(None, student)
    to_loss(output)
    step.finish()


@torch.no_grad()
def evaluate(card: ModelCard, dtype: torch.dtype, ask: Callable[[ParallelModel, Tensor], object]) -> None:
    ask(ParallelModel([on_gpu(build_model(card, dtype=dtype)).eval()]), torch.zeros(2, 41, dtype=torch.long))


def select(ask: Callable[[Teacher, ProbeBatch], object]) -> None:
    teacher = Teacher(build_model(teacher_card(SHAPE, "f" * 64)).eval())
    ids_bs = torch.zeros(2, 24, dtype=torch.long)
    answer_bp = ids_bs[:, :3]
    probes = ProbeBatch("copy", "retrieval", ids_bs, ids_bs + 1, 21, answer_bp, answer_bp + 1, answer_bp)
    ask(teacher, probes.to(teacher.device))


@torch.no_grad()
def calibrate() -> None:
    """As ``convert.py hybridize`` does."""
    teacher = build_model(teacher_card(SHAPE, "f" * 64))
    scale_lh = head_output_rms(teacher, torch.zeros(2, LENGTH, dtype=torch.long))
    inherit(teacher, build_model(student_card()), SHAPE, scale_lh)


@torch.no_grad()
def decode_exported() -> None:
    """A Hugging Face model of ours: a prompt, then a token from the cache."""
    with tempfile.TemporaryDirectory() as folder, torch.device("cuda"):
        model = on_gpu(fresh(Path(folder)))
        ids_bs = torch.zeros(2, 12, dtype=torch.long)
        cache = model(ids_bs, use_cache=True).past_key_values
        model(ids_bs[:, :1], past_key_values=cache)


def without_kernels(run: Callable[[], object]) -> None:
    """As where flash-linear-attention is not installed."""
    kernels, fla_kernels.kernels = fla_kernels.kernels, lambda: None
    try:
        run()
    finally:
        fla_kernels.kernels = kernels


def alone() -> Iterator[Call]:
    """What runs on one rank only."""
    yield "calibration", calibrate
    yield "exported model", decode_exported
    yield "knock-out", partial(select, lambda teacher, probes: knock_out._answered(teacher, probes, {(0, 1), (2, 3)}))


def paths() -> Iterator[Call]:
    """What runs on any number of ranks."""
    for (name, options), stage, packed in itertools.product(OPTIONS.items(), STAGES, (False, True)):
        rows = "packed" if packed else "rows"
        yield f"{stage}, {rows}, {name}", partial(train, stage, student_card(**options), packed, torch.bfloat16)
    yield "distill, rows, float32", partial(train, "distill", student_card(), False, torch.float32)
    asked = {
        "accuracy": lambda model, ids_bs: model.predicted(ids_bs, 30),
        "loss": lambda model, ids_bs: model.token_losses(ids_bs),
        "decoding": lambda model, ids_bs: model.generated(ids_bs, 4, frozenset({1})),
    }
    for (name, options), (what, ask) in itertools.product(OPTIONS.items(), asked.items()):
        yield f"{what}, {name}", partial(evaluate, student_card(**options), torch.bfloat16, ask)
    yield "decoding, teacher", partial(evaluate, teacher_card(SHAPE, "f" * 64), torch.float32, asked["decoding"])
    for stage, packed in (("distill", False), ("extend", True)):
        run = partial(train, stage, student_card(), packed, torch.bfloat16)
        yield f"{stage}, without kernels", partial(without_kernels, run)
    run = partial(evaluate, student_card(), torch.float32, asked["decoding"])
    yield "decoding, without kernels", partial(without_kernels, run)
    yield "receivers", partial(select, receiver_effects)
    yield "senders", partial(select, lambda teacher, probes: SenderRuns(teacher, probes, ((1, 0), (2, 3))).effects(0))
    yield "attribution", partial(select, attributed_effects)
    yield "observed scores", partial(select, observed_scores)


def main(tp_size: int, only: str) -> None:
    logging.getLogger("megatron").setLevel(logging.ERROR)
    assert not compat.is_cpu_only()
    assert not {patch.target for patch in cpu.PATCHES} & {patch.target for patch in compat.applied()}
    fake_gpu.without_autograd()
    fla_kernels.kernels = lambda: fake_gpu.KERNELS
    init_num_microbatches_calculator(0, None, 1, 1, 1)
    found: dict[str, list[str] | str] = {}
    with fake_gpu.fake_ranks(tp_size, tp_size - 1):
        for name, run in (*paths(), *(alone() if tp_size == 1 else ())):
            if not re.search(only, name):
                continue
            try:
                with fake_gpu.fake_memory() as reads:
                    run()
                found[name] = reads.places
            except Exception as error:
                traceback.print_exc()
                found[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
