# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Write real text that every machine with Python has: one part to train on, another to evaluate with.

The training text has the descriptions of the installed packages (under their own licences) and the sources of Python's
library (PSF-2.0). The held-out text is Python's language reference, which comes with Python for its help() (PSF-2.0).
No text is in both parts.

examples:
  python -m examples.smollm2_135m.text --out runs/smollm2/text
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from hydra_mcore.commands import one_line_errors
from hydra_mcore.files import write_text

OWN = "hydra_mcore"
SHORTEST = 2_000  # characters of a text; shorter ones are mostly names and links
LONGEST = 40_000  # of a text to train on; what is beyond is left out, so that no table of codes weighs too much
HELD_OUT = 60_000  # characters: 15,000 tokens, and a minute of two cores for each model and length
CALIBRATION = 400_000  # characters: 16,384 tokens and some


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="text", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for train.jsonl, train.txt and held_out.txt"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of texts (default 0)")
    return parser.parse_args(argv)


@one_line_errors("text")
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    train = [*descriptions(), *sources()]
    random.Random(args.seed).shuffle(train)
    write_text(args.out / "train.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in train))
    write_text(args.out / "train.txt", "\n\n".join(train)[:CALIBRATION])
    held_out = [topics[name] for name in sorted(topics)]
    random.Random(args.seed).shuffle(held_out)
    write_text(args.out / "held_out.txt", "\n\n".join(held_out)[:HELD_OUT])
    size = sum(map(len, train))
    print(f"{args.out}: {len(train)} texts to train on, {size / 1e6:.1f}M characters; {HELD_OUT:,} characters held out")


def descriptions() -> Iterator[str]:
    """What each installed package says of itself, each once; not this one, whose page changes with every commit."""
    seen = set()
    for package in sorted(importlib.metadata.distributions(), key=lambda package: package.name):
        text = str(package.metadata.get_payload())
        if package.name != OWN and len(text) >= SHORTEST and text not in seen:
            seen.add(text)
            yield text[:LONGEST]


def sources() -> Iterator[str]:
    """Python's own library without its tests."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if {"test", "tests", "site-packages", "idlelib", "pydoc_data", "encodings"} & set(path.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= SHORTEST:
            yield text[:LONGEST]


if __name__ == "__main__":
    main()
