# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""hydra_mcore: full attention and Gated DeltaNet mixed head by head, on Megatron-Core.

The names below are the Python API; examples/python_api.py uses them. Each is imported when it is first asked for, since
torch and Megatron-Core take seconds.
"""

import importlib
from typing import Any

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
