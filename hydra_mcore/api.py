# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The Python API: a function for each step from a pretrained model to an exported student.

The commands of tools/ call these functions, or what these call, so that both compute the same. Import the names from
``hydra_mcore``. Bad input raises ``hydra_mcore.errors.InputError``, whose text is one line with the cause and the fix.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_mcore.compat import install

install()

import torch  # noqa: E402  the patches come before the engine

from hydra_mcore.commands import end_with_parent, python_command  # noqa: E402
from hydra_mcore.config import HydraOptions, ModelCard  # noqa: E402
from hydra_mcore.convert.calibration import FIT_TOKENS, SCALE_TOKENS, calibration_tokens  # noqa: E402
from hydra_mcore.convert.fitted_start import MemoryTables  # noqa: E402
from hydra_mcore.convert.hf_export import export_hf  # noqa: E402
from hydra_mcore.convert.hf_import import import_hf  # noqa: E402
from hydra_mcore.convert.inherit import hybridize as write_student  # noqa: E402
from hydra_mcore.corpus.hub import model_folder  # noqa: E402
from hydra_mcore.errors import InputError  # noqa: E402
from hydra_mcore.evaluation.report import RESULTS_NAME  # noqa: E402
from hydra_mcore.evaluation.session import EvaluationSettings, run_evaluation  # noqa: E402
from hydra_mcore.files import read_json  # noqa: E402
from hydra_mcore.heads import HeadMap  # noqa: E402
from hydra_mcore.model.precision import DTYPES  # noqa: E402
from hydra_mcore.model.runtime import from_first_rank, process_groups  # noqa: E402
from hydra_mcore.selection.choose import parse_linear, parse_ratio  # noqa: E402
from hydra_mcore.selection.head_choice import ChoiceSettings, chosen_heads  # noqa: E402
from hydra_mcore.selection.head_scoring import ScoringSettings, save_findings, score_teacher  # noqa: E402
from hydra_mcore.selection.score import HeadScores  # noqa: E402
from hydra_mcore.stages import STAGES  # noqa: E402


def import_model(hf: str | Path, out: str | Path, dtype: str | None = None) -> ModelCard:
    """Write the checkpoint of a Hugging Face directory; returns its card.

    Args:
        hf: directory with config.json and safetensors, or its name on the hub. It holds a Qwen3, a Qwen2 or 2.5, a
            Llama, or an export of hydra_mcore.
        out: new folder.
        dtype: "float32" or "bf16"; None keeps what the directory has, so that nothing is rounded.
    """
    with _alone():
        return import_hf(model_folder(hf), out, _dtype(dtype))


def score_heads(teacher: str | Path, out: str | Path, **settings: Any) -> HeadScores:
    """Measure what every head of a teacher carries, and keep the scores in ``out/scores.json``.

    A call that was stopped goes on where it was. docs/selection.md says what is measured.

    Args:
        teacher: checkpoint folder that ``import_model`` wrote.
        out: folder for the scores.
        settings: fields of ``selection.head_scoring.ScoringSettings``, such as length (tokens) and pairs (of prompts).
    """
    chosen, card = ScoringSettings(teacher=Path(teacher), out=Path(out), **settings), ModelCard.load(teacher)
    with _alone():
        become = parse_linear((), card.shape.num_layers)
        findings = score_teacher(chosen, card, {}, list(chosen.replaceable_by), become)
        from_first_rank(lambda: save_findings(chosen.out, **findings))
    return findings["scores"]


def choose_heads(scores: HeadScores, ratio: str = "3:1", **settings: Any) -> HeadMap:
    """The heads that keep full attention, by their scores.

    Args:
        ratio: linear heads to heads of full attention.
        settings: fields of ``selection.head_choice.ChoiceSettings``, such as strategy, linear and seed.

    Returns:
        The head map; its ``save`` writes the file that ``tools/convert.py hybridize --head-map`` takes.
    """
    shape = scores.shape
    budget = parse_ratio(ratio, shape.num_layers * shape.num_heads)
    chosen = ChoiceSettings(ratio=ratio, **settings)
    return chosen_heads(chosen, shape, scores.fingerprint, budget, scores).head_map


def hybridize(
    teacher: str | Path,
    head_map: HeadMap,
    out: str | Path,
    options: HydraOptions | None = None,
    *,
    text: str | Path | None = None,
    start: str = "inherited",
    memories: MemoryTables | None = None,
    dtype: str = "float32",
    seed: int = 1234,
) -> ModelCard:
    """Write the checkpoint of a student, which inherits every value of the teacher that it can use; returns its card.

    Args:
        options: how the student's layers compute; None for the defaults.
        text: UTF-8 file whose first tokens set the fusion scales; without it they start at 1.
        start: "inherited", or "fitted", which solves for memories and projections on the text.
        memories: for a fitted start, the memories that head selection found.
        seed: of what starts at random, such as output gates.
    """
    tokens_bs = None
    if text is not None:
        tokens_bs = calibration_tokens(text, teacher, FIT_TOKENS if start == "fitted" else SCALE_TOKENS)
    chosen, kind = options or HydraOptions(), _dtype(dtype)
    with _alone(seed):
        return write_student(teacher, head_map, chosen, out, tokens_bs, kind, start, memories)


def train_stage(stage: str, config: str | Path | Sequence[str | Path], ranks: int = 1, **flags: Any) -> None:
    """Run a stage of training in processes of its own, as ``python -m hydra_mcore.train`` does.

    A stage starts from the one before it in the run folder, goes on from its own checkpoint, and does nothing where it
    is finished.

    Args:
        stage: "align", "distill" or "extend".
        config: recipe, or several, of which a later one wins.
        ranks: processes on this machine.
        flags: of Megatron or of the stage, with underscores; they win over the recipe: ``train_iters=100``,
            ``packed_documents=True``, ``data_path=["0.7", "a", "0.3", "b"]``.

    Raises:
        InputError: an unknown stage, or training ended with an error, which it has printed.
    """
    if stage not in STAGES:
        raise InputError(f"stage {stage!r}: choose one of {', '.join(STAGES)}")
    files = [config] if isinstance(config, str | Path) else config
    command = python_command(("-m", "hydra_mcore.train", "--stage", stage, "--config", *files, *_words(flags)), ranks)
    package = str(Path(__file__).parents[1])  # the child finds it where it is not installed, too
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))}
    status = subprocess.run(command, env=environment, preexec_fn=end_with_parent, check=False).returncode
    if status:
        raise InputError(f"stage {stage} ended with exit status {status}; its own message stands above")


def evaluate(
    models: Mapping[str, str | Path] | Sequence[str], lengths: Sequence[int], out: str | Path, **settings: Any
) -> dict[str, Any]:
    """Examine models side by side and write a report; returns what stands in ``out/results.json``.

    A piece that ``out`` holds already is not run again.

    Args:
        models: name -> checkpoint, Hugging Face directory or address of a server.
        lengths: tokens of a prompt, and of a window of text.
        settings: fields of ``evaluation.session.EvaluationSettings``, such as text, tasks and prompts.
    """
    named = [f"{name}={folder}" for name, folder in models.items()] if isinstance(models, Mapping) else list(models)
    run_evaluation(EvaluationSettings(models=named, lengths=list(lengths), out=Path(out), **settings))
    path = Path(out) / RESULTS_NAME
    return read_json(path) if path.exists() else {}


def export_model(
    checkpoint: str | Path,
    out: str | Path,
    dtype: str | None = None,
    *,
    max_shard_gb: float = 5.0,
    evaluation: str | Path | None = None,
    base_model: str = "",
    license: str = "",
) -> ModelCard:
    """Write the Hugging Face directory of a checkpoint, with its model card; returns the checkpoint's card.

    Args:
        dtype: "float32" or "bf16"; None keeps that of the source.
        max_shard_gb: largest safetensors file, in GB.
        evaluation: report.md that ``evaluate`` wrote, for the model card.
        base_model, license: for the model card; by default what the import noted.
    """
    with _alone():
        return export_hf(checkpoint, out, _dtype(dtype), max_shard_gb * 1e9, evaluation, base_model, license)


@contextlib.contextmanager
def _alone(seed: int = 0) -> Iterator[None]:
    """Process groups of one rank, unless the caller has groups."""
    with contextlib.nullcontext() if torch.distributed.is_initialized() else process_groups(seed=seed):
        yield


def _dtype(name: str | None) -> torch.dtype | None:
    if name not in (None, *DTYPES):
        raise InputError(f"dtype {name!r}: choose {' or '.join(DTYPES)}")
    return name and DTYPES[name]


def _words(flags: Mapping[str, Any]) -> Iterator[str]:
    """Flags as a command line has them: True stands for the flag alone, False and None for none."""
    for name, value in flags.items():
        if value is None or value is False:
            continue
        yield "--" + name.replace("_", "-")
        if value is not True:
            values = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
            yield from map(str, values)
