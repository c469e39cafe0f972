# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face hub: whether a name can be one of it, whether it answers, and the folder of a model that it has.

A library alone would try for minutes. ``huggingface_hub`` is imported where it is used: the workers that tokenize
import this module, too, and stay small.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from hydra_mcore.errors import InputError, first_line

ANSWER = 10  # seconds that the hub has to answer at all
SILENCE = 60  # seconds without a byte, after which a request that it began to answer has failed
WEIGHTS = "*.safetensors"
MODEL_FILES = (WEIGHTS, "*.json", "*.jinja", "tokenizer.model", "merges.txt", "README.md")  # no code


def check_name(what: str, name: str) -> None:
    """Raise InputError at once for a folder that is missing: a name that the hub cannot have."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if os.path.isfile(name):
        raise InputError(f"{what} {name}: is a file; give its folder, or a name on the hub")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise InputError(f"{what} {name}: no such folder, and no name on the hub (OWNER/NAME)") from None


def unreachable() -> str:
    """Why the hub cannot be asked, known within ``ANSWER`` seconds; empty where it can."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return "the hub is not asked (HF_HUB_OFFLINE is set)"
    answers: list[str] = []

    def ask() -> None:
        try:
            session = get_session()
            session.timeout = SILENCE  # it has none by itself
            session.head(constants.ENDPOINT, timeout=ANSWER)
            answers.append("")
        except Exception as error:  # of whichever library huggingface_hub takes, now or in its next version
            answers.append(first_line(error))

    asking = threading.Thread(target=ask, daemon=True)  # nothing bounds the time that looking a name up may take
    asking.start()
    asking.join(ANSWER)
    problem = answers[0] if answers else f"no answer in {ANSWER} seconds"
    return problem and f"the hub does not answer ({constants.ENDPOINT}: {problem})"


def model_folder(name: str | Path) -> Path:
    """The folder of a Hugging Face model: ``name`` itself, or the cache's copy of a model of the hub.

    The hub's newest commit is downloaded. Where the hub cannot be reached, the copy that is in the cache serves.

    Raises:
        InputError: no such folder and no such model, or a hub that cannot be reached and no copy in the cache.
    """
    if os.path.isdir(name):
        return Path(name)
    check_name("model", str(name))
    problem = unreachable()
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(str(name), allow_patterns=MODEL_FILES, local_files_only=bool(problem)))
    except Exception as error:  # of huggingface_hub, or of whichever library it takes
        if not problem:
            reason = first_line(error)
            raise InputError(f"model {name}: cannot be downloaded ({reason}); give a local directory") from None
        folder = None
    if problem and not (folder and any(folder.glob(WEIGHTS))):  # the cache may hold its tokenizer alone
        raise InputError(f"model {name}: neither a folder nor in the cache, and {problem}; give a local directory")
    return folder
