# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Recipe files: YAML that becomes command-line flags, for the stages of training and for the commands around them."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hydra_mcore.config import ConfigError

STAGE_SECTIONS = ("align", "distill", "extend")
COMMAND_SECTIONS = ("prepare", "import", "select", "hybridize", "evaluate", "export")


@dataclass(frozen=True)
class Recipe:
    """A YAML file of flags: top-level keys hold for all stages, those under a stage's or a command's name for that one.

    Several files are laid over each other, a later one winning key by key: a schedule, then a layout.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, paths: str | Path | Sequence[str | Path], section: str) -> Recipe:
        """Read a recipe for a stage (its section over the top level) or for a command (its section alone).

        Raises:
            ConfigError: a file that is missing or no recipe.
        """
        paths = [paths] if isinstance(paths, str | Path) else paths
        top: dict[str, Any] = {}
        sections: dict[str, Any] = {}
        for path in paths:
            for key, value in _read_recipe(Path(path)).items():
                if key not in STAGE_SECTIONS + COMMAND_SECTIONS:
                    top[key] = value
                elif key == section:
                    sections |= value
        return cls(" + ".join(map(str, paths)), sections if section in COMMAND_SECTIONS else {**top, **sections})

    def over(self, defaults: dict[str, Any]) -> Recipe:
        """This recipe laid over ``defaults``, so that its false switches off what they switch on."""
        own = {str(key).replace("_", "-") for key in self.values}
        kept = {key: value for key, value in defaults.items() if key.replace("_", "-") not in own}
        return Recipe(self.name, {**kept, **self.values})

    def to_flags(self, parser: argparse.ArgumentParser) -> list[str]:
        """Flatten into command-line flags that ``parser`` knows; raises ConfigError for an unknown key."""
        flags: list[str] = []
        for key, value in self.values.items():
            flags += self._flag(parser, str(key), value)
        return flags

    def _flag(self, parser: argparse.ArgumentParser, key: str, value: Any) -> list[str]:
        known = parser._option_string_actions  # argparse offers no public list of its options
        by_flag = known.get("--" + key.replace("_", "-"))
        by_dest = [action for action in known.values() if action.dest == key.replace("-", "_")]
        actions = [by_flag] if by_flag is not None else by_dest
        if isinstance(value, dict):
            raise ConfigError(f"recipe {self.name}: {key!r} is no stage, so it takes a value, not lines under it")
        if not actions:
            near = difflib.get_close_matches(key.replace("_", "-"), [name[2:] for name in known], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"recipe {self.name}: unknown key {key!r}{hint}")
        if isinstance(value, bool):
            switches = [action for action in actions if action.nargs == 0]
            if not switches:
                raise ConfigError(f"recipe {self.name}: {key!r} takes a value, not {str(value).lower()}")
            if by_flag is not None:
                return [switches[0].option_strings[0]] if value else []
            return next(([action.option_strings[0]] for action in switches if action.const == value), [])
        if value is None:
            return []
        if all(action.nargs == 0 for action in actions):
            raise ConfigError(f"recipe {self.name}: {key!r} takes true or false, not {value!r}")
        items = value if isinstance(value, list) else [value]
        return [actions[0].option_strings[0], *(str(item) for item in items)]


def _read_recipe(path: Path) -> dict[str, Any]:
    """A recipe file's keys, its sections as dicts; raises ConfigError for a broken file."""
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise ConfigError(f"recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"recipe {path}: expected 'key: value' lines")
    for name in STAGE_SECTIONS + COMMAND_SECTIONS:
        if not isinstance(raw.setdefault(name, {}) or {}, dict):
            what = "a stage" if name in STAGE_SECTIONS else "a command"
            raise ConfigError(f"recipe {path}: {name!r} is {what}, expected 'key: value' lines under it")
        raw[name] = raw[name] or {}
    return raw


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
        raise ConfigError(f"recipe {' '.join(chosen.config)}: no section {command!r}; write one, or give the flags themselves")
    return recipe.to_flags(parser) + rest


def parse_with_recipe(parser: argparse.ArgumentParser, command: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse a command's flags, its recipe's under its own; a recipe that cannot be used is one line and exit status 2."""
    try:
        return parser.parse_args(with_recipe(sys.argv[1:] if argv is None else argv, command, parser))
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
