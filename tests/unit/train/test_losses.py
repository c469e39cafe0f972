# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The fused token loss against plain torch on full logits: values, gradients, tensor parallelism, memory."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_mcore.costs.loss_memory import peak_bytes
from hydra_mcore.train.losses import token_loss
from tests.support.launch import model_parallel, run_ranks
from tools.tracked_memory import tracked_peak

ONE_RANK = torch.distributed.ProcessGroup(0, 1)  # has no backend: any collective raises
S, B, M, W = 7, 3, 6, 20
SETTINGS = [
    {"ce_weight": 1.0},
    {"ce_weight": 0.5, "kl_weight": 1.5, "teacher": True},
    {"ce_weight": 0.3, "kl_weight": 0.7, "temperature": 2.0, "teacher": True},
    {"ce_weight": 0.0, "kl_weight": 1.0, "temperature": 0.5, "teacher": True},
    {"ce_weight": 1.0, "kl_weight": 0.0, "teacher": True},
    {"ce_weight": 1.0, "kl_weight": 0.0, "temperature": 2.0, "teacher": True},
]
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda x: " ".join(f"{k}={v}" for k, v in x.items()))


def make_inputs(
    dtype: torch.dtype = torch.float64, s: int = S, b: int = B, m: int = M, w: int = W, scale: float = 1.0
) -> tuple[list[Tensor], tuple]:
    """[student hidden, weight, labels, mask] and the teacher; the teacher's width is its own, some tokens are
    masked.
    """
    rng = torch.Generator().manual_seed(s * w)
    randn = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)  # noqa: E731
    labels = torch.randint(w, (b, s), generator=rng)
    mask = torch.rand((b, s), generator=rng)
    mask[mask < 0.3] = 0
    mask[-1] = 0  # a whole row
    inputs = [(scale * randn(s, b, m)).requires_grad_(), randn(w, m).requires_grad_(), labels, mask]
    return inputs, (scale * randn(s, b, m + 2), randn(w, m + 2))


def plain(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    teacher=None,
    *,
    ce_weight=1.0,
    kl_weight=0.0,
    temperature=1.0,
):
    """(loss, kl, ce) in float64 from full logits."""
    logits_bsw = (hidden.double() @ weight.double().t()).transpose(0, 1)
    ce = (mask * F.cross_entropy(logits_bsw.flatten(0, 1), labels.flatten(), reduction="none").view_as(mask)).sum()
    kl = torch.zeros_like(ce)
    if teacher is not None:
        log_t = ((teacher[0].double() @ teacher[1].double().t()).transpose(0, 1) / temperature).log_softmax(dim=-1)
        log_s = (logits_bsw / temperature).log_softmax(dim=-1)
        kl = temperature**2 * (mask * (log_t.exp() * (log_t - log_s)).sum(dim=-1)).sum()
    return kl_weight * kl + ce_weight * ce, kl, ce


def assert_same(actual, expected, tolerance: float) -> None:
    """Relative to the largest value of each expected tensor, or absolute where that is below 1."""
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape
        error = (x.double() - y.double()).abs().max() / y.double().abs().max().clamp(min=1)
        assert error <= tolerance, f"relative error {error:.1e}"


def compare(settings: dict, dtype: torch.dtype, tolerance: float, **options) -> None:
    settings = dict(settings)
    inputs, teacher = make_inputs(dtype)
    teacher = teacher if settings.pop("teacher", False) else None
    actual = token_loss(*inputs, tp_group=ONE_RANK, teacher=teacher, **settings, **options)
    expected = plain(*inputs, teacher, **settings)
    assert all(x.dtype == dtype and x.shape == () for x in actual)
    assert actual.loss.requires_grad and not actual.kl.requires_grad and not actual.ce.requires_grad
    assert_same(actual, expected, tolerance)
    gradients = torch.autograd.grad(3 * actual.loss, inputs[:2])
    assert [x.dtype for x in gradients] == [dtype, dtype]
    assert_same(gradients, torch.autograd.grad(3 * expected[0], inputs[:2]), tolerance)


@each_setting
@pytest.mark.parametrize("chunk_elements", [1, W, 4 * W + 1, 2**25], ids=lambda n: f"chunk={n}")
def test_float64(settings: dict, chunk_elements: int) -> None:
    compare(settings, torch.float64, 1e-12, chunk_elements=chunk_elements)


@each_setting
def test_float32(settings: dict) -> None:
    compare(settings, torch.float32, 1e-5, chunk_elements=5 * W)


def test_bfloat16_sums_in_float32() -> None:
    (hidden, weight, labels, _), teacher = make_inputs(torch.bfloat16, s=400, b=2)
    # Every token alike: a sum in bfloat16 stops growing at 256 of the 800.
    hidden = hidden.detach()[:1, :1].expand(400, 2, M).contiguous().requires_grad_()
    teacher = (teacher[0][:1, :1].expand(400, 2, M + 2), teacher[1])
    inputs = (hidden, weight, torch.full_like(labels, 5), torch.ones(2, 400))
    actual = token_loss(*inputs, tp_group=ONE_RANK, teacher=teacher, kl_weight=1.0, chunk_elements=W)
    expected = plain(*inputs, teacher, kl_weight=1.0)
    assert actual.loss.dtype == torch.float32
    gradients = torch.autograd.grad(actual.loss, inputs[:2])
    assert [x.dtype for x in gradients] == [torch.bfloat16] * 2
    assert_same([*actual, *gradients], [*expected, *torch.autograd.grad(expected[0], inputs[:2])], 2e-2)


def test_extreme_logits() -> None:
    inputs, teacher = make_inputs(scale=1e4)
    settings = {"ce_weight": 0.3, "kl_weight": 0.7, "temperature": 2.0}
    actual = token_loss(*inputs, tp_group=ONE_RANK, teacher=teacher, **settings)
    expected = plain(*inputs, teacher, **settings)
    assert torch.isfinite(actual.loss)
    assert_same(actual, expected, 1e-12)
    assert_same(torch.autograd.grad(actual.loss, inputs[:2]), torch.autograd.grad(expected[0], inputs[:2]), 1e-12)


def test_masked_tokens_do_not_matter() -> None:
    inputs, teacher = make_inputs()
    options = {"tp_group": ONE_RANK, "teacher": teacher, "kl_weight": 1.0}
    first = token_loss(*inputs, **options)
    labels = inputs[2].masked_fill(inputs[3] == 0, -100)
    assert_same(token_loss(*inputs[:2], labels, inputs[3], **options), first, 0)
    gradient_sbm = torch.autograd.grad(first.loss, inputs[0])[0]
    assert torch.equal(gradient_sbm.abs().sum(dim=-1).t() == 0, inputs[3] == 0)
    nothing = token_loss(*inputs[:3], torch.zeros(B, S, dtype=torch.bool), **options)
    assert_same([*nothing, *torch.autograd.grad(nothing.loss, inputs[:2])], [x * 0 for x in (*nothing, *inputs[:2])], 0)


def test_bool_mask_is_a_mask_of_ones() -> None:
    inputs, _ = make_inputs()
    mask = inputs[3] > 0
    assert_same(
        token_loss(*inputs[:3], mask, tp_group=ONE_RANK), token_loss(*inputs[:3], mask.double(), tp_group=ONE_RANK), 0
    )


def test_a_student_that_is_its_teacher_has_no_kl() -> None:
    inputs, _ = make_inputs(torch.float32)
    teacher = (inputs[0].detach(), inputs[1].detach())
    for temperature in (1.0, 2.0):
        result = token_loss(
            *inputs, tp_group=ONE_RANK, teacher=teacher, ce_weight=0.0, kl_weight=1.0, temperature=temperature
        )
        assert result.kl == 0 and result.loss == 0
        assert all(x.abs().max() < 1e-6 for x in torch.autograd.grad(result.loss, inputs[:2]))


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_frozen_input_costs_nothing(frozen: int) -> None:
    inputs, teacher = make_inputs()
    options = {"tp_group": ONE_RANK, "teacher": teacher, "kl_weight": 1.0}
    expected = torch.autograd.grad(token_loss(*inputs, **options).loss, inputs[:2])
    inputs[frozen].requires_grad_(False)
    with tracked_peak() as memory:
        result = token_loss(*inputs, chunk_elements=W, **options)
    assert inputs[frozen].numel() * 8 > memory.live_bytes - inputs[1 - frozen].numel() * 8 >= 0
    result.loss.backward()
    assert inputs[frozen].grad is None
    assert_same([inputs[1 - frozen].grad], [expected[1 - frozen]], 1e-12)


@pytest.mark.parametrize("how", ["no_grad", "frozen"])
def test_evaluation_keeps_nothing_but_the_sums(how: str) -> None:
    inputs, teacher = make_inputs()
    expected = token_loss(*inputs, tp_group=ONE_RANK, teacher=teacher, kl_weight=1.0)
    for x in inputs[:2]:
        x.requires_grad_(how == "no_grad")
    with torch.set_grad_enabled(how != "no_grad"), tracked_peak() as memory:
        actual = token_loss(*inputs, tp_group=ONE_RANK, teacher=teacher, kl_weight=1.0, chunk_elements=W)
    assert memory.live_bytes == 3 * 8 and not actual.loss.requires_grad
    assert memory.peak_bytes < 3 * W * 8 + 16 * 8 + 2 * 8 * S * B
    assert_same(actual, expected, 1e-12)


def test_tied_weight_sums_its_gradients() -> None:
    inputs, teacher = make_inputs()
    tokens = torch.randint(W, (S, B), generator=torch.Generator().manual_seed(3))
    weight = inputs[1]

    def gradient(loss_of) -> Tensor:
        weight.grad = None
        for _ in range(2):  # micro-batches
            loss_of(F.embedding(tokens, weight).tanh(), *inputs[1:])[0].backward()
        return weight.grad

    fused = gradient(lambda *x: token_loss(*x, tp_group=ONE_RANK, teacher=teacher, kl_weight=0.5, chunk_elements=5 * W))
    assert_same([fused], [gradient(lambda *x: plain(*x, teacher, kl_weight=0.5))], 1e-12)


def test_second_backward_raises() -> None:
    inputs, _ = make_inputs()
    loss = token_loss(*inputs, tp_group=ONE_RANK).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize(
    "name", ["student_weight_wm", "labels_bs", "mask_bs", "teacher hidden_sbm", "teacher weight_wm"]
)
def test_wrong_shapes_raise(name: str) -> None:
    (hidden, weight, labels, mask), teacher = make_inputs(s=B)
    wrong = {
        "student_weight_wm": ((hidden, weight[:, :1], labels, mask), teacher),
        "labels_bs": ((hidden, weight, labels[:1], mask), teacher),
        "mask_bs": ((hidden, weight, labels, mask[:, :1]), teacher),
        "teacher hidden_sbm": ((hidden, weight, labels, mask), (teacher[0][:1], teacher[1])),
        "teacher weight_wm": ((hidden, weight, labels, mask), (teacher[0], teacher[1][:1])),
    }
    inputs, teacher = wrong[name]
    with pytest.raises(ValueError, match=f"^{name}: shape"):
        token_loss(*inputs, tp_group=ONE_RANK, teacher=teacher)


def _sharded(rank: int, settings: dict, world_size: int, scale: float) -> tuple[list[Tensor], Tensor, Tensor]:
    from megatron.core import parallel_state

    (hidden, weight, labels, mask), (teacher_hidden, teacher_weight) = make_inputs(scale=scale)
    mine = weight.detach().chunk(world_size)[rank].clone().requires_grad_()
    settings = dict(settings)
    teacher = (teacher_hidden, teacher_weight.chunk(world_size)[rank]) if settings.pop("teacher", False) else None
    with model_parallel(tp=world_size):
        group = parallel_state.get_tensor_model_parallel_group()
        with tracked_peak() as memory:
            result = token_loss(
                hidden, mine, labels, mask, tp_group=group, teacher=teacher, chunk_elements=4 * len(mine), **settings
            )
            (3 * result.loss).backward()
    assert memory.peak_bytes <= peak_bytes(S * B, M, W, world_size, 8, 4 * len(mine), teacher is not None)
    return [x.detach() for x in result], hidden.grad, mine.grad


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("settings", SETTINGS[:3], ids=["ce", "kl", "warm"])
@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["", "extreme"])
def test_tensor_parallel_equals_one_process(settings: dict, world_size: int, scale: float) -> None:
    results, d_hidden, d_weight = zip(*run_ranks(_sharded, world_size, settings, world_size, scale), strict=True)
    inputs, teacher = make_inputs(scale=scale)
    settings = dict(settings)
    expected = plain(*inputs, teacher if settings.pop("teacher", False) else None, **settings)
    for result in results:
        assert_same(result, expected, 1e-12)
    expected_gradients = torch.autograd.grad(3 * expected[0], inputs[:2])
    assert_same([sum(d_hidden), torch.cat(d_weight)], expected_gradients, 1e-12)


@pytest.mark.parametrize("with_teacher", [True, False], ids=["teacher", "no teacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# Most is softmaxes in the first size, the weight's gradient in the second.
@pytest.mark.parametrize(("s", "m", "w", "chunk"), [(300, 16, 2000, 2**17), (50, 128, 4000, 2**14)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_peak_memory_is_the_formula(
    s: int, m: int, w: int, chunk: int, dtype: torch.dtype, with_teacher: bool, temperature: float
) -> None:
    inputs, teacher = make_inputs(dtype, s=s, m=m, w=w)
    teacher = teacher if with_teacher else None
    with tracked_peak() as memory:
        result = token_loss(
            *inputs, tp_group=ONE_RANK, teacher=teacher, kl_weight=1.0, temperature=temperature, chunk_elements=chunk
        )
        result.loss.backward()
    predicted = peak_bytes(s * B, m, w, 1, dtype.itemsize, chunk, with_teacher)
    print(f"{memory.peak_bytes} of {predicted} bytes")
    assert 0.97 * predicted <= memory.peak_bytes <= predicted
    del result
    assert memory.live_bytes == sum(x.grad.nbytes for x in inputs[:2])  # handed to autograd, not copied


@pytest.mark.parametrize("with_teacher", [True, False], ids=["teacher", "no teacher"])
def test_no_tensor_of_tokens_times_vocabulary(with_teacher: bool) -> None:
    s, w = 100, 1000
    inputs, teacher = make_inputs(torch.float32, s=s, w=w)
    with tracked_peak() as fused:
        token_loss(
            *inputs, tp_group=ONE_RANK, teacher=teacher if with_teacher else None, kl_weight=1.0, chunk_elements=10 * w
        ).loss.backward()
    assert fused.largest_elements == 10 * w
    with tracked_peak() as full:  # the tracker does see such tensors
        plain(*inputs)[0].backward()
    assert full.largest_elements == s * B * w


def test_tracker_follows_storages() -> None:
    before = torch.ones(1000)
    with tracked_peak() as memory:
        view = before[:10].view(2, 5)  # shares what exists
        assert memory.live_bytes == 0
        for _, size in itertools.product(range(3), (100, 200)):
            x = view.sum() + torch.zeros(size)
            part = x[:10]
            del x
            assert memory.live_bytes == 4 * size  # the part keeps the whole
            del part
        before.mul_(2)
    assert (memory.live_bytes, memory.peak_bytes, memory.largest_elements) == (0, 4 * 401, 200)
