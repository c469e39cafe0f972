# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What is silenced is still said by the pinned versions, and nothing else is."""

import importlib.util
import logging
import warnings
from pathlib import Path

import pytest

from hydra_mcore.compat import noise


@pytest.mark.parametrize(("module", "beginning"), (noise._RECORDS | noise._RECORDS_ON_A_CPU).items())
def test_the_records_are_still_written(module: str, beginning: str) -> None:
    assert beginning in Path(importlib.util.find_spec(module).origin).read_text()


def test_only_these_warnings_and_records_are_dropped() -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        noise.silence(on_cpu=True)
        warnings.warn("full scope is deprecated. Use empty cuda_graph_modules", stacklevel=1)
        warnings.warn("The argument order of load has been changed. Please check", stacklevel=1)
        warnings.warn("something else is deprecated", stacklevel=1)
    assert [str(warning.message) for warning in warned] == ["something else is deprecated"]
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    for message, kept in (("GPTModel IS DEPRECATED. GPTModel is only", False), ("a layer is missing", True)):
        record = logger.makeRecord(logger.name, logging.WARNING, __file__, 1, message, (), None)
        assert bool(logger.filter(record)) is kept
