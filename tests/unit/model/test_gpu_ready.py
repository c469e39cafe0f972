# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a GPU needs of our code and a CPU can check: one-token steps that never wait for the host, pieces that compile
whole.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape
from hydra_mcore.heads import HeadMap, HeadsByKind
from hydra_mcore.model.build import build_model
from hydra_mcore.model.cache import DecodingCache
from hydra_mcore.model.forward import last_hidden
from hydra_mcore.model.hydra_attention import HydraAttention
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.ops import fla_kernels
from hydra_mcore.sequence import SequencePart
from tests.support.hf_model import random_model, random_tokens
from tests.support.paths import ROOT

SHAPE = ModelShape(
    num_layers=2, hidden_size=32, num_heads=4, num_kv_groups=2, head_dim=8, ffn_hidden_size=48, vocab_size=64,
    native_length=64
)  # fmt: skip
WAITS = {  # a value read by the host, a size known only from values, a tensor made of the host's numbers
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.lift_fresh.default,
}


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    with process_groups():
        yield


class NeverWaits(TorchDispatchMode):
    """Refuses what would make a GPU's stream wait for the host, or the host for it."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert function not in WAITS, f"{function} waits for the host"
        return function(*args, **(kwargs or {}))


def student(**options: Any) -> torch.nn.Module:
    layers = (HeadsByKind(fa=(0, 3), gdn=(1, 2)), HeadsByKind(gdn=(0,), kda=(1, 3), lightning=(2,)))
    head_map = HeadMap(num_heads=SHAPE.num_heads, num_kv_groups=SHAPE.num_kv_groups, layers=layers)
    torch.manual_seed(0)
    return build_model(ModelCard(shape=SHAPE, head_map=head_map, options=HydraOptions(**options), fingerprint=""))


def test_the_guard_bites() -> None:
    with NeverWaits():
        for wait in (lambda: torch.ones(2).sum().item(), lambda: torch.ones(2).nonzero(), lambda: torch.tensor([1, 2])):
            with pytest.raises(AssertionError, match="waits for the host"):
                wait()


@torch.no_grad()
def test_one_token_of_an_exported_model_never_waits(tmp_path: Path) -> None:
    model, tokens_bs = random_model(tmp_path, torch.float32), random_tokens(2, 12)
    cache = model(tokens_bs, use_cache=True).past_key_values
    with NeverWaits():
        model(tokens_bs[:, :1], past_key_values=cache)


@torch.no_grad()
def test_one_token_of_a_model_in_evaluation_never_waits() -> None:
    model, ids_bs, cache = student(), torch.randint(SHAPE.vocab_size, (2, 12)), DecodingCache(SequencePart(12), 20)
    last_hidden([model], ids_bs, cache=cache)
    cache.follow(1)
    with NeverWaits():
        last_hidden([model], ids_bs[:, :1], cache=cache)


def naive_conv(
    x_bsn: Tensor,
    weight_nt: Tensor,
    *,
    activation: str | None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, None]:
    """Flash-linear-attention's call, document by document."""
    bounds = [0, x_bsn.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    documents = [
        F.pad(x_bsn[:, start:end].mT, (weight_nt.shape[1] - 1, 0)) for start, end in itertools.pairwise(bounds)
    ]
    out_bsn = torch.cat([F.conv1d(x, weight_nt[:, None], groups=len(weight_nt)) for x in documents], dim=-1).mT
    return F.silu(out_bsn) if activation == "silu" else out_bsn, None


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("documents", [None, (0, 1, 8, 11, 24), (0, 6, 9, 16, 17, 24)], ids=str)
@torch.no_grad()
def test_the_kernel_s_convolution_knows_documents_and_parts(
    documents: tuple[int, ...] | None, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of three parts, behind what the one before passes, gives its part of the whole row; FLA's call in plain
    torch.
    """
    conv = student(gdn_conv_activation=activation).decoder.layers[0].self_attention.gdn.conv
    conv.weight.normal_()
    x_sbhc, before = torch.randn(24, 1, 2, 24), conv.block[1] - 1
    whole = conv(x_sbhc, SequencePart(24, documents=documents))
    kernels = fla_kernels.Kernels(*[None] * 6, conv=naive_conv, l2norm=None)
    monkeypatch.setattr(fla_kernels, "kernels", lambda: kernels)
    monkeypatch.setattr(fla_kernels, "serve", lambda x: True)
    torch.testing.assert_close(conv(x_sbhc, SequencePart(24, documents=documents)), whole)
    padded_sbhc = torch.cat([torch.zeros_like(x_sbhc[:before]), x_sbhc])
    for rank in range(3):
        found = conv._fused(padded_sbhc[8 * rank : 8 * rank + before + 8], SequencePart(24, 3, rank, documents))[
            before:
        ]
        torch.testing.assert_close(found, whole[8 * rank : 8 * rank + 8])


def pieces(attention: HydraAttention, other: HydraAttention) -> dict[str, Callable[[Tensor], Any]]:
    """Parts of the two layers that a compiler fuses, each of the layer's input."""
    part = SequencePart(7)

    def fused(x_sbm: Tensor) -> Tensor:
        out_sbhd = x_sbm.unflatten(-1, (4, 8))[:, :, :2]
        return attention.fusion({"fa": (out_sbhd, attention.fa.gate(x_sbm)), "gdn": (out_sbhd, None)}, x_sbm)

    return {
        "output gate": attention.fa.gate,
        "decay and write": attention.gdn._gates,
        "decay by channel": other.kda._gates,
        "short convolution": lambda x_sbm: attention.gdn.conv(
            x_sbm.repeat(1, 1, 2)[..., :48].unflatten(-1, (2, 24)), part
        ),
        "fusion": fused,
    }


@pytest.mark.parametrize(
    "options", [{}, {"fusion": "competition", "gdn_conv_activation": "silu", "gate_order": "after_norm"}], ids=str
)
@pytest.mark.parametrize("name", ["output gate", "decay and write", "decay by channel", "short convolution", "fusion"])
def test_pieces_compile_without_a_break(name: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    piece = pieces(*(layer.self_attention for layer in student(**options).decoder.layers))[name]
    x_sbm = torch.randn(7, 2, SHAPE.hidden_size)
    torch._dynamo.reset()
    graphs = CompileCounter()
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")  # the tests switch it off, as compat does without a GPU
    with torch._dynamo.config.patch(disable=False):
        found = torch.compile(piece, backend=graphs, fullgraph=True)(x_sbm)
    assert graphs.frame_count == 1
    torch.testing.assert_close(found, piece(x_sbm))


def test_the_gpu_suite_says_what_it_would_run() -> None:
    """Every test and section once, within eight minutes, of which installation and facts may take fifty seconds."""
    script = ROOT / "tools" / "gpu_check.sh"
    dry = subprocess.run(
        [script, "--dry-run"], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, check=True
    )
    lines = dry.stdout.splitlines()
    limits = [int(re.match(r"\+ [a-z-]+ \((\d+) s\): ", line).group(1)) for line in lines]
    assert len(lines) == 8 and sum(limits) <= 430
    named = re.findall(r"tests/gpu/(test_\w+\.py)", dry.stdout)
    assert sorted(named) == sorted(path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py"))
    for section in ("delta-rule", "attention", "layer", "step"):
        assert f"benchmark.py {section} --" in dry.stdout
    for wrong in (["--fetch"], ["--bogus"]):
        assert subprocess.run([script, *wrong], capture_output=True, check=False).returncode == 2
