# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""An engine for each test, in a child of one process that has imported vLLM, which takes 20 seconds."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # or each rank wants a NUMA node
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)

from vllm import LLM, SamplingParams

REFERENCES = Path(__file__).parent / "references"
DEFAULTS = {
    **{"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 1024},
    **{"max_num_seqs": 8, "enable_prefix_caching": False, "seed": 0},
}


class Answers(NamedTuple):
    """What a round of the reference's prompts gave."""

    equal: int  # leading greedy tokens that are the reference's
    total: int
    worst: float  # difference of log-probabilities, of these and of the prompts' own tokens
    error: float  # of the prompts' log-probabilities against float32, root mean square
    expected_error: float  # the reference's own
    cached: list[int]  # prompt tokens that were not read again


def in_child(work: Callable[..., Any], *args: Any) -> Any:
    """What ``work`` gives in a forked process; its error is raised here, as text."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def run() -> None:
        try:
            there.send((work(*args), None))
        except BaseException as error:
            there.send((None, f"{error}\n{traceback.format_exc()}"))

    child = context.Process(target=run)
    child.start()
    there.close()
    try:
        result, failure = here.recv()
    except EOFError:
        result, failure = None, "the child ended without a word"
    child.join()
    if failure:
        raise RuntimeError(failure)
    return result


def start(folder: Path, **settings: Any) -> LLM:
    return LLM(model=str(folder), **(DEFAULTS | settings))


def ask(folder: Path, settings: dict[str, Any], rounds: int = 1) -> list[Answers]:
    """The reference's prompts, all at once, so many times."""
    engine = start(folder, **settings)
    reference = json.loads((folder / "reference.json").read_text())
    prompts = [{"prompt_token_ids": row["prompt"]} for row in reference]
    cached = settings.get("enable_prefix_caching", False)
    sampling = SamplingParams(
        **{"temperature": 0, "max_tokens": len(reference[0]["tokens"]), "logprobs": 1, "ignore_eos": True},
        **{"detokenize": False, "prompt_logprobs": None if cached else 1},
    )
    return [compared(reference, engine.generate(prompts, sampling, use_tqdm=False)) for _ in range(rounds)]


def compared(reference: list[dict[str, Any]], outputs: list[Any]) -> Answers:
    equal, total, worst = 0, 0, 0.0
    errors: list[tuple[float, float]] = []
    for row, output in zip(reference, outputs, strict=True):
        (found,) = output.outputs
        pairs = enumerate(zip(found.token_ids, row["tokens"], strict=True))
        same = next((place for place, (token, expected) in pairs if token != expected), len(row["tokens"]))
        equal, total = equal + same, total + len(row["tokens"])
        pairs = [(found.logprobs[i][row["tokens"][i]].logprob, row["log_probs"][i]) for i in range(same)]
        if output.prompt_logprobs:
            given = [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], row["prompt"][1:], strict=True)]
            pairs += zip(given, row["prompt_log_probs"], strict=True)
            by_token = zip(given, row["prompt_log_probs"], row["exact_prompt_log_probs"], strict=True)
            errors += [(found - exact, expected - exact) for found, expected, exact in by_token]
        worst = max([worst, *(abs(one - other) for one, other in pairs)])
    error, expected_error = (
        math.sqrt(sum(each[place] ** 2 for each in errors) / max(1, len(errors))) for place in (0, 1)
    )
    return Answers(equal, total, worst, error, expected_error, [output.num_cached_tokens for output in outputs])
