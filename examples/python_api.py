# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""From a pretrained model to an exported student in Python; docs/python_api.md explains it."""

from pathlib import Path

import hydra_mcore


def transfer(hf: Path, recipe: Path, text: Path, run: Path, length: int = 512) -> None:
    """Turn the model of directory ``hf`` into a student in ``run/hf``, trained by a recipe and judged on a text."""
    hydra_mcore.import_model(hf, run / "teacher")
    scores = hydra_mcore.score_heads(run / "teacher", run / "heads", length=length, pairs=4)
    head_map = hydra_mcore.choose_heads(scores, ratio="3:1")
    print(f"{head_map.num_fa} heads keep full attention, by layer: {[layer['fa'] for layer in head_map.layers]}")
    hydra_mcore.hybridize(run / "teacher", head_map, run / "student", text=text)
    for stage in ("align", "distill", "extend"):
        hydra_mcore.train_stage(stage, recipe, run_dir=run, teacher=run / "teacher")
    models = {"teacher": run / "teacher", "student": run / "extend"}
    hydra_mcore.evaluate(models, [length, 2 * length], run / "evaluation", text=text, prompts=10)
    report = run / "evaluation" / "report.md"
    hydra_mcore.export_model(run / "extend", run / "hf", dtype="bf16", evaluation=report)
