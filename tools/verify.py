#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Check that a checkpoint is what it claims to be. Each check prints its numbers and a verdict.

source     the teacher computes what transformers computes from its source, so the import lost nothing
all-fa     a student with FA heads alone equals its teacher, so inheritance moves every row and column to its place
layouts    tensor, pipeline and context parallel ranks compute what one process computes, packed rows included
export     the Hugging Face export computes what the checkpoint computes, so what is published was trained
packed     documents packed into a row do not see each other: each gets what the export computes for it alone
padding    a row padded left or right gets what it gets alone, so batched evaluation can be trusted
decode     the export computes the same token by token, in chunks and all at once, so its cache remembers everything
served     a vLLM server writes the export's tokens with the same likelihood, so what is served was published
identity   weights, head map, teacher and export are those that the card names, and every number is finite
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra_mcore.commands import check_inputs, one_line_errors
from hydra_mcore.corpus.hub import model_folder

EXAMPLES = """\
A check passes if KL(reference || found) is below 1e-6 nats a token and every token has the same likeliest successor. (A
tie that float32 cannot tell apart passes too.) All models run in float32, one after the other, on the GPU if there is
one. The exit status is 0 if nothing failed, 1 if something failed, and 2 for arguments that cannot be used.

examples:
  a teacher and where it came from
      python tools/verify.py runs/a/teacher --hf Qwen/Qwen3-1.7B
  a trained student, its teacher and its export, on text
      python tools/verify.py runs/a/extend --hf Qwen/Qwen3-1.7B --teacher runs/a/teacher --export runs/a/hf \\
          --text held_out.txt
  a served export
      python tools/verify.py runs/a/extend --export runs/a/hf --served http://127.0.0.1:8000/v1 --only served
  parallel layouts alone, for machines
      python tools/verify.py runs/a/extend --only layouts --json layouts.json
"""


def parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="verify", description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    p.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="folder of a teacher's or a student's checkpoint, of any stage",
    )
    source = "Hugging Face directory, or name on the hub, from which the teacher was imported"
    p.add_argument("--hf", metavar="NAME", help=source)
    p.add_argument("--teacher", type=Path, metavar="DIR", help="checkpoint of a student's teacher")
    p.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="Hugging Face export. Its code is run if it is ours to the byte (default: one is made and removed)",
    )
    p.add_argument(
        "--served", metavar="URL", help="server of the export, such as http://127.0.0.1:8000/v1 (docs/serving.md)"
    )
    p.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text to run on, with the checkpoint's tokenizer (default: random tokens)",
    )
    p.add_argument(
        "--length", type=int, metavar="N", help="tokens of a sequence (default: the native length, at most 512)"
    )
    p.add_argument("--sequences", type=int, default=2, metavar="N", help="number of sequences (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="seed of random tokens (default %(default)s)")
    p.add_argument("--only", nargs="+", metavar="CHECK", help="run these checks alone, by the names above")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write all results to this file")
    return p


@one_line_errors("verify")
def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    check_inputs(checkpoint=args.checkpoint, teacher=args.teacher, export=args.export, text=args.text)
    args.hf = args.hf and model_folder(args.hf)
    with tempfile.TemporaryDirectory(prefix="verify_") as work:
        # transformers copies the code of an export before it runs it: not into the home folder, and not to stay
        os.environ.setdefault("HF_MODULES_CACHE", str(Path(work) / "modules"))
        warnings.filterwarnings("ignore", module=r"(megatron|torch\.distributed)\.")
        from tools.commands.verify import run  # takes seconds: not for --help

        failed = run(args, Path(work))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
