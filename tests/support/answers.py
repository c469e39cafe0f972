# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder that an evaluation leaves, with answers set by hand."""

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path


def answered(
    evaluation: Path,
    models: Mapping[str, Mapping[int, float]],
    perplexity: float = 20.0,
    groups: Sequence[str] = ("single-key",),
) -> Path:
    """A finished evaluation: model -> prompt length -> share of prompts of each group; one perplexity for all text."""
    results = {
        model: {
            "groups": [
                {"group": group, "length": length, "accuracy": share}
                for group, (length, share) in product(groups, by_length.items())
            ],
            "text": [{"length": length, "perplexity": perplexity} for length in by_length],
        }
        for model, by_length in models.items()
    }
    evaluation.mkdir(parents=True)
    (evaluation / "results.json").write_text(json.dumps({"format": 2, "models": results}))
    return evaluation
