# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The layer's projections by Transformer Engine against the local ones: random head maps, options and layouts."""

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given

from hydra_mcore.kinds import FA, KINDS
from hydra_mcore.model.te_layers import TELinear
from tests.distributed.test_layer_layouts import ALIKE, OPTIONS, SHAPE, WIDTH, Case, _build, _groups, _run, cases
from tests.support.launch import model_parallel, run_ranks

CASES = 12
GRADIENTS = 2e-6  # of the largest value of a gradient: both sum in float32, in orders of their own


@pytest.mark.parametrize(("tp_size", "cp_size"), [(1, 2), (2, 1), (2, 2)])
def test_random_layers_compute_what_local_ones_do(tp_size: int, cp_size: int) -> None:
    projections = run_ranks(_check_cases, tp_size * cp_size, tp_size, cp_size, timeout=280)
    assert min(projections) >= 2 * CASES  # of Transformer Engine, on the rank that had fewest


def _check_cases(rank: int, tp_size: int, cp_size: int) -> int:
    """Returns the number of projections by Transformer Engine on this rank, of all cases together."""
    used = []

    @ALIKE(max_examples=CASES)
    @given(cases())
    def check(case: Case) -> None:
        equal, worst, projections = _compare(case, groups)
        used.append(projections)
        found = torch.tensor([float(not equal), worst])
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        assert found[0] == 0, "outputs differ"
        assert found[1] < GRADIENTS, found

    with model_parallel(tp=tp_size, cp=cp_size):
        groups, _ = _groups()
        check()
    return sum(used)


def _compare(case: Case, groups: Any) -> tuple[bool, float, int]:
    """Whether outputs are equal to the last bit, the worst gradient, and how many projections were compared."""
    sequence_parallel = case.sequence_parallel and groups.tp.size() > 1
    made = (groups, sequence_parallel, case.recompute, torch.float32)
    local, other = _build(case, *made), _build(case, *made, implementation="transformer_engine")
    tokens, batch = 2 * case.part_length, 1 if case.documents else 2
    if sequence_parallel:
        tokens //= groups.tp.size()
    generator = torch.Generator().manual_seed(case.kinds.count(FA))
    x, weight = (torch.randn(tokens, batch, WIDTH, generator=generator) for _ in range(2))
    documents = None
    if case.documents is not None:
        length = 2 * case.part_length * groups.cp.size()
        documents = (0, *(bound for bound in case.documents[1:-1] if bound < length), length)
    (out, gradient), (other_out, other_gradient) = (_run(layer, x, weight, documents) for layer in (local, other))
    pairs = zip(local.parameters(), other.parameters(), strict=True)
    gradients = [(gradient, other_gradient), *((one.grad, two.grad) for one, two in pairs)]
    projections = sum(isinstance(getattr(module, "te", None), TELinear) for module in other.modules())
    return torch.equal(out, other_out), max(_worst(*pair) for pair in gradients), projections


def _worst(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    if found is None or expected is None:
        assert found is expected
        return 0.0
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item() if found.numel() else 0.0


def test_what_stays_with_torch() -> None:
    """What has one row a head, or a narrower input than the layer's; keys and values of split groups."""
    assert run_ranks(_without, 2, timeout=120) == [{"linear_write", "linear_decay", "gate.linear", "linear_kv"}] * 2


def _without(rank: int) -> set[str]:
    """The projections of a rank's layer that Transformer Engine does not compute."""
    options = dataclasses.replace(OPTIONS[0], fa_gate="headwise", lightning_gate="headwise")
    kinds = tuple(kind for kind in KINDS for _ in range(2))  # both heads of a group, so that the ranks split it
    case = Case(SHAPE, kinds, options, 8, None, 0, "heads", False, False)
    with model_parallel(tp=2):
        layer = _build(case, _groups()[0], False, False, torch.float32, "transformer_engine")
    modules = dict(layer.named_modules())
    without = [name for name, module in modules.items() if hasattr(module, "te") and module.te is None]
    return {name.partition(".")[2] or name for name in without}


def test_products_in_fp8_stay_within_the_errors_of_its_formats() -> None:
    """A value is rounded by at most 2^-4 of itself in E4M3 and 2^-3 in E5M2, so a product of two rounded matrices is
    off by at most the root of the sum of their squares, where errors are independent. Half of it shows that something
    was rounded at all.
    """
    errors = run_ranks(_fp8_errors, 1, timeout=120)[0]
    forward, backward = (2 * 2**-8) ** 0.5, (2**-8 + 2**-6) ** 0.5
    for name, bound in {"output": forward, "input": backward, "weight": backward}.items():
        assert bound / 8 < errors[name] < bound, (name, errors)


def _fp8_errors(rank: int) -> dict[str, float]:
    """Of a projection whose output gradients are spread as a loss spreads them, to its float32 self."""
    from megatron.core.fp8_utils import get_fp8_context

    from hydra_mcore.model.build import transformer_config

    with model_parallel():
        config = transformer_config(SHAPE, torch.float32)
        config.fp8, config.fp8_recipe = "hybrid", "tensorwise"
        generator = torch.Generator().manual_seed(0)
        x, weight, gradient = (torch.randn(*size, generator=generator) for size in ((64, 32), (48, 32), (64, 48)))
        results = []
        for in_fp8 in (False, True):
            inputs, parameter = x.clone().requires_grad_(), torch.nn.Parameter(weight.clone())
            with get_fp8_context(config) if in_fp8 else contextlib.nullcontext():
                out = TELinear(config, parameter)(inputs)
            out.backward(gradient)
            results.append({"output": out.detach(), "input": inputs.grad, "weight": parameter.grad})
    exact, rounded = results
    return {name: ((rounded[name] - value).norm() / value.norm()).item() for name, value in exact.items()}
