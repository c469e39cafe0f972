#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Proof that a checkpoint is what it claims to be: every check with its numbers and a verdict.

source     the teacher computes what transformers' own model of its source computes: nothing was lost at the import
all-fa     a student all of whose heads are FA is its teacher: inheritance moves every row and column to its place
layouts    tensor, pipeline and context parallel ranks compute what one process computes, packed rows included
export     the Hugging Face export computes what the checkpoint computes: what is published is what was trained
packed     documents packed into a row do not see each other: each is what the export makes of it alone
padding    in a padded batch, left or right, every row is what it is alone: batched evaluation can be trusted
decode     the export's cache remembers all there is: token by token and in chunks as all at once
identity   weights, head map, teacher and export are those that the card names, and every number is finite
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from hydra_mcore.config import ModelCard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra_mcore.commands import one_line_errors  # light, so that --help is quick

EXAMPLES = """\
A check passes where KL(reference || found) is below 1e-6 nats a token and every token's likeliest successor is the same
(or a tie that float32 cannot tell apart). All models run in float32, on the GPU if there is one, one after the other.
The exit status is 0 if nothing failed, 1 if something did, 2 for arguments that cannot be used.

examples:
  a teacher and where it came from
      python tools/verify.py runs/a/teacher --hf Qwen3-1.7B
  a trained student, its teacher and its export, on text
      python tools/verify.py runs/a/extend --hf Qwen3-1.7B --teacher runs/a/teacher --export runs/a/hf \\
          --text held_out.txt
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
    p.add_argument("--hf", type=Path, metavar="DIR", help="Hugging Face directory that the teacher was imported from")
    p.add_argument("--teacher", type=Path, metavar="DIR", help="checkpoint of a student's teacher")
    p.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="Hugging Face export; its code is run if it is ours to the byte (default: one is made and removed)",
    )
    p.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text to run on, by the checkpoint's tokenizer (default: random tokens)",
    )
    p.add_argument(
        "--length", type=int, metavar="N", help="tokens a sequence (default: the native length, at most 512)"
    )
    p.add_argument("--sequences", type=int, default=2, metavar="N", help="sequences (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of random tokens (default %(default)s)")
    p.add_argument("--only", nargs="+", metavar="CHECK", help="run these checks alone, named as above")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all results there too")
    return p


@one_line_errors("verify")
def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="verify_") as work:
        # transformers copies the code of an export before it runs it: not into the home folder, and not to stay
        os.environ.setdefault("HF_MODULES_CACHE", str(Path(work) / "modules"))
        warnings.filterwarnings("ignore", module=r"(megatron|torch\.distributed)\.")
        from hydra_mcore.compat import install

        install()
        from hydra_mcore.model.runtime import process_groups

        with process_groups():
            failed = run(args, Path(work))
    sys.exit(1 if failed else 0)


def run(args: argparse.Namespace, work: Path) -> int:
    """Check the arguments, then run the checks and say what each found; returns how many failed."""
    import torch
    import transformers
    from tqdm import tqdm

    from hydra_mcore.config import ModelCard
    from hydra_mcore.errors import InputError
    from hydra_mcore.evaluation.comparison import KL_BAR, TIE
    from hydra_mcore.evaluation.subject import Subject
    from hydra_mcore.evaluation.verification import NAMES, checks_of, verify
    from hydra_mcore.files import write_json

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if unknown := sorted(set(args.only or ()) - set(NAMES)):
        raise InputError(f"--only {unknown[0]}: no such check; choose from {', '.join(NAMES)}")
    if args.json:
        try:
            args.json.touch()  # minutes before there is anything to write
        except OSError as error:
            raise InputError(f"--json {args.json}: {error.strerror}") from None
    card = ModelCard.load(args.checkpoint)
    subject = Subject(args.checkpoint, tokens(args, card), work, args.hf, args.teacher, args.export)
    num_heads, (rows, length) = card.shape.num_layers * card.shape.num_heads, subject.rows.tokens_bs.shape
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    read = f"{rows} x {length} tokens, {args.text or f'random (seed {args.seed})'}"
    print(f"{args.checkpoint}: {card.stage}, {card.head_map.num_fa} FA heads of {num_heads}; {read}; float32, {device}")
    checks, results, console = checks_of(card, args.only or NAMES), [], sys.stdout
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints; what it says is not about the checks
        for result in tqdm(
            verify(subject, checks), desc="verify", total=len(checks), unit="check", leave=False, disable=None
        ):
            tqdm.write(str(result), file=console)
            console.flush()  # a check can take minutes
            results.append(result)
    counts = {verdict: sum(result.verdict == verdict for result in results) for verdict in ("pass", "FAIL", "skipped")}
    print(f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['skipped']} skipped")
    if args.json:
        model = {"checkpoint": str(args.checkpoint), "stage": card.stage, "fingerprint": card.fingerprint}
        ran = {"tokens": read, "device": device, "torch": torch.__version__, "transformers": transformers.__version__}
        found = {
            "bars": {"kl": KL_BAR, "tie": TIE},
            "counts": counts,
            "results": [result.to_dict() for result in results],
        }
        write_json(args.json, model | ran | found)
    return counts["FAIL"]


def tokens(args: argparse.Namespace, card: ModelCard) -> Tensor:
    """Token ids [b, s] to run on; raises InputError for a text that is too short or cannot be read."""
    import torch

    from hydra_mcore.errors import InputError
    from hydra_mcore.selection.probes import load_tokenizer, read_haystack

    length = min(card.shape.native_length, 512) if args.length is None else args.length
    if min(args.sequences, length) < 1:
        raise InputError("--length and --sequences count tokens and rows; give numbers above 0")
    if args.text is None:
        return torch.randint(
            card.shape.vocab_size, (args.sequences, length), generator=torch.Generator().manual_seed(args.seed)
        )
    ids = read_haystack(load_tokenizer(args.checkpoint), args.text)
    if len(ids) < (needed := args.sequences * length):
        raise InputError(f"{args.text}: {len(ids)} tokens; give at least {needed}, or lower --length or --sequences")
    return torch.from_numpy(ids[:needed]).view(args.sequences, length)


if __name__ == "__main__":
    main()
