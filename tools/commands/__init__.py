# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What the commands do, once ``tools/NAME.py`` has parsed their flags: one module each, with its imports at the top.

A command imports its module after parsing, because torch and Megatron-Core take seconds and --help needs neither.
Importing this package installs what Megatron-Core lacks here. So that happens before any of its modules imports the
engine.
"""

from hydra_mcore.compat import install

install()
