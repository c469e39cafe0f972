# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What the commands do, once ``tools/NAME.py`` has parsed their flags: one module each, with its imports at the top.

Commands import theirs after parsing: torch and Megatron-Core take seconds, and --help needs neither. What Megatron-Core
lacks here is installed with this package, so before any module of it imports the engine.
"""

from hydra_mcore.compat import install

install()
