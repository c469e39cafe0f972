# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder that an evaluation leaves, with answers set by hand."""

import json
from collections.abc import Mapping
from pathlib import Path

GROUP = "single-key"


def answered(evaluation: Path, models: Mapping[str, Mapping[int, float]], perplexity: float = 20.0) -> Path:
    """A finished evaluation: model -> prompt length -> share of single keys found; one perplexity for all text."""
    results = {
        model: {
            "groups": [{"group": GROUP, "length": length, "accuracy": share} for length, share in by_length.items()],
            "text": [{"length": length, "perplexity": perplexity} for length in by_length],
        }
        for model, by_length in models.items()
    }
    evaluation.mkdir(parents=True)
    (evaluation / "results.json").write_text(json.dumps({"format": 2, "models": results}))
    return evaluation
