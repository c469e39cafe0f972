# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The table of kinds of heads: what a description must say, what it copies from code with torch, that it needs none."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from hydra_mcore import kinds
from hydra_mcore.config import HydraOptions, field_docs
from hydra_mcore.kinds import KINDS, recurrent
from hydra_mcore.kinds.kind import HeadKind
from hydra_mcore.ops import chunks
from hydra_mcore.ops.gated_delta import gated_delta_rule
from hydra_mcore.train.head_statistics import COMMON

TORCH_FREE = (
    "kinds",
    *(
        f"kinds.{name}"
        for name in ("delta_rule", "full_attention", "gated_delta", "kimi_delta", "lightning", "recurrent")
    ),
    *("heads", "config", "shape", "sequence"),
)


def test_segments_are_those_of_the_recurrences() -> None:
    assert gated_delta_rule.__kwdefaults__["chunk_size"] == recurrent.CHUNK == chunks.CHUNK
    assert recurrent.SEGMENT_VALUES == chunks.SEGMENT_VALUES
    for heads in (0, 1, 3, 16, 1024):
        for d in (1, 8, 64, 128, 4096):
            assert recurrent.segment_tokens(heads, d) == chunks.segment_tokens(heads, d)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_descriptions_need_no_torch(module: str) -> None:
    """Torch and Megatron take seconds to import, and a plan, a card or a head map needs neither."""
    script = f"import sys, hydra_mcore.{module}; print(sorted({{'torch', 'megatron', 'numpy'}} & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_the_table() -> None:
    assert list(KINDS) == ["fa", "gdn", "kda", "lightning"] and kinds.FA == "fa" and kinds.DEFAULT_LINEAR in KINDS
    for name, kind in KINDS.items():
        assert kind.name == name and name.isidentifier()
    for fact in ("label", "title", "colour", "core"):
        assert len({getattr(kind, fact) for kind in KINDS.values()}) == len(KINDS), f"{fact} tells kinds apart"


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_options_are_named_after_their_kind_and_say_where_they_are_from(kind: HeadKind) -> None:
    docs = field_docs(kind.options)
    for item in dataclasses.fields(kind.options):
        assert item.name.startswith(f"{kind.name}_")
        assert docs[item.name].rstrip(". \n").endswith("]"), f"{item.name} lacks its source mark"
        assert getattr(HydraOptions(), item.name) == item.default


def test_a_statistic_of_one_name_is_one_statistic() -> None:
    """Tables of heads have a row for each name."""
    named = {statistic.name: statistic for kind in KINDS.values() for statistic in kind.statistics}
    for kind in KINDS.values():
        assert all(statistic == named[statistic.name] for statistic in kind.statistics)
    assert not named.keys() & {statistic.name for statistic in COMMON}
