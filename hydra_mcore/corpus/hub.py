# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face hub: whether a name can be one of it, and whether it answers, before a library tries for minutes.

``huggingface_hub`` is imported where it is asked: the workers that tokenize import this module, too, and stay small.
"""

from __future__ import annotations

import os
import threading

from hydra_mcore.errors import InputError, first_line

ANSWER = 10  # seconds that the hub has to answer at all
SILENCE = 60  # seconds without a byte, after which a request that it began to answer has failed


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
