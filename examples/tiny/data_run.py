# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Write the data that the tiny teacher's students are trained, selected and evaluated on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from hydra_mcore.compat import install
from hydra_mcore.progress import Progress

install()

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: E402  the patches come first

from examples.tiny.corpus import documents, load_text  # noqa: E402
from examples.tiny.students import HERE  # noqa: E402
from hydra_mcore.files import write_text  # noqa: E402
from hydra_mcore.ruler.needle_format import NeedleFormat  # noqa: E402
from hydra_mcore.tokenizer import open_tokenizer  # noqa: E402

ALIGN_TOKENS, EXTEND_TOKENS = 256, 1024  # of a sequence, as the recipe has them
LAST = "held_out.txt"  # of all files, so that all are there when it is


def write_data(out: Path, seed: int, steps: Progress) -> None:
    """Real text with needles as IndexedDatasets, and plain text for selection and evaluation; once a folder."""
    if (out / LAST).exists():
        steps.update()
        return
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = open_tokenizer(HERE / "teacher")
    fmt = NeedleFormat.load(HERE / "teacher" / "needles.json")
    text_ids = load_text(tokenizer, "train", 300_000)
    for name, length, count in (("align", ALIGN_TOKENS, 2400), ("extend", EXTEND_TOKENS, 80)):
        builder = IndexedDatasetBuilder(str(out / f"{name}.bin"), dtype=np.uint16)
        for ids in Progress(
            documents(tokenizer, fmt, text_ids, length, count, seed),
            desc=f"data: {name}",
            total=count,
            position=1,
            leave=False,
        ):
            builder.add_document(torch.tensor(ids), [len(ids)])
        builder.finalize(str(out / f"{name}.idx"))
    write_text(out / "train.txt", tokenizer.decode(text_ids[:60_000]))
    write_text(out / LAST, tokenizer.decode(load_text(tokenizer, "held_out", 60_000)))
    steps.update()
