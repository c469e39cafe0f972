# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What the tests of a layer's parts have in common."""

from collections.abc import Iterator

import pytest
from megatron.core.process_groups_config import ProcessGroupCollection

from hydra_mcore.model.runtime import process_groups


@pytest.fixture(scope="module")
def one_rank() -> Iterator[ProcessGroupCollection]:
    """Process groups of which each has this process alone."""
    with process_groups():
        yield ProcessGroupCollection.use_mpu_process_groups()
