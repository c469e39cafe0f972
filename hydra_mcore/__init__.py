# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""hydra_mcore: full attention and Gated DeltaNet mixed head by head, on Megatron-Core.

The names below are the Python API; examples/python_api.py uses them. Each is imported when it is first asked for, since
torch and Megatron-Core take seconds.
"""

import importlib
import sys
from typing import Any

# In a checkout whose .venv is not active, the next import would end in a SyntaxError.
if sys.version_info < (3, 12):  # noqa: UP036
    version = ".".join(map(str, sys.version_info[:2]))
    fix = "make env, then source .venv/bin/activate"
    sys.stderr.write(f"hydra_mcore needs Python 3.12 or newer, and {sys.executable} is {version}: {fix}\n")
    raise SystemExit(2)

__version__ = "0.1.0"
_PLACES = {
    "import_model": "hydra_mcore.api",
    "score_heads": "hydra_mcore.api",
    "choose_heads": "hydra_mcore.api",
    "hybridize": "hydra_mcore.api",
    "train_stage": "hydra_mcore.api",
    "evaluate": "hydra_mcore.api",
    "export_model": "hydra_mcore.api",
    "HeadMap": "hydra_mcore.heads",
    "HydraOptions": "hydra_mcore.config",
    "ModelCard": "hydra_mcore.config",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'hydra_mcore' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
