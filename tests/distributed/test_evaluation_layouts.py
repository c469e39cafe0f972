# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A model as evaluation sees it is the same on every layout, and the same as whole logits in float64 say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_mcore.config import ModelCard
from tests.support.launch import model_parallel, run_ranks
from tests.support.stages import SHAPE, make_run

LENGTHS = {
    3: 3,
    37: 1,
    150: 2,
}  # of rows -> how many; divided among ranks, the shortest leave a short convolution too little
LAYOUTS = {
    "tp2": {"tp": 2},
    "cp2": {"cp": 2},
    "pp2-virtual": {"pp": 2, "vpp": 2},
    "tp2-sp-cp2": {"tp": 2, "cp": 2, "sequence_parallel": True},
    "pp2-dp2": {"pp": 2, "dp": 2},
    "tp2-sp-pp2-cp2": {"tp": 2, "pp": 2, "cp": 2, "sequence_parallel": True},
    "cp4-dp2": {"cp": 4, "dp": 2},
}
QUICK = ("tp2", "cp2", "tp2-sp-cp2", "pp2-dp2")


TIES_BW = torch.randint(
    3, (40, SHAPE.vocab_size), generator=torch.Generator().manual_seed(0)
)  # many largest logits on every rank


def rows(length: int) -> Tensor:
    return torch.randint(SHAPE.vocab_size, (LENGTHS[length], length), generator=torch.Generator().manual_seed(length))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("layouts")) / "student"


@pytest.fixture(scope="module")
def logits(student: Path) -> dict[int, Tensor]:
    """Of each length's rows: [b, s, w] in float64, by the stock model on one process."""
    (found,) = run_ranks(_whole_logits, 1, student)
    return found


def _whole_logits(rank: int, student: Path) -> dict[int, Tensor]:
    from hydra_mcore.model.build import load_model

    with model_parallel(), torch.no_grad():
        _, model = load_model(student, torch.float64)
        return {
            length: model(rows(length), torch.arange(length).expand(LENGTHS[length], -1), None) for length in LENGTHS
        }


def build(card: ModelCard, chunks: int, sequence_parallel: bool, fa_balance: str = "heads") -> list[torch.nn.Module]:
    """This rank's chunks of a model, without its weights, as training makes them."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from hydra_mcore.model.build import apply_card, contiguous_parts, model_config, transformer_config

    groups = ProcessGroupCollection.use_mpu_process_groups()
    transformer = transformer_config(card.shape, torch.float32, groups.tp.size(), groups.pp.size())
    transformer.context_parallel_size, transformer.sequence_parallel = groups.cp.size(), sequence_parallel
    if chunks > 1:
        transformer.virtual_pipeline_model_parallel_size = chunks
    config = model_config(card, "inference", transformer)
    apply_card(config, card, "inference", fa_balance)
    built = []
    for chunk in range(chunks):
        stage = {"vp_stage": chunk} if chunks > 1 else {}
        built.append(contiguous_parts(config.get_builder_cls()(config).build_model(groups, **stage), card.shape))
    return built


def _answers(rank: int, student: Path, layout: dict[str, Any]) -> dict[str, Any]:
    from hydra_mcore.evaluation import parallel
    from hydra_mcore.model.checkpoints import load_weights

    layout = {name: size for name, size in layout.items() if name != "dp"}
    sequence_parallel = layout.pop("sequence_parallel", False)
    parallel.LOGITS_AT_ONCE = (
        7 * SHAPE.vocab_size // layout.get("tp", 1)
    )  # few tokens at a time, and not all the same number
    with model_parallel(**layout):
        chunks = build(ModelCard.load(student), layout.get("vpp", 1), sequence_parallel)
        load_weights(chunks, student)
        model = parallel.ParallelModel([chunk.eval() for chunk in chunks])
        found = {
            length: {
                "losses": model.token_losses(rows(length)),
                "predicted": {start: model.predicted(rows(length), start) for start in (1, length // 2, length - 1)},
            }
            for length in LENGTHS
        }
        ties_bw = TIES_BW.chunk(model.groups.tp.size(), dim=1)[model.groups.tp.rank()].bfloat16()
        facts = {"replica": (model.replica, model.replicas), "collected": model.collect([model.replica, "x"])}
        return facts | {"found": found, "of ties": model.likeliest(ties_bw)}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_every_layout_gives_what_whole_logits_give(student: Path, logits: dict[int, Tensor], name: str) -> None:
    layout, world_size = LAYOUTS[name], 1
    for size in ("tp", "cp", "pp", "dp"):
        world_size *= layout.get(size, 1)
    answers = run_ranks(_answers, world_size, student, layout)
    replicas = layout.get("dp", 1)
    assert sorted({answer["replica"] for answer in answers}) == [(replica, replicas) for replica in range(replicas)]
    for answer in answers:
        assert answer["of ties"].tolist() == np.argmax(TIES_BW.numpy(), axis=1).tolist()  # the first, says numpy
        assert answer["collected"] == [[replica, "x"] for replica in range(replicas)]
        for length, found in answer["found"].items():
            ids_bs, expected_bsw = rows(length), logits[length]
            likeliest_bp = expected_bsw[:, :-1].argmax(-1)
            losses_bp = F.cross_entropy(expected_bsw[:, :-1].transpose(1, 2), ids_bs[:, 1:], reduction="none")
            loss_bp, predicted_bp = found["losses"]
            assert loss_bp.dtype == torch.float32 and (loss_bp - losses_bp).abs().max() < 2e-5
            assert torch.equal(predicted_bp, likeliest_bp)
            for start, from_start_bp in found["predicted"].items():
                assert torch.equal(from_start_bp, likeliest_bp[:, start - 1 :])
