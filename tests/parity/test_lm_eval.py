# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The command of docs/lm_eval.md, as a user types it, on a teacher and an untrained student that were exported."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from examples.lm_eval.make_needles import DOCUMENTS, needle_documents
from hydra_mcore.config import HydraOptions
from hydra_mcore.convert.hf_export import export_hf
from hydra_mcore.convert.inherit import hybridize
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.build import load_model
from hydra_mcore.model.runtime import process_groups
from tests.support.paths import ROOT, TINY_TEACHER

BLOCKS = re.findall(r"^```\n(.*?)^```$", (ROOT / "docs" / "lm_eval.md").read_text(), re.MULTILINE | re.DOTALL)
(COMMAND,) = (block.strip() for block in BLOCKS if "examples/lm_eval" in block)
WRITTEN, CHOSEN = "tiny_needle", "tiny_needle_choice"
LIMIT = 16
# Layers with some FA heads, with no others, with none.
HEAD_MAP = HeadMap.from_fa([(0, 1), (0, 5), (1, 2), *((2, h) for h in range(8))], 4, 8, 4)

each_model = pytest.mark.parametrize("name", ["teacher", "student"])


@dataclass(frozen=True)
class Evaluation:
    """What lm-eval wrote: the score of each task, and what it logged of each document."""

    scores: dict[str, float]
    samples: dict[str, list[dict[str, Any]]]

    @property
    def texts(self) -> list[str]:
        return [sample["resps"][0][0] for sample in self.samples[WRITTEN]]

    @property
    def loglikelihoods(self) -> torch.Tensor:
        """[documents, choices]"""
        return torch.tensor([[float(choice[0][0]) for choice in sample["resps"]] for sample in self.samples[CHOSEN]])


def run_documented(hf_dir: Path, out: Path, batch_size: int) -> Evaluation:
    """Run the document's command with another model, output, batch size and few documents; nothing is taken from the
    network.
    """
    command = f"{COMMAND} --limit {LIMIT}"
    ours = {"runs/demo/hf": str(hf_dir), "runs/demo/lm_eval": str(out), "--batch_size 4": f"--batch_size {batch_size}"}
    for documented, replacement in ours.items():
        assert command.count(documented) == 1
        command = command.replace(documented, replacement)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HOME": str(out / "home"),
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (results,) = out.glob("*/results_*.json")
    found = json.loads(results.read_text())["results"]
    scores = {WRITTEN: found[WRITTEN]["exact_match,value"], CHOSEN: found[CHOSEN]["acc,none"]}
    samples = {}
    for task in scores:
        (logged,) = out.glob(f"*/samples_{task}_[0-9]*.jsonl")
        samples[task] = sorted(map(json.loads, logged.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        assert [sample["doc_id"] for sample in samples[task]] == list(range(LIMIT))
    return Evaluation(scores, samples)


pytestmark = pytest.mark.slow  # half a minute; `make test-all` runs it


@pytest.fixture(scope="module", autouse=True)
def one_process(tiny_teacher: Path) -> Iterator[None]:
    with process_groups():
        yield


@pytest.fixture(scope="module")
def checkpoints(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    student = tmp_path_factory.mktemp("lm_eval") / "student"
    hybridize(tiny_teacher, HEAD_MAP, HydraOptions(), student)
    return {"teacher": tiny_teacher, "student": student}


@pytest.fixture(scope="module")
def evaluated(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], Evaluation]:
    """By model and batch size."""
    root = tmp_path_factory.mktemp("lm_eval")
    for name, checkpoint in checkpoints.items():
        export_hf(checkpoint, root / name)
    runs = [(name, batch_size) for name in checkpoints for batch_size in (4, 1)]
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda run: run_documented(root / run[0], root / f"{run[0]}-{run[1]}", run[1]), runs)
        return dict(zip(runs, done, strict=True))


def test_committed_documents_are_what_their_script_makes() -> None:
    committed = (ROOT / "examples" / "lm_eval" / "needles.jsonl").read_text().splitlines()
    assert list(map(json.loads, committed)) == list(needle_documents())
    assert len({len(json.loads(line)["prompt"]) for line in committed}) > DOCUMENTS / 2, (
        "rows of a batch differ in length"
    )


def test_only_the_teacher_finds_the_needles(evaluated: dict[tuple[str, int], Evaluation]) -> None:
    teacher, student = evaluated["teacher", 4].scores, evaluated["student", 4].scores
    assert min(teacher.values()) > 0.9
    assert student[WRITTEN] < 0.1
    assert student[CHOSEN] < 0.7


@each_model
def test_batches_of_unequal_rows_change_nothing(evaluated: dict[tuple[str, int], Evaluation], name: str) -> None:
    in_batches, alone = evaluated[name, 4], evaluated[name, 1]
    assert len(set(alone.texts)) > LIMIT / 2
    assert in_batches.texts == alone.texts
    torch.testing.assert_close(in_batches.loglikelihoods, alone.loglikelihoods, rtol=0, atol=5e-5)


@each_model
@torch.no_grad()
def test_loglikelihoods_are_the_checkpoints_own(
    evaluated: dict[tuple[str, int], Evaluation], checkpoints: dict[str, Path], name: str
) -> None:
    """Against the Megatron model, one text at a time: export, tokens and padding together."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_TEACHER)
    _, model = load_model(checkpoints[name])
    expected = []
    for sample in evaluated[name, 4].samples[CHOSEN]:
        document = sample["doc"]
        context = len(tokenizer.encode(document["prompt"]))
        for choice in document["choices"]:
            ids_bs = torch.tensor([tokenizer.encode(f"{document['prompt']} {choice}")])
            logits_bsw = model(ids_bs, torch.arange(ids_bs.shape[1])[None], None)
            of_next_bs = logits_bsw.log_softmax(-1)[:, :-1].gather(-1, ids_bs[:, 1:, None]).squeeze(-1)
            expected.append(of_next_bs[:, context - 1 :].sum())
    torch.testing.assert_close(evaluated[name, 4].loglikelihoods.flatten(), torch.stack(expected), rtol=0, atol=5e-5)
