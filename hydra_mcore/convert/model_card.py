# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The README.md of an exported model: what it is, how it was made, how to load it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hydra_mcore.config import HydraOptions, ModelCard
from hydra_mcore.convert.hydra_family import teacher_type
from hydra_mcore.convert.tensor_table import is_teacher
from hydra_mcore.errors import InputError
from hydra_mcore.files import write_text
from hydra_mcore.kinds import FA, KINDS

CARD_FILE = "README.md"

_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
{tags}---

"""
_HYDRA = """# HydraHead model

Every layer mixes full attention (FA) and {others} head by head ([arXiv 2606.20097](https://arxiv.org/abs/2606.20097)):
{num_fa} of {num_heads} heads keep full attention and a key/value cache; the others carry a state of constant size.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
```

## Origin

| | |
|---|---|
| teacher | {teacher}, weights `{fingerprint}` |
| shape | {num_layers} layers x {heads} heads ({groups} kv groups) x {head_dim}, width {width}, native length {native} |
| head map | strategy `{strategy}`, in `head_map.json` |
| stage | {stage} |
| options | {options} |

## Heads

{heads_table}
"""
_TEACHER = """# {teacher}

Weights `{fingerprint}`, stage {stage}, written by hydra_mcore.
"""
_TRAINING = """
## Training

| stage | tokens | sequence length |
|---|---|---|
{rows}
"""


def write_model_card(folder: Path, card: ModelCard, evaluation: str | Path | None) -> None:
    """Write README.md; raises InputError if the evaluation's markdown cannot be read."""
    facts = {"teacher": teacher_type(card) or "unknown", "fingerprint": card.fingerprint[:16], "stage": card.stage}
    if is_teacher(card):
        text = _FRONT.format(tags="") + _TEACHER.format(**facts)
    else:
        text = _FRONT.format(tags="tags:\n- hydra_head\n") + _HYDRA.format(**facts, **_layer_facts(card))
    if card.stages:
        text += _TRAINING.format(rows="\n".join(_training_rows(card.stages)))
    if evaluation is not None:
        try:
            text += "\n## Evaluation\n\n" + Path(evaluation).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"evaluation {evaluation}: cannot be read ({error}); give the report.md that tools/evaluate.py wrote"
            ) from None
    write_text(folder / CARD_FILE, text)


def _layer_facts(card: ModelCard) -> dict[str, str | int]:
    shape, head_map = card.shape, card.head_map
    changed = [
        f"{item.name} = {getattr(card.options, item.name)}"
        for item in dataclasses.fields(HydraOptions)
        if getattr(card.options, item.name) != item.default
    ]
    kinds = [kind for kind in KINDS if any(layer[kind] for layer in head_map.layers)]
    rows = [
        [idx, ", ".join(map(str, layer[FA])) or "-", *(len(layer[kind]) for kind in kinds if kind != FA)]
        for idx, layer in enumerate(head_map.layers)
    ]
    columns = ["layer", "FA heads", *(f"{KINDS[kind].label} heads" for kind in kinds if kind != FA)]
    table = [columns, ["---"] * len(columns), *rows]
    return {
        "num_fa": head_map.num_fa,
        "num_heads": shape.num_layers * shape.num_heads,
        "num_layers": shape.num_layers,
        "heads": shape.num_heads,
        "groups": shape.num_kv_groups,
        "head_dim": shape.head_dim,
        "width": shape.hidden_size,
        "native": shape.native_length,
        "strategy": head_map.strategy,
        "options": ", ".join(changed) or "all at their defaults",
        "heads_table": "\n".join(f"| {' | '.join(map(str, row))} |" for row in table),
        "others": ", ".join(KINDS[kind].title for kind in kinds if kind != FA),
    }


def _training_rows(stages: list[dict[str, Any]]) -> list[str]:
    rows = []
    for stage in stages:
        tokens = "not recorded"
        if stage["batch_size"]:
            tokens = f"{stage['iterations'] * stage['batch_size'] * stage['sequence_length']:,}"
        rows.append(f"| {stage['stage']} | {tokens} | {stage['sequence_length']} |")
    return rows
