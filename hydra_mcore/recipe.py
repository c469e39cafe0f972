# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Recipe files: YAML that becomes command-line flags, for the stages of training and for the commands around them.

``python -m hydra_mcore.recipe has SECTION FILE...`` tells the job scripts, with yes or no, whether there is something
to do.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import itertools
import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hydra_mcore.config import ConfigError
from hydra_mcore.stages import STAGES

STAGE_SECTIONS = tuple(STAGES)
COMMAND_SECTIONS = ("prepare", "import", "select", "hybridize", "evaluate", "export")
MAX_BYTES = 2**18  # a recipe takes a few thousand; what is longer is another file, and YAML takes seconds to read it
# A study's axes, their values, sections in these and lists; aliases of aliases of aliases only fill the memory.
MAX_LEVELS = 7
MAX_ALIASES = 100
MAX_TEXT = 4096  # of a value: as long as a path may be
VARIABLE = re.compile(r"\$\{([^{}]*)\}")


@dataclass(frozen=True)
class Recipe:
    """A YAML file of flags: top-level keys hold for all stages, those under a stage's or a command's name for that one.

    Several files are laid over each other, a later one winning key by key: a schedule, then a layout. Then
    ``${run-dir}`` in a value becomes the value of that top-level key, ``${select.out}`` that of a key in a section.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, paths: str | Path | Sequence[str | Path], section: str) -> Recipe:
        """Read a recipe for a stage (its section over the top level) or for a command (its section alone).

        Raises:
            ConfigError: a file that is missing or no recipe, a variable that names nothing or itself.
        """
        paths = [paths] if isinstance(paths, str | Path) else paths
        name = " + ".join(map(str, paths))
        merged: dict[str, Any] = {key: {} for key in STAGE_SECTIONS + COMMAND_SECTIONS}
        for path in paths:
            for key, value in _read_recipe(Path(path)).items():
                merged[key] = merged[key] | value if key in STAGE_SECTIONS + COMMAND_SECTIONS else value
        values = without_variables(merged, name)
        top = {key: value for key, value in values.items() if key not in STAGE_SECTIONS + COMMAND_SECTIONS}
        return cls(name, values[section] if section in COMMAND_SECTIONS else {**top, **values[section]})

    def over(self, defaults: dict[str, Any]) -> Recipe:
        """A recipe of ``defaults`` with this recipe's values over them. A false here switches off a flag of the
        defaults; a null keeps the default.
        """
        own = {str(key).replace("_", "-"): value for key, value in self.values.items() if value is not None}
        return Recipe(self.name, {**defaults, **own})

    def to_flags(self, parser: argparse.ArgumentParser) -> list[str]:
        """Flatten into command-line flags that ``parser`` knows; raises ConfigError for an unknown key."""
        flags: dict[
            str, list[str]
        ] = {}  # by what they set: a flag may have two names, and what it means by default a third
        for key, value in self.values.items():
            found = self._flag(parser, str(key), value)
            flags |= {} if value is None else found
        return list(itertools.chain.from_iterable(flags.values()))

    def _flag(self, parser: argparse.ArgumentParser, key: str, value: Any) -> dict[str, list[str]]:
        known = parser._option_string_actions  # argparse offers no public list of its options
        by_flag = known.get("--" + key.replace("_", "-"))
        by_dest = [action for action in known.values() if action.dest == key.replace("-", "_")]
        actions = [by_flag] if by_flag is not None else by_dest
        if isinstance(value, dict):
            raise ConfigError(f"recipe {self.name}: {_shown(key)} is no stage, so it takes a value, not lines under it")
        if not actions:
            near = difflib.get_close_matches(key.replace("_", "-"), [name[2:] for name in known], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"recipe {self.name}: unknown key {_shown(key)}{hint}")
        if isinstance(value, bool):
            switches = [action for action in actions if action.nargs == 0]
            if not switches:
                raise ConfigError(f"recipe {self.name}: {key!r} takes a value, not {str(value).lower()}")
            name = switches[0].option_strings[0] if value else None
            if by_flag is None:
                name = next((action.option_strings[0] for action in switches if action.const == value), None)
            return {switches[0].dest: [name] if name else []}
        if value is not None and all(action.nargs == 0 for action in actions):
            raise ConfigError(f"recipe {self.name}: {key!r} takes true or false, not {_shown(value)}")
        if isinstance(value, list) and actions[0].nargs is None:
            raise ConfigError(f"recipe {self.name}: {key!r} takes one value, not a list")
        items = value if isinstance(value, list) else [] if value is None else [value]
        return {actions[0].dest: [actions[0].option_strings[0], *(self._text(key, item) for item in items)]}

    def _text(self, key: str, item: Any) -> str:
        """A value as the command line has it; raises ConfigError for what is none, or would be read as a flag of its
        own.
        """
        if isinstance(item, bool) or not isinstance(item, str | int | float | datetime.date):
            kind = "a list" if isinstance(item, list | tuple | set | dict) else "null" if item is None else _shown(item)
            raise ConfigError(f"recipe {self.name}: {key!r} takes text or a number, not {kind}")
        text = str(item)
        if text.startswith("-") and not re.fullmatch(
            r"-\d+|-\d*\.\d+", text
        ):  # what argparse takes for a negative number
            raise ConfigError(
                f"recipe {self.name}: {key!r} is {_shown(text)}, which would be read as a flag; write a path as ./-name"
            )
        if len(text) > MAX_TEXT or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
            raise ConfigError(
                f"recipe {self.name}: {key!r} is {_shown(text)}; no flag takes control characters, or text of that"
                " length"
            )
        return text


class _Loader(yaml.SafeLoader):
    """YAML as recipes use it: no key twice, no more levels or aliases than a recipe needs, ``3:1`` is text and no
    sexagesimal number.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._levels: dict[int, int] = {}  # of the nodes composed so far, what their aliases stand for included
        self._aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        line = self.peek_event().start_mark.line + 1
        self._aliases += self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        parts = list(itertools.chain.from_iterable(node.value)) if isinstance(node, yaml.MappingNode) else node.value
        levels = (
            0 if isinstance(node, yaml.ScalarNode) else 1 + max((self._levels[id(part)] for part in parts), default=0)
        )
        self._levels[id(node)] = levels
        if levels > MAX_LEVELS or self._aliases > MAX_ALIASES:
            raise ConfigError(f"line {line}: nested deeper, or with more aliases, than a recipe needs")
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(
                    f"line {key.start_mark.line + 1}: expected 'key: value' lines, with plain words as keys"
                )
            name, line = key.value.replace("_", "-"), key.start_mark.line + 1
            if name in lines:
                raise ConfigError(
                    f"{_shown(name)} stands there twice, on line {lines[name]} and on line {line}; keep one"
                )
            lines[name] = line
        return node

    def construct_number(self, node: yaml.ScalarNode) -> int | float | str:
        if ":" in node.value:
            return node.value
        return self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The keys of a file of settings, written with dashes; raises ConfigError, which calls it ``what``, for a broken
    one.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"longer than {MAX_BYTES} bytes, so no {what}")
        raw = with_dashes(yaml.load(content.decode("utf-8"), _Loader) or {})
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"{what} {path}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = content.decode("utf-8", "replace").splitlines()[mark.line : mark.line + 1]
        hint = "; put quotes around a value with ${...} that stands in [...] or {...}" if "${" in "".join(line) else ""
        raise ConfigError(f"{what} {path}: not YAML (line {mark.line + 1}: {error.problem}){hint}") from None
    except RecursionError:
        raise ConfigError(f"{what} {path}: nested deeper than a {what} needs") from None
    except (yaml.YAMLError, ValueError) as error:  # also a date that is none, a number of thousands of digits
        raise ConfigError(f"{what} {path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{what} {path}: expected 'key: value' lines")
    return raw


def _read_recipe(path: Path) -> dict[str, Any]:
    """A recipe file's keys, its sections as dicts; raises ConfigError for a broken file."""
    raw = read_yaml(path, "recipe")
    for name in STAGE_SECTIONS + COMMAND_SECTIONS:
        section = raw.get(name)
        if not isinstance({} if section is None else section, dict):
            what = "a stage" if name in STAGE_SECTIONS else "a command"
            raise ConfigError(f"recipe {path}: {name!r} is {what}, expected 'key: value' lines under it")
        raw[name] = with_dashes(section or {})
    return raw


def without_variables(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A whole recipe, its ``${key}`` and ``${section.key}`` replaced by the values that they name.

    Args:
        values: of all files, later ones laid over earlier ones; its sections as dicts.
        name: of the recipe, for messages.

    Raises:
        ConfigError: a variable that names no key, one that depends on itself, or a list within a text.
    """
    variables = _Variables(values, name)
    return {
        key: {inner: variables.replace(v, (f"{key}.{inner}",)) for inner, v in value.items()}
        if isinstance(value, dict)
        else variables.replace(value, (key,))
        for key, value in values.items()
    }


class _Variables:
    """The values of a recipe by the names that variables have for them."""

    def __init__(self, values: dict[str, Any], name: str) -> None:
        self.recipe, self.found = name, {}
        self.by_name = {key: value for key, value in values.items() if not isinstance(value, dict)}
        for section in STAGE_SECTIONS + COMMAND_SECTIONS:
            inner = with_dashes(values.get(section) or {})
            self.by_name |= {f"{section}.{key}": value for key, value in inner.items()}

    def replace(self, value: Any, within: tuple[str, ...]) -> Any:
        """A value without variables; one that is a variable and nothing else becomes what it names, also a list.

        Args:
            within: the names whose values lead here, the outermost first.
        """
        if isinstance(value, list):  # of a list in a list no flag is made
            return [item if isinstance(item, list) else self.replace(item, within) for item in value]
        if not isinstance(value, str) or "${" not in value:
            return value
        if whole := VARIABLE.fullmatch(value):
            return self._look_up(whole[1], within)
        if "${" in VARIABLE.sub("", value):
            raise self._error(f"{_shown(value)} has a ${{ without its }}")
        text = VARIABLE.sub(lambda match: self._text(match, within), value[: MAX_TEXT + 1])
        if len(text) > MAX_TEXT:
            raise self._error(f"{within[-1]!r} is longer than {MAX_TEXT} letters with its variables replaced")
        return text

    def _look_up(self, written: str, within: tuple[str, ...]) -> Any:
        name = written.replace("_", "-")
        if name in within:
            raise self._error(f"variables go in a circle: {' -> '.join((*within[within.index(name) :], name))}")
        if name not in self.by_name:
            near = difflib.get_close_matches(name, self.by_name, n=1)
            hint = f"did you mean ${{{near[0]}}}?" if near else "it takes a top-level key, or SECTION.KEY"
            shown = _shown(f"${{{written}}}")
            raise self._error(f"{within[-1]!r} has the variable {shown}, which names no key; {hint}")
        if name not in self.found:
            if len(within) > MAX_ALIASES:
                raise self._error(f"variables name each other more often than a recipe needs, from {within[0]!r} on")
            self.found[name] = self.replace(self.by_name[name], (*within, name))
        return self.found[name]

    def _text(self, match: re.Match[str], within: tuple[str, ...]) -> str:
        part = self._look_up(match[1], within)
        if isinstance(part, bool) or not isinstance(part, str | int | float | datetime.date):
            kind = "null" if part is None else _shown(part)
            raise self._error(f"{within[-1]!r}: {match[0]} is {kind}; within a text it must be text or a number")
        return str(part)

    def _error(self, text: str) -> ConfigError:
        return ConfigError(f"recipe {self.recipe}: {text}")


def with_dashes(raw: Any) -> Any:
    """The keys of a mapping as flags are written, so that one flag has one name whatever file it stands in."""
    return {str(key).replace("_", "-"): value for key, value in raw.items()} if isinstance(raw, dict) else raw


def _shown(value: Any) -> str:
    """A value in a message: short, also where aliases make it endless."""
    text = repr(value) if isinstance(value, str | int | float | datetime.date) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def with_recipe(argv: list[str], command: str, parser: argparse.ArgumentParser) -> list[str]:
    """A command line with the flags of its ``--config`` files put before it, so that its own flags win.

    Raises:
        ConfigError: a broken recipe, or one without a section for this command, or with a key that it does not know.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="+")
    chosen, rest = first.parse_known_args(argv)
    if not chosen.config:
        return argv
    recipe = Recipe.load(chosen.config, command)
    if not recipe.values:
        raise ConfigError(
            f"recipe {' '.join(chosen.config)}: no section {command!r}; write one, or give the flags themselves"
        )
    return recipe.to_flags(parser) + rest


def parse_with_recipe(
    parser: argparse.ArgumentParser, command: str, argv: list[str] | None = None
) -> argparse.Namespace:
    """Parse a command's flags, its recipe's under its own; a recipe that cannot be used is one line and exit
    status 2.
    """
    try:
        return parser.parse_args(with_recipe(sys.argv[1:] if argv is None else argv, command, parser))
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def main(argv: list[str] | None = None) -> None:
    """Answer the job scripts with yes, no or broken; a broken recipe is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m hydra_mcore.recipe",
        description="whether a recipe has a section for a command",
        epilog="example:\n  python -m hydra_mcore.recipe has prepare examples/qwen3-1.7b/recipe.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ask", choices=["has"])
    parser.add_argument("section", choices=COMMAND_SECTIONS)
    parser.add_argument("config", nargs="+", metavar="FILE")
    args = parser.parse_args(argv)
    try:
        print("yes" if Recipe.load(args.config, args.section).values else "no")
    except ConfigError as error:
        print("broken")
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
