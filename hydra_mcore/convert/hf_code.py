# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The Python files that an exported model needs beside its weights, so that transformers can load it without
hydra_mcore.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hydra_mcore.errors import InputError
from hydra_mcore.ops import chunked_delta_rule

PACKAGE = Path(__file__).parents[1]
CODE_FILES = (
    "convert/hf_model/configuration_hydra_head.py",
    "convert/hf_model/cache_hydra_head.py",
    "convert/hf_model/heads_hydra_head.py",
    "convert/hf_model/fa_heads_hydra_head.py",
    "convert/hf_model/gdn_heads_hydra_head.py",
    "convert/hf_model/kinds_hydra_head.py",
    "convert/hf_model/modeling_hydra_head.py",
    "ops/chunked_delta_rule.py",
)
# For config.json: where transformers' Auto classes find theirs.
AUTO_MAP = {
    "AutoConfig": "configuration_hydra_head.HydraHeadConfig",
    "AutoModel": "modeling_hydra_head.HydraHeadModel",
    "AutoModelForCausalLM": "modeling_hydra_head.HydraHeadForCausalLM",
}


def copy_model_code(target_dir: str | Path) -> None:
    """Copy the files side by side into a model's folder, which is made if need be."""
    Path(target_dir).mkdir(parents=True, exist_ok=True)
    for name in CODE_FILES:
        shutil.copyfile(PACKAGE / name, Path(target_dir) / Path(name).name)


def check_model_code(folder: str | Path, auto_map: Any) -> None:
    """Raise InputError unless an export's code, where its config.json says it is, is this package's own to the byte."""
    if auto_map != AUTO_MAP:
        raise InputError(f"{folder}: its config.json names other code than an export has; export the checkpoint anew")
    for name in CODE_FILES:
        path = Path(folder) / Path(name).name
        if not path.is_file() or path.read_bytes() != (PACKAGE / name).read_bytes():
            raise InputError(
                f"{path}: not the code of this version, which alone is run here; export the checkpoint anew"
            )


def model_class() -> type[PreTrainedModel]:
    """The class of exported models, from the files of this package: no code of an exported folder is run."""
    package = "hydra_mcore.convert.hf_model"
    sys.modules[f"{package}.chunked_delta_rule"] = (
        chunked_delta_rule  # which stands beside the others in an exported folder only
    )
    return importlib.import_module(f"{package}.modeling_hydra_head").HydraHeadForCausalLM
