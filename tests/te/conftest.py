# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""One run folder for each file of tests."""

import dataclasses
from pathlib import Path

import pytest

from tests.support.stages import SHAPE, make_run

WIDE = dataclasses.replace(SHAPE, head_dim=16, ffn_hidden_size=64)  # FP8 takes multiples of 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("te"), shape=WIDE)
