# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Python imports this when it starts, in processes whose path names this folder: the toy kind joins the tables."""

from hydra_mcore import kinds
from tests.toy_kind import EXPORTED, TOY

kinds.KINDS[TOY.name], kinds.EXPORTED_TABLE = TOY, EXPORTED
