# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The README.md of an exported model: what it is, how it was made, how to load it, how to publish it."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hydra_mcore.config import HydraOptions, ModelCard
from hydra_mcore.convert.head_figure import head_figure
from hydra_mcore.convert.hydra_family import teacher_facts
from hydra_mcore.convert.tensor_table import is_teacher
from hydra_mcore.errors import InputError
from hydra_mcore.files import write_text
from hydra_mcore.kinds import FA, KINDS

CARD_FILE, HEAD_FIGURE = "README.md", "heads.png"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PICTURE = re.compile(r"!\[[^\]]*\]\(([\w-]+\.png)\)")

_HYDRA = """# {title}

Every layer mixes full attention (FA) and {others} head by head ([arXiv 2606.20097](https://arxiv.org/abs/2606.20097)):
{num_fa} of {num_heads} heads keep full attention and a key/value cache; the others carry a state of constant size.

![the kind of every head]({figure})
"""
_TEACHER = """# {title}

Weights `{fingerprint}` of {base}, stage {stage}, written by hydra_mcore.
"""
_USE = """
## Use

PATH is this folder, or the name of its repository on the hub.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto"{trust})
tokenizer = AutoTokenizer.from_pretrained("PATH"{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

The folder becomes a repository of the hub with

```
hf upload USER/NAME PATH
```
"""
_ORIGIN = """
## Origin

| | |
|---|---|
| base model | {base} |
| licence | {license} |
| teacher | {model_type}, weights `{fingerprint}` |
| shape | {num_layers} layers x {heads} heads ({groups} kv groups) x {head_dim}, width {width} |
| longest sequences | {native} tokens for the teacher, {longest} for this model (`max_position_embeddings`) |
| head map | strategy `{strategy}`, in `head_map.json` |
| stage | {stage} |
| options | {options} |

## Heads

{heads_table}
"""
_TRAINING = """
## Training

| stage | tokens | sequence length | datasets |
|---|---|---|---|
{rows}
"""


def write_model_card(
    folder: Path, card: ModelCard, evaluation: str | Path | None, base_model: str = "", license: str = ""
) -> None:
    """Write README.md and its pictures.

    Args:
        evaluation: markdown that the card shall carry, with the pictures beside it that it shows.
        base_model: name of the pretrained model on the hub; by default the name that the import noted.
        license: as the hub names it; by default that of the pretrained model.

    Raises:
        InputError: the evaluation's markdown cannot be read.
    """
    facts = teacher_facts(card)
    if base_model and base_model != facts["name"]:
        facts["name"], facts["revision"] = base_model, ""  # the import noted a commit of another name
    facts["license"] = license or facts["license"]
    names = {"fingerprint": card.fingerprint[:16], "stage": card.stage, "figure": HEAD_FIGURE}
    known = names | {key: value or "unknown" for key, value in facts.items()}
    known["base"] = known["name"] + (f", commit `{facts['revision']}`" if facts["revision"] else "")
    if is_teacher(card):
        text = _TEACHER.format(title=facts["name"] or known["model_type"], **known) + _USE.format(trust="")
    else:
        head_figure(folder / HEAD_FIGURE, card.head_map)
        known |= {"title": f"HydraHead model of {facts['name']}" if facts["name"] else "HydraHead model"}
        known |= _layer_facts(card)
        text = _HYDRA.format(**known) + _USE.format(trust=", trust_remote_code=True") + _ORIGIN.format(**known)
    if card.stages:
        text += _TRAINING.format(rows="\n".join(_training_rows(card.stages)))
    if evaluation is not None:
        text += "\n" + _evaluation(folder, Path(evaluation))
    write_text(folder / CARD_FILE, _front(card, facts) + text)


def _front(card: ModelCard, facts: dict[str, str]) -> str:
    """The facts that the hub reads; those that are not known are left out, as it refuses empty ones."""
    named = itertools.chain.from_iterable(stage.get("datasets", ()) for stage in card.stages)
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": facts["name"] if HUB_ID.fullmatch(facts["name"]) else "",
        "license": facts["license"],
        "datasets": list(dict.fromkeys(filter(HUB_ID.fullmatch, named))),
        "tags": [] if is_teacher(card) else ["hydra_head"],
    }
    known = {key: value for key, value in front.items() if value}
    return f"---\n{yaml.safe_dump(known, sort_keys=False)}---\n\n"


def _evaluation(folder: Path, report: Path) -> str:
    """A report as a section; the pictures that it shows are copied, and left out where they do not lie beside it."""
    try:
        text = report.read_text(encoding="utf-8")
        for name in _PICTURE.findall(text):
            if (report.parent / name).is_file():
                shutil.copyfile(report.parent / name, folder / name)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"evaluation {report}: cannot be read ({error}); give the report.md that tools/evaluate.py wrote"
        ) from None
    text = _PICTURE.sub(lambda found: found[0] if (folder / found[1]).is_file() else "", text)
    deeper = re.sub(r"(?m)^(#+ )", r"#\1", text)
    return deeper if deeper.startswith("## Evaluation\n") else f"## Evaluation\n\n{deeper}"


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
        "longest": card.longest_trained,
        "strategy": head_map.strategy,
        "options": ", ".join(changed) or "all at their defaults",
        "heads_table": "\n".join(f"| {' | '.join(map(str, row))} |" for row in table),
        "others": ", ".join(KINDS[kind].title for kind in kinds if kind != FA),
    }


def _training_rows(stages: list[dict[str, Any]]) -> Iterator[str]:
    """A row for each stage, and their sum where the tokens of all are known."""
    tokens = [stage["iterations"] * stage["batch_size"] * stage["sequence_length"] for stage in stages]
    for stage, count in zip(stages, tokens, strict=True):
        datasets = ", ".join(stage.get("datasets", ())) or "not recorded"
        yield f"| {stage['stage']} | {_counted(count)} | {stage['sequence_length']} | {datasets} |"
    if len(stages) > 1 and all(tokens):
        yield f"| all | {_counted(sum(tokens))} | | |"


def _counted(tokens: int) -> str:
    return f"{tokens:,}" if tokens else "not recorded"
