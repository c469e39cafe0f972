# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer's chat template puts around a question: the same text every day, whatever it says of the date."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, tzinfo

from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import chat_template_utils

from hydra_mcore.errors import InputError, first_line

_MARK = "hydra-mcore-question"  # stands for the question while a chat template is rendered
_OTHER_DAYS = (date(2001, 1, 1), date(2019, 11, 23))  # that have nothing in common
_RENDERINGS = 8  # that must be equal: a template may choose at random


def chat_around(tokenizer: Tokenizer, today: Callable[[], date]) -> tuple[str, str]:
    """What stands before a user's words, and between them and the answer, without thinking.

    Args:
        today: the day that templates take for the current one, at midnight; called where the text depends on it.

    Raises:
        InputError: no chat template, or one that fails, shows the user's words not once, or is not the same text each
            time.
    """
    if not tokenizer.chat_template:
        raise InputError("wording chat: the tokenizer has no chat template; use --template ruler")
    one, other = (_rendered(tokenizer, day) for day in _OTHER_DAYS)
    before, *after = (one if one == other else _rendered(tokenizer, today())).split(_MARK)
    if len(after) != 1:
        raise InputError("wording chat: the chat template does not show the user's words once; use --template ruler")
    return before, after[0]


def _rendered(tokenizer: Tokenizer, day: date) -> str:
    """The chat template around the mark on some day."""
    messages = [{"role": "user", "content": _MARK}]
    try:
        with _today_is(day):
            texts = {
                tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
                )
                for _ in range(_RENDERINGS)
            }
    except Exception as error:  # a template is code of its own
        raise InputError(f"wording chat: the chat template fails ({first_line(error)}); use --template ruler") from None
    if len(texts) > 1:
        raise InputError("wording chat: the chat template is another text each time; use --template ruler")
    return texts.pop()


@contextlib.contextmanager
def _today_is(day: date) -> Iterator[None]:
    """Let ``strftime_now`` in templates say midnight of a day: transformers has no argument for it."""

    class Midnight(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.combine(day, time(), tz)

    stock, chat_template_utils.datetime = chat_template_utils.datetime, Midnight
    try:
        yield
    finally:
        chat_template_utils.datetime = stock
