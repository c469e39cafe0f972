# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What prompts say: RULER's templates, those of a model's chat, those of a JSON file, and a model's own needles."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase as Tokenizer

from hydra_mcore.errors import InputError
from hydra_mcore.files import from_fields, is_name, read_json
from hydra_mcore.ruler.chat import chat_around
from hydra_mcore.ruler.needle_format import NeedleFormat


def fill(template: str, **words: str) -> str:
    """The template with each {name} replaced; other braces stay."""
    for name, word in words.items():
        template = template.replace(f"{{{name}}}", word)
    return template


@dataclass(frozen=True)
class Ask:
    """How one kind of question is put."""

    intro: str
    """Stands before the haystack."""
    question: str
    """Stands behind it."""
    prefix: str
    """How the answer begins. White space at its end is the answer's own, as tokenizers see it."""

    def filled(self, **words: str) -> Ask:
        """The question with its placeholders replaced."""
        return Ask(*(fill(text, **words) for text in (self.intro, self.question, self.prefix)))

    def solved(self, answer: str) -> str:
        """How an example shows its answer."""
        return f"{self.prefix.rstrip()} {answer}"


@dataclass(frozen=True)
class Wording:
    """All templates of a set of prompts.

    {kind} and {kinds} are "number(s)" or "uuid(s)", {query} the keys or the value asked for, {count} how many answers
    there are.

    Raises:
        ValueError: a template lacks a placeholder.
    """

    name: str
    needle: str
    """Holds {key} and {value}."""
    one: Ask
    """Needles with one answer; its last words are such that a model that knows the answer says it at once."""
    many: Ask
    """Needles with several."""
    vt: Ask
    cwe: Ask
    fwe: Ask
    noise: str
    """A line of the haystacks that are not text."""
    line_gap: str = "\n"
    """Stands before every line of noise or needles."""
    text_gap: str = " "
    """Stands before a needle in text."""
    chat: tuple[str, str] = ("", "")
    """What a chat template puts before the question and between question and answer."""
    own: NeedleFormat | None = None
    """Where keys and values are drawn from, if not as RULER draws them."""

    def __post_init__(self) -> None:
        for name, template, words in (
            ("needle", self.needle, ("{key}", "{value}")),
            *(
                (name, ask.question + ask.prefix, ("{query}",))
                for name, ask in (("one", self.one), ("many", self.many), ("vt", self.vt))
            ),
        ):
            if missing := [word for word in words if word not in template]:
                raise ValueError(f"{name} must hold {' and '.join(missing)}")
        if not self.noise.strip():
            raise ValueError("noise must hold some text")
        if not is_name(self.name):
            raise ValueError("name must be one short line")

    @cached_property
    def digest(self) -> str:
        """sha256 over every template: equal digests, equal words."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


# The templates of RULER's scripts/data/synthetic/constants.py, singular where there is one answer, as its niah.py does.
# There an answer's prefix for one answer ends in "is", and a model may say ": 1234567" or " 1234567"; with the colon
# the second is the one right answer, and teacher forcing scores it as decoding would.
RULER = Wording(
    name="ruler",
    needle="One of the special magic {kinds} for {key} is: {value}.",
    one=Ask(
        "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {kind} afterwards.",
        "\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
        " The special magic {kind} for {query} mentioned in the provided text is: ",
    ),
    many=Ask(
        "Some special magic {kinds} are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {kinds} afterwards.",
        "\nWhat are all the special magic {kinds} for {query} mentioned in the provided text?",
        " The special magic {kinds} for {query} mentioned in the provided text are",
    ),
    vt=Ask(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n",
        "\nQuestion: Find all variables that are assigned the value {query} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, "
        "{count} variables are assigned the value {query}, they are: ",
    ),
    cwe=Ask(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that"
        " appear most often.",
        "\nQuestion: What are the {count} most common words in the above list?",
        " Answer: The top {count} words that appear most often in the list are:",
    ),
    fwe=Ask(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently"
        " appeared coded words.",
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
    ),
    noise="The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
)


def load_wording(
    name_or_path: str | None, tokenizer: Tokenizer, model_dir: Path, today: Callable[[], date] = date.today
) -> Wording:
    """The wording that a user names.

    Args:
        name_or_path: "ruler"; "chat", RULER's within the tokenizer's chat template, without thinking; a file, see
            ``read_wording``; None for ``own_wording``.
        model_dir: a checkpoint, or the folder of its tokenizer.
        today: the day that chat templates take for today, asked where one names it.

    Raises:
        InputError: no chat template that can be used; a file that is missing or no wording.
    """
    if name_or_path == "ruler":
        return RULER
    if name_or_path == "chat":
        return dataclasses.replace(RULER, name="chat", chat=chat_around(tokenizer, today))
    if name_or_path is None:
        return own_wording(model_dir)
    if not Path(name_or_path).is_file():
        raise InputError(f"wording {name_or_path}: No such file or directory; the built-in ones are ruler and chat")
    return read_wording(Path(name_or_path))


def own_wording(model_dir: Path) -> Wording:
    """A model's own: that of its ``needles.json``, else RULER's.

    Args:
        model_dir: a checkpoint, or the folder of its tokenizer.

    Raises:
        InputError: the file is no needle format.
    """
    for folder in (Path(model_dir) / "tokenizer", Path(model_dir)):
        if (folder / "needles.json").is_file():
            return format_wording(NeedleFormat.load(folder / "needles.json"))
    return RULER


def read_wording(path: Path) -> Wording:
    """The wording of a JSON file with fields of ``Wording`` (RULER's where it has none), or with a needle format.

    Raises:
        InputError: the file is missing or neither.
    """
    fields = read_json(path, what="wording")
    if not isinstance(fields, dict):
        raise InputError(f"wording {path}: not a wording, which is a list of keys and values")
    if "value_pieces" in fields:
        return dataclasses.replace(format_wording(NeedleFormat.load(path)), name=path.stem)
    ruler = dataclasses.asdict(RULER)
    asks = {name: ruler[name] | fields[name] for name in _ASKS if isinstance(fields.get(name), dict)}
    return from_fields(Wording, {**ruler, "name": path.stem, **fields, **asks}, f"wording {path}")


def format_wording(fmt: NeedleFormat) -> Wording:
    """The needle tasks in a model's own words, which bring their own white space; the other tasks stay RULER's."""
    ask = Ask(fmt.intro, "", fmt.query.replace("{key}", "{query}"))
    return dataclasses.replace(
        RULER, name="needles", needle=fmt.needle, one=ask, many=ask, noise=fmt.noise, line_gap="", text_gap="", own=fmt
    )


_ASKS = ("one", "many", "vt", "cwe", "fwe")
