# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The engine says what the export's own ``generate`` says, token by token, whatever it batches, cuts or remembers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from engine import REFERENCES, Answers, ask, in_child, start

FLOAT32 = sorted(REFERENCES.glob("*-float32"))
MIXED, ALL_KINDS = REFERENCES / "gdn-float32", REFERENCES / "every-kind-float32"
ROUNDING = 1e-4  # float32; the worst seen is 3e-5, compiled 7e-5


def same(answers: Answers) -> None:
    assert (answers.equal, answers.total) == (answers.total, 8 * 24)
    assert answers.worst < ROUNDING


def test_there_are_references() -> None:
    assert len(FLOAT32) == 12 and len(list(REFERENCES.glob("*-bfloat16"))) == 2


@pytest.mark.parametrize("folder", FLOAT32, ids=lambda folder: folder.name.removesuffix("-float32"))
def test_every_option_and_kind(folder: Path) -> None:
    (answers,) = in_child(ask, folder, {})
    same(answers)


@pytest.mark.parametrize("folder", sorted(REFERENCES.glob("*-bfloat16")), ids=lambda folder: folder.name)
def test_bf16_is_as_near_to_float32_as_the_export_is(folder: Path) -> None:
    (answers,) = in_child(ask, folder, {"dtype": "bfloat16"})
    print(answers)
    assert 0 < answers.error < 1.2 * answers.expected_error and answers.equal > answers.total / 2


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 48, "enable_chunked_prefill": True},
        {"max_num_seqs": 3},
        {"num_gpu_blocks_override": 30, "max_model_len": 512},
        {"enforce_eager": False},
    ],
    ids=["prompts in pieces", "few at once", "a pool too small for all", "compiled"],
)
@pytest.mark.parametrize("folder", [MIXED, ALL_KINDS], ids=["gdn", "every kind"])
def test_whatever_the_engine_does(folder: Path, settings: dict[str, Any]) -> None:
    (answers,) = in_child(ask, folder, settings)
    same(answers)


@pytest.mark.parametrize("folder", [MIXED, ALL_KINDS], ids=["gdn", "every kind"])
def test_prefixes_are_remembered(folder: Path) -> None:
    first, second = in_child(ask, folder, {"enable_prefix_caching": True}, 2)
    same(first)
    same(second)
    assert sum(first.cached) == 0 and sum(second.cached) > 300


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("gdn", {"tensor_parallel_size": 2, "enforce_eager": False}),
        ("every-kind", {"tensor_parallel_size": 3}),
        ("shared-qkv-competition", {"tensor_parallel_size": 2}),
        ("values-by-group-no-convolution", {"tensor_parallel_size": 2}),
        ("rotary-biases-untied", {"tensor_parallel_size": 2, "max_num_batched_tokens": 48}),
        ("one-linear-head", {"tensor_parallel_size": 2}),
    ],
)
def test_ranks_share_the_heads(case: str, settings: dict[str, Any]) -> None:
    """Layers of 0 to 6 FA heads in 0 to 3 kv groups, so that some ranks have none, or nothing else."""
    (answers,) = in_child(ask, REFERENCES / f"{case}-float32", settings)
    same(answers)


def request_bytes(folder: Path, tokens: int) -> tuple[int, int]:
    """Bytes that the engine's blocks of one request take, and what the request needs exactly."""
    engine = start(folder, dtype="bfloat16", max_model_len=tokens, hf_overrides={"max_position_embeddings": tokens})
    core = engine.llm_engine.engine_core.engine_core
    found, config = core.scheduler.kv_cache_config, engine.llm_engine.model_config.hf_config
    block = found.kv_cache_tensors[0].size // found.num_blocks  # layers share one pool
    blocks = 0
    for group in found.kv_cache_groups:
        attention = type(group.kv_cache_spec).__name__ != "MambaSpec"
        blocks += math.ceil(tokens / group.kv_cache_spec.block_size) if attention else 1
    exact, d = 0, 32  # padded for the CPU's kernels
    for layer in config.heads:
        living = sum(count > 0 for count in config.heads_per_group(layer.get("fa", [])))
        exact += living * tokens * 2 * d * 2
        for kind, heads in layer.items():
            taps = getattr(config, f"{kind}_conv_kernel", 1)
            exact += 0 if kind == "fa" else len(heads) * (4 * config.head_dim**2 + (taps - 1) * 3 * config.head_dim * 2)
    return block * blocks, exact


@pytest.mark.parametrize("folder", [MIXED, ALL_KINDS], ids=["gdn", "every kind"])
def test_a_request_takes_what_its_heads_remember(folder: Path) -> None:
    """Layers of 0, 1, 2 and 3 living groups, 128K tokens: within 5% of the exact bytes."""
    taken, exact = in_child(request_bytes, folder, 131_072)
    assert exact <= taken < 1.05 * exact


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"pipeline_parallel_size": 2},
            r"pipeline parallelism \(--pipeline-parallel-size\) is not there for HydraHead",
        ),
        ({"kv_cache_dtype": "fp8"}, r"a quantized KV cache \(--kv-cache-dtype\) is not there"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding is not there"),
    ],
)
def test_what_is_not_there_is_refused_by_name(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        in_child(start_alone, MIXED, settings)


def start_alone(folder: Path, settings: dict[str, Any]) -> None:
    start(folder, **settings)


def other_version(folder: Path) -> None:
    from vllm_hydra_head import settings

    settings.VERSIONS = ("0.1.0",)
    start(folder)


def test_another_version_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match=r"HydraHead models are served by vLLM 0.1.0, this is 0.32.0; install one"):
        in_child(other_version, MIXED)
