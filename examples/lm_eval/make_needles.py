# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Write the documents of this folder's tasks: needle prompts for the tiny teacher, as lm-eval reads them.

The haystack is noise, not text, so that every machine makes the same documents.

example:
  python -m examples.lm_eval.make_needles        writes examples/lm_eval/needles.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hydra_mcore.commands import one_line_errors
from hydra_mcore.files import write_text


@one_line_errors("make_needles")
def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from examples.lm_eval.needle_documents import needle_documents  # takes seconds: not for --help

    lines = (json.dumps(document) + "\n" for document in needle_documents())
    write_text(Path(__file__).with_name("needles.jsonl"), "".join(lines))


if __name__ == "__main__":
    main()
