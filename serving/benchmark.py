#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of an export: in vLLM, by its own ``generate``, and of its teacher in vLLM, in one run.

examples:
  .venv/serving/bin/python serving/benchmark.py --export runs/a/hf --teacher Qwen3-1.7B
  .venv/serving/bin/python serving/benchmark.py --export runs/a/hf --teacher Qwen3-1.7B --dtype bf16 --lengths 512
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEW_TOKENS = 32
DTYPES = {"bf16": "bfloat16", "float32": "float32"}  # by the names of the other commands: vLLM's and torch's
Times = dict[tuple[int, int], tuple[float, float]]  # requests, prompt tokens -> seconds to read, and to read and write


def parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="benchmark", description=__doc__, formatter_class=layout)
    p.add_argument("--export", type=Path, required=True, metavar="DIR", help="Hugging Face export of a student")
    p.add_argument("--teacher", type=Path, required=True, metavar="DIR", help="Hugging Face directory of its teacher")
    p.add_argument("--lengths", type=int, nargs="+", default=[512, 4096], metavar="N", help="tokens of a prompt")
    p.add_argument("--requests", type=int, nargs="+", default=[1, 8], metavar="N", help="at once")
    p.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    return p


def main() -> None:
    args = parser().parse_args()
    for folder in (args.export, args.teacher):
        if not folder.is_dir():
            parser().exit(2, f"benchmark: {folder}: no such folder; correct the path\n")
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    ways: dict[str, tuple[Callable[..., Times], Path]] = {
        "student in vLLM": (in_vllm, args.export),
        "student's generate": (by_generate, args.export),
        "teacher in vLLM": (in_vllm, args.teacher),
    }
    found = {name: apart(measure, folder, args) for name, (measure, folder) in ways.items()}
    print(f"| requests x prompt tokens, {args.dtype} | {' | '.join(found)} |")
    print("| :-- |" + " --: |" * len(found))
    for requests, length in next(iter(found.values())):
        cells = []
        for times in found.values():
            read_s, all_s = times[requests, length]
            written = requests * (NEW_TOKENS - 1)
            cells.append(f"{requests * length / read_s:,.0f} read, {written / max(all_s - read_s, 1e-9):,.1f} written")
        print(f"| {requests} x {length:,} | {' | '.join(cells)} |")
    print("tokens a second; what is written counts from the second token on")


def apart(measure: Callable[..., Times], folder: Path, args: argparse.Namespace) -> Times:
    """In a process of its own, which leaves the memory and the threads as they were."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (folder, args))


def measured(args: argparse.Namespace, run: Callable[[int, int, int], Any]) -> Times:
    """Seconds of ``run(requests, length, new tokens)`` with one new token and with many; the first call warms up."""
    run(1, min(args.lengths), 2)
    found: Times = {}
    for length in args.lengths:
        for requests in args.requests:
            seconds = []
            for new in (1, NEW_TOKENS):
                start = time.perf_counter()
                run(requests, length, new)
                seconds.append(time.perf_counter() - start)
            found[requests, length] = (seconds[0], seconds[1])
    return found


def random_prompts(requests: int, length: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(length)
    return torch.randint(100, 10_000, (requests, length), generator=generator).tolist()


def in_vllm(folder: Path, args: argparse.Namespace) -> Times:
    from vllm import LLM, SamplingParams

    longest = max(args.lengths) + NEW_TOKENS
    settings = {"dtype": DTYPES[args.dtype], "max_model_len": longest, "max_num_seqs": max(args.requests), "seed": 0}
    engine = LLM(model=str(folder), skip_tokenizer_init=True, enable_prefix_caching=False, **settings)

    def run(requests: int, length: int, new: int) -> None:
        prompts = [{"prompt_token_ids": ids} for ids in random_prompts(requests, length)]
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        engine.generate(prompts, sampling, use_tqdm=False)

    return measured(args, run)


def by_generate(folder: Path, args: argparse.Namespace) -> Times:
    import torch
    from vllm_hydra_head.export.modeling_hydra_head import HydraHeadForCausalLM

    model = HydraHeadForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPES[args.dtype])).eval()

    def run(requests: int, length: int, new: int) -> None:
        ids_bs = torch.tensor(random_prompts(requests, length))
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new}
        model.generate(ids_bs, attention_mask=torch.ones_like(ids_bs), **options)

    return measured(args, run)


if __name__ == "__main__":
    main()
