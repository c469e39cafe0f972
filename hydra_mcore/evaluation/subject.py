# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint under verification, its teacher, source and export, and the logits of each.

Everything runs in float32, whatever the stored dtype: in bfloat16 a slip would hide behind rounding.
"""

from __future__ import annotations

import dataclasses
import os
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hydra_mcore.config import ModelCard
from hydra_mcore.convert.hf_code import check_model_code
from hydra_mcore.convert.hf_config import read_config
from hydra_mcore.convert.hf_export import export_hf
from hydra_mcore.convert.hf_import import check_tensors
from hydra_mcore.convert.hf_weights import HfWeights
from hydra_mcore.convert.tensor_table import is_teacher, tensor_rules
from hydra_mcore.costs.batch_sizes import rows_a_forward
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.layout_logits import Layout, Rows, logits_of, run_layouts
from hydra_mcore.model.build import load_model
from hydra_mcore.model.checkpoints import latest_iteration

MIN_LENGTH = 24  # so that five documents, two chunks and eight padded rows all differ in length
PADDED_ROWS, PADDED_LENGTH = 8, 128
LAYOUTS = (Layout(tp=2), Layout(pp=2), Layout(cp=2), Layout(tp=4), Layout(tp=2, pp=2))


class Skipped(Exception):
    """A check that cannot run, and what would let it."""


class Subject:
    """A checkpoint under verification and what it is compared with; logits are kept, models are not held together.

    Args:
        tokens_bs: token ids, [b, s] with s of at least ``MIN_LENGTH``.
        work: an empty folder for what is written on the way.
        hf: the Hugging Face directory that the teacher was imported from.
        teacher: the teacher's checkpoint, where the subject is a student.
        export: a Hugging Face export of the checkpoint; made in ``work`` unless given.
        served: address of a server of that export.

    Raises:
        InputError: no checkpoint, ``teacher`` is not one, ``hf`` or ``export`` no model directory, or tokens that do
            not fit.
    """

    def __init__(
        self,
        checkpoint: Path,
        tokens_bs: Tensor,
        work: Path,
        hf: Path | None = None,
        teacher: Path | None = None,
        export: Path | None = None,
        served: str | None = None,
    ) -> None:
        self.checkpoint, self.card, self.work = checkpoint, ModelCard.load(checkpoint), work
        if teacher is not None and is_teacher(self.card):
            raise InputError(f"{checkpoint}: is a teacher itself, so it has no other; leave --teacher out")
        self.teacher_dir = checkpoint if is_teacher(self.card) else teacher
        self.teacher_card = None if self.teacher_dir is None else ModelCard.load(self.teacher_dir)
        if self.teacher_card is not None and not is_teacher(self.teacher_card):
            raise InputError(
                f"{teacher}: a {self.teacher_card.stage} checkpoint, not a teacher's; give the folder that import wrote"
            )
        for folder in filter(None, (checkpoint, teacher)):
            latest_iteration(folder)
        for folder in filter(None, (hf, export)):
            read_config(folder)
        if tokens_bs.shape[1] < MIN_LENGTH:
            raise InputError(f"sequences of {tokens_bs.shape[1]} tokens tell little; take at least {MIN_LENGTH}")
        if (largest := int(tokens_bs.max())) >= self.card.shape.vocab_size:
            raise InputError(
                f"token {largest} is outside the vocabulary of {self.card.shape.vocab_size}; another model's tokenizer?"
            )
        self.rows, self.hf, self.given_export, self.served = Rows.of(tokens_bs), hf, export, served

    @cached_property
    def logits(self) -> dict[str, Tensor]:
        """The checkpoint's own, on one process: "dense" and "packed" (``logits_of``)."""
        return logits_of(load_model(self.checkpoint)[1], self.rows)

    @cached_property
    def teacher_logits_bsw(self) -> Tensor:
        """The teacher's, dense."""
        if self.teacher_dir == self.checkpoint:
            return self.logits["dense"]
        return logits_of(load_model(self.need_teacher())[1], self.rows)["dense"]

    def need_teacher(self) -> Path:
        if self.teacher_dir is None:
            raise Skipped("give --teacher DIR, the checkpoint of the student's teacher")
        return self.teacher_dir

    @cached_property
    def export_dir(self) -> Path:
        if self.given_export is None:
            export_hf(self.checkpoint, self.work / "export")
        return self.given_export or self.work / "export"

    @cached_property
    def exported(self) -> PreTrainedModel:
        """The export as a user loads it, with the code in its folder."""
        return load_hf(self.export_dir, self.card, run_its_code=not is_teacher(self.card))

    @cached_property
    def exported_bsw(self) -> Tensor:
        """The export's logits of each whole sequence at once, without a cache."""
        return hf_logits(self.exported, self.rows.tokens_bs)

    @cached_property
    def short_rows(self) -> list[tuple[Tensor, Tensor]]:
        """Rows of different lengths and the export's logits of each alone: ([s], [s, w])."""
        longest, ids = min(self.rows.tokens_bs.shape[1], PADDED_LENGTH), self.rows.tokens_bs.flatten()
        lengths = [1 + (longest - 1) * row // (PADDED_ROWS - 1) for row in range(PADDED_ROWS)]
        cut = [ids.roll(-sum(lengths[:row]))[:length] for row, length in enumerate(lengths)]
        return [(row_s, hf_logits(self.exported, row_s[None])[0]) for row_s in cut]

    @cached_property
    def on_ranks(self) -> dict[Layout, Path | str]:
        """For every layout that fits model and machine, the file of its logits, or the reason why there is none."""
        found: dict[Layout, Path | str] = {}
        for ranks in sorted({layout.ranks for layout in LAYOUTS}):
            fitting = [layout for layout in LAYOUTS if layout.ranks == ranks and not self.unfit(layout)]
            if fitting:
                found |= run_layouts(self.checkpoint, self.rows, fitting, self.work / f"ranks{ranks}")
        return found

    def unfit(self, layout: Layout) -> str:
        """Why a layout is left out; empty if it is not."""
        what, have = (
            ("GPUs", torch.cuda.device_count())
            if torch.cuda.is_available()
            else ("processor cores", os.cpu_count() or 1)
        )
        if have < layout.ranks:
            return f"needs {layout.ranks} {what}, this machine has {have}"
        try:
            layout.check(self.card, self.rows.tokens_bs.shape[1])
        except InputError as error:
            return str(error)
        return ""


def load_hf(folder: Path, card: ModelCard, run_its_code: bool = False) -> PreTrainedModel:
    """A Hugging Face directory's model in float32, on the GPU if there is one.

    Raises:
        InputError: it is not of the card's shape, its tensors are not those that its config.json asks for, or the code
            to run is not ours.
    """
    described = read_config(folder)
    if difference := card.difference(dataclasses.asdict(described.shape), ""):
        raise InputError(f"{folder} is another model: {difference}")
    check_tensors(HfWeights(folder, described.shape.tied_embeddings), tensor_rules(described), described)
    if run_its_code:
        check_model_code(folder, described.source["config"].get("auto_map"))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=run_its_code, local_files_only=True
    )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def hf_logits(model: PreTrainedModel, ids_bs: Tensor) -> Tensor:
    """[b, s, w] float32 on the CPU, from whole sequences without a cache."""
    batches = ids_bs.to(model.device).split(rows_a_forward(ids_bs.shape[1]))
    return torch.cat([model(batch_bs, use_cache=False).logits.float().cpu() for batch_bs in batches])
