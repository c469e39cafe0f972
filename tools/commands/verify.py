# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The checks of a checkpoint, from the flags of ``tools/verify.py``."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor

from hydra_mcore.config import ModelCard
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.comparison import KL_BAR, TIE
from hydra_mcore.evaluation.subject import Subject
from hydra_mcore.evaluation.verification import NAMES, proofs_of, verify
from hydra_mcore.files import write_json
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.progress import Progress
from hydra_mcore.ruler.haystack import read_text
from hydra_mcore.tokenizer import load_tokenizer


def run(args: argparse.Namespace, work: Path) -> int:
    """How many checks failed; raises InputError for what cannot be used.

    Args:
        work: an empty folder for what the checks write.
    """
    with process_groups():
        return checked(args, work)


def checked(args: argparse.Namespace, work: Path) -> int:
    """Check the arguments, then run the checks and say what each found; returns how many failed."""
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
    others = (args.hf, args.teacher, args.export, args.served)
    subject = Subject(args.checkpoint, tokens(args, card), work, *others)
    num_heads, (rows, length) = card.shape.num_layers * card.shape.num_heads, subject.rows.tokens_bs.shape
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    read = f"{rows} x {length} tokens, {args.text or f'random (seed {args.seed})'}"
    print(f"{args.checkpoint}: {card.stage}, {card.head_map.num_fa} FA heads of {num_heads}; {read}; float32, {device}")
    checks, results, console = proofs_of(card, args.only or NAMES), [], sys.stdout
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints; what it says is not about the checks
        for result in Progress(verify(subject, checks), desc="checks", total=len(checks), unit="check", leave=False):
            Progress.write(str(result), file=console)
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
    length = min(card.shape.native_length, 512) if args.length is None else args.length
    if min(args.sequences, length) < 1:
        raise InputError("--length and --sequences count tokens and rows; give numbers above 0")
    if args.text is None:
        return torch.randint(
            card.shape.vocab_size, (args.sequences, length), generator=torch.Generator().manual_seed(args.seed)
        )
    ids = read_text(load_tokenizer(args.checkpoint), args.text)
    if len(ids) < (needed := args.sequences * length):
        raise InputError(f"{args.text}: {len(ids)} tokens; give at least {needed}, or lower --length or --sequences")
    return torch.from_numpy(ids[:needed]).view(args.sequences, length)
