# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a Hugging Face directory says of where its model comes from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from hydra_mcore.files import is_name

_CACHED = re.compile(r"models--(.+?)--(.+)")  # the folder of a model in the hub's cache


def origin(hf_dir: str | Path) -> dict[str, str]:
    """The name, the revision and the license of a model, as its folder tells them; empty where it does not.

    In the hub's cache, where folders are ``models--OWNER--NAME/snapshots/COMMIT``, the name is that on the hub and the
    revision the commit. Elsewhere the name is the folder's own. The license stands in the front matter of README.md.
    """
    folder = Path(hf_dir).resolve()
    cached = _CACHED.fullmatch(folder.parents[1].name) if len(folder.parents) > 1 else None
    name = "/".join(cached.groups()) if cached else folder.name
    revision = folder.name if cached else ""
    found = {"name": name, "revision": revision, "license": _front_matter(folder / "README.md").get("license")}
    return {key: value if isinstance(value, str) and is_name(value) else "" for key, value in found.items()}


def _front_matter(path: Path) -> dict[str, Any]:
    """What stands between the first two lines of three hyphens; empty where nothing can be read there."""
    try:
        _, front, _ = path.read_text(encoding="utf-8").split("---\n", 2)
        found = yaml.safe_load(front)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
