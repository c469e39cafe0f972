# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Head scores of a teacher that is spread over ranks are those of one process, and those of the naive procedure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hydra_mcore.config import teacher_card
from hydra_mcore.model.build import load_model
from hydra_mcore.model.checkpoints import save_weights
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.selection.attribution import attributed_effects
from hydra_mcore.selection.knock_out import knock_out
from hydra_mcore.selection.observe import observed_scores
from hydra_mcore.selection.probes import ProbeBatch
from hydra_mcore.selection.receivers import receiver_effects
from hydra_mcore.selection.scoring import Scoring
from hydra_mcore.selection.senders import SenderRuns
from hydra_mcore.selection.teacher import Teacher
from tests.support.launch import model_parallel, run_ranks
from tests.support.naive_patching import naive_receiver_effects, naive_sender_effects
from tests.support.planted import SHAPE as PLANTED
from tests.support.planted import planted_model, planted_pairs
from tests.support.teachers import SHAPE, random_pairs, random_teacher, tensors

RECEIVERS = [(1, 0), (2, 5), (3, 1), (3, 3)]  # on both stages of a pipeline, on all tensor-parallel ranks
LAYOUTS = {
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "tp2-pp2": (4, {"tp": 2, "pp": 2}),
    "pp4": (4, {"pp": 4}),
}
layouts = [
    pytest.param(*layout, id=name, marks=[pytest.mark.slow] if name == "pp4" else [])
    for name, layout in LAYOUTS.items()
]

Results = dict[str, torch.Tensor | None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    with process_groups():
        save_weights([random_teacher()], teacher_card(SHAPE, "0" * 64), folder)
    return folder


@pytest.fixture(scope="module")
def naive(folder: Path) -> Results:
    """One process, one or two full forward passes a head."""
    with process_groups():
        _, model = load_model(folder)
        arguments = (model, *tensors(random_pairs()))
        return {"receivers": naive_receiver_effects(*arguments), "senders": naive_sender_effects(*arguments, RECEIVERS)}


@pytest.fixture(scope="module")
def alone(folder: Path) -> Results:
    with process_groups():
        return measure(folder)


def measure(folder: Path) -> Results:
    """Everything that is measured of a teacher; what only the last pipeline stage knows is None on the others."""
    _, model = load_model(folder)
    teacher, batch = Teacher(model), random_pairs()
    received = receiver_effects(teacher, batch)
    runs = SenderRuns(teacher, batch, RECEIVERS)
    senders = [runs.effects(layer_idx) for layer_idx in range(SHAPE.num_layers)]
    estimates = attributed_effects(teacher, batch)
    return {
        "receivers": None if received is None else received.effects_rlhb[0],
        "metrics": None if received is None else torch.stack([received.clean_b, received.corrupt_b]),
        "solved": None if received is None else received.solved_b,
        "senders": torch.stack(senders) if teacher.last else None,
        "estimates": estimates.effects_rlhb,
        "estimated metrics": torch.stack([estimates.clean_b, estimates.corrupt_b]),
        "observed": observed_scores(teacher, batch),
    }


@pytest.mark.parametrize(("world_size", "sizes"), layouts)
def test_every_layout_measures_what_one_process_does(
    folder: Path, alone: Results, naive: Results, world_size: int, sizes: dict
) -> None:
    def worker(rank: int) -> Results:
        with model_parallel(**sizes):
            return measure(folder)

    ranks = run_ranks(worker, world_size)
    assert any(results["receivers"] is not None for results in ranks)
    for results in ranks:
        for name, value in results.items():
            if value is not None:
                torch.testing.assert_close(
                    value, alone[name], rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
                )
        for name, expected in naive.items():
            if results[name] is not None:
                torch.testing.assert_close(results[name], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("world_size", "sizes", "replicas"), [(2, {}, 2), (3, {"tp": 3}, 1), (3, {"pp": 3}, 1)], ids=["dp2", "tp3", "pp3"]
)
def test_a_scoring_run_on_several_ranks(tmp_path: Path, world_size: int, sizes: dict, replicas: int) -> None:
    """All ranks end with the scores of one process; each replica did a part of the work, and only once."""
    with process_groups():
        save_weights([planted_model()], teacher_card(PLANTED, "0" * 64), tmp_path / "teacher")

    def score(journal: Path) -> list[np.ndarray]:
        _, model = load_model(tmp_path / "teacher")
        scoring = Scoring(Teacher(model), planted_probes(), journal, {"run": 1})
        effects = scoring.exact()
        every_head = [(layer, head) for layer in range(PLANTED.num_layers) for head in range(PLANTED.num_heads)]
        curves = knock_out(scoring, planted_probes()["two"], every_head, seed=0)
        tables = [table for probe in effects.values() for table in (probe.effects_rlhb, probe.clean_b, probe.solved_b)]
        return [*tables, *scoring.observed().values(), np.array(sum(curves.accuracy.values(), ()))]

    def worker(rank: int) -> list[np.ndarray]:
        with model_parallel(**sizes):
            return score(tmp_path / "shared")

    ranks = run_ranks(worker, world_size)
    with process_groups():
        expected = score(tmp_path / "alone")
    assert len(expected[0]) == 2  # there were receivers, so senders were measured
    for found in ranks:
        for value, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(value, other, rtol=1e-4, atol=2e-5)
    files = sorted((tmp_path / "shared").iterdir())
    assert [file.name for file in files] == [f"replica{replica}.jsonl" for replica in range(replicas)]
    shares = [len(file.read_text().splitlines()) - 1 for file in files]
    assert sum(shares) == len((tmp_path / "alone" / "replica0.jsonl").read_text().splitlines()) - 1
    assert min(shares) > 0.3 * sum(shares) / replicas


def planted_probes() -> dict[str, list[ProbeBatch]]:
    """Two probes, the first in two batches."""

    def batch(probe: str, count: int, seed: int) -> ProbeBatch:
        pairs, needles_bn = planted_pairs(count, seed)
        return ProbeBatch(probe, "retrieval", *pairs, source_bp=needles_bn[:, 1:2])

    return {"one": [batch("one", 2, 0), batch("one", 3, 1)], "two": [batch("two", 4, 2)]}
