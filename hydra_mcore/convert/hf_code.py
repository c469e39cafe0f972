# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The Python files that an exported model needs beside its weights, so that transformers can load it without
hydra_mcore.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hydra_mcore.errors import InputError
from hydra_mcore.kinds import EXPORTED_TABLE, KINDS

PACKAGE = Path(__file__).parents[1]
CODE_FILES = (
    "ops/chunks.py",
    "ops/decays.py",
    "ops/chunked_delta_rule.py",
    "ops/chunked_linear_attention.py",
    "convert/hf_model/configuration_hydra_head.py",
    "convert/hf_model/cache_hydra_head.py",
    "convert/hf_model/heads_hydra_head.py",
    *(kind.exported for kind in KINDS.values()),
    EXPORTED_TABLE,
    "convert/hf_model/modeling_hydra_head.py",
)
# What exports had before: the files, and what they hashed to, one after the other.
_COMMON = ("configuration_hydra_head.py", "cache_hydra_head.py", "heads_hydra_head.py")
_ONE_FILE = (*_COMMON, "modeling_hydra_head.py", "chunked_delta_rule.py")  # for all kinds of heads
_TWO_KINDS = (
    *("chunked_delta_rule.py", *_COMMON, "fa_heads_hydra_head.py", "gdn_heads_hydra_head.py"),
    *("kinds_hydra_head.py", "modeling_hydra_head.py"),
)
_OF_TODAY = tuple(Path(name).name for name in CODE_FILES)
FORMER_CODE = (
    (_ONE_FILE, "ffd99223cf4bc3235f0cc4803feddbe98f325cd876bb25281d90a815f9c4ccec"),  # commit b3fdb5e
    (_ONE_FILE, "3ca2a17a9dbff89af0b0a6f070760f549a536b444c4eb3823990e81921cd5a9c"),  # 4fc5003
    (_TWO_KINDS, "55c2e47ea00cf4fe25ad81b17dba65233ca70ddfb338091be8e87e1c5041b620"),  # 6436168
    (_OF_TODAY, "5c97bb9cf9e4f7539d5598605b3b5f561d57627f09e980ebaac464858098cd49"),  # 14f2f7b
    (_OF_TODAY, "78cf6674c249480cba3fb45981caa7f231a3d36ea0dc803f715251d90fdea6eb"),  # 131cb72
    (_OF_TODAY, "617942494ea0f1af85f32373203019be436603495e5acbb0557c3bc7d2a09804"),  # 9b80d02
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
    """Raise InputError unless an export's code, where its config.json says it is, is this package's own to the byte, of
    this version or of a former one.
    """
    if auto_map != AUTO_MAP:
        raise InputError(f"{folder}: its config.json names other code than an export has; export the checkpoint anew")
    if any(_hash(Path(folder), names) == known for names, known in FORMER_CODE):
        return
    for name in CODE_FILES:
        path = Path(folder) / Path(name).name
        if not path.is_file() or path.read_bytes() != (PACKAGE / name).read_bytes():
            raise InputError(
                f"{path}: not the code of this package, which alone is run here; export the checkpoint anew"
            )


def _hash(folder: Path, names: Sequence[str]) -> str:
    """The sha256 over the bytes of those named files that exist in the folder."""
    found = [folder / name for name in names if (folder / name).is_file()]
    return hashlib.sha256(b"".join(path.read_bytes() for path in found)).hexdigest()


def model_class() -> type[PreTrainedModel]:
    """The class of exported models, from the files of this package: no code of an exported folder is run."""
    package = f"{__package__}.hf_model"
    for name in CODE_FILES:  # files of other folders stand beside the others in an exported folder only
        path, module_name = PACKAGE / name, f"{package}.{Path(name).stem}"
        if path.parent.name != "hf_model" and module_name not in sys.modules:
            spec = importlib.util.spec_from_file_location(module_name, path)
            sys.modules[module_name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module_name])
    return importlib.import_module(f"{package}.modeling_hydra_head").HydraHeadForCausalLM
