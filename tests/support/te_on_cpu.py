# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's own Python on a CPU: a stand-in for its compiled parts, and torch for the kernels we use.

``load()`` imports the pure-Python wheel that ``make env`` puts into .venv/te. Its compiled extension is replaced by a
module made from the names that the package asks it for; products, RMSNorm and the checks for a GPU are torch's. What a
layer does with weights, gradients, process groups and quantizers is then the package's own code. Call it in a process
of its own, or a forked rank, before ``compat.install()``: what is loaded stays visible there.
"""

import contextlib
import enum
import functools
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.support.adams import multi_tensor_adam
from tests.support.paths import ROOT

SITE = ROOT / ".venv" / "te"
_EXTENSION = "transformer_engine_torch"
_ONNX = "transformer_engine.pytorch.onnx_extensions"  # imports onnxscript, for an export that nothing here uses


class _AnyMember(type):
    """A class whose every public attribute is a number: an enum of which no member's meaning counts."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("_"):
            raise AttributeError(name)
        return abs(hash(name)) % 1000


def load() -> ModuleType:
    """Import the package with its stand-ins, once; returns ``transformer_engine.pytorch``."""
    if "transformer_engine" not in sys.modules:
        os.environ["NVTE_PROJECT_BUILDING"] = "1"  # transformer_engine.common then loads no shared library
        sys.path.append(str(SITE))
        spec = importlib.util.find_spec("transformer_engine")
        package = ModuleType("transformer_engine")
        package.__path__, package.__spec__ = list(spec.submodule_search_locations), spec
        package.__file__ = spec.origin
        sys.modules["transformer_engine"] = package
        import transformer_engine.common as common

        common.load_framework_extension = lambda framework: None
        sys.modules[_EXTENSION] = _extension(Path(spec.origin).parent)
        sys.modules[_ONNX] = _onnx(Path(spec.origin).parent)
        spec.loader.exec_module(package)
        importlib.import_module("transformer_engine.pytorch")
        _use_torch()
    return sys.modules["transformer_engine.pytorch"]


def _extension(root: Path) -> ModuleType:
    """A module with every name that the package's source asks of its compiled extension."""
    text = "\n".join(path.read_text() for folder in ("pytorch", "debug") for path in (root / folder).rglob("*.py"))
    listed = re.findall(rf"from {_EXTENSION} import (?:\(([^)]*)\)|([^(\n]+))", text)
    names = set(re.findall(r"\btex\.(\w+)", text))
    for inside, line in listed:
        names |= {name.split(" as ")[0].strip() for name in re.sub(r"#.*", "", inside or line).split(",")} - {""}
    members: dict[str, list[str]] = {
        "FP8FwdTensors": [f"GEMM{i}_{kind}" for i in (1, 2, 3) for kind in ("INPUT", "WEIGHT", "OUTPUT")],
        "FP8BwdTensors": [f"GRAD_{kind}{i}" for i in (1, 2, 3) for kind in ("OUTPUT", "INPUT")],
        "DType": "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1".split(),
    }
    asked = sorted(set(re.findall(r"\b(?:tex\.)?([A-Z]\w*)\.([A-Za-z]\w*)", text)))
    extension = ModuleType(_EXTENSION)
    for name in sorted(names):
        if name[0].isupper():
            own = members.get(name) or [member for owner, member in asked if owner == name]
            found = enum.IntEnum(name, own) if own else _AnyMember(name, (), {})
        else:
            found = functools.partial(_needs_gpu, name)
        setattr(extension, name, found)
    extension.multi_tensor_adam, extension.multi_tensor_l2norm = multi_tensor_adam, _l2norm
    extension.multi_tensor_scale = extension.multi_tensor_scale_tensor = _scale
    extension.bgrad_quantize = _bgrad_quantize
    return extension


def _needs_gpu(name: str, *_args: Any, **_keywords: Any) -> None:
    raise NotImplementedError(f"{_EXTENSION}.{name} needs a GPU")


def _l2norm(
    _chunk_size: int, _overflow: Tensor, tensors: list[list[Tensor]], _per_tensor: bool = False
) -> tuple[Tensor, None]:
    norms = [torch.linalg.vector_norm(tensor.float()) for tensor in tensors[0]]
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def _scale(_chunk_size: int, _overflow: Tensor, tensors: list[list[Tensor]], scale: Tensor | float) -> None:
    for source, target in zip(*tensors, strict=True):
        target.copy_(source * scale)


def _bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    return gradient.flatten(0, -2).float().sum(0).to(gradient.dtype), quantizer(gradient)


def _onnx(root: Path) -> ModuleType:
    module = ModuleType(_ONNX)
    imported = re.search(r"from \.onnx_extensions import \(([^)]*)\)", (root / "pytorch" / "export.py").read_text())
    for name in imported.group(1).split(","):
        if name.strip():
            setattr(module, name.strip(), None)
    return module


@contextlib.contextmanager
def _as_if_on_a_gpu() -> Iterator[None]:
    available = torch.cuda.is_available
    torch.cuda.is_available, torch.Tensor.is_cuda = lambda: True, property(lambda _: True)
    try:
        yield
    finally:
        torch.cuda.is_available = available
        del torch.Tensor.is_cuda


def _gemm(
    A: Tensor, B: Tensor, out_dtype: torch.dtype | None = None, *, accumulate: bool = False, layout: str = "TN",
    out: Tensor | None = None, bias: Tensor | None = None, grad: bool = False, **_settings: Any,
) -> tuple[Tensor, Tensor | None, None, None]:  # fmt: skip
    """The package's general_gemm: B A^T in its three layouts, in float32."""
    a = A.t() if layout[0] == "T" else A.flatten(0, -2)
    b = B.flatten(0, -2).t() if layout[1] == "T" else B.flatten(0, -2)
    product, bias_gradient = b.float() @ a.float(), None
    if bias is not None and bias.numel():
        if grad:
            bias_gradient = B.flatten(0, -2).float().sum(0).to(bias.dtype)
        else:
            product = product + bias.float()
    if layout[1] == "N":
        product = product.reshape(*B.shape[:-1], product.shape[-1])
    if out is None:
        return product.to(out_dtype or A.dtype), bias_gradient, None, None
    return out.copy_(out + product if accumulate else product), bias_gradient, None, None


def _rmsnorm_fwd(x: Tensor, weight: Tensor, eps: float, *_settings: Any) -> tuple[Tensor, None, Tensor]:
    inverse = torch.rsqrt(x.float().square().mean(-1) + eps)
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps), None, inverse


def _rmsnorm_bwd(dz: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, *_settings: Any) -> tuple[Tensor, Tensor]:
    scaled, normed = dz.float() * weight.float(), x.float() * inverse[..., None]
    dx = inverse[..., None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dz.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)


def _use_torch() -> None:
    """Replace the kernels and checks on the way of Linear and LayerNormLinear."""
    import transformer_engine_torch as extension
    from transformer_engine.common import recipe
    from transformer_engine.pytorch import cpp_extensions
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import current_scaling_ref_factory
    from transformer_engine.pytorch.module import base, layernorm_linear, linear
    from transformer_engine.pytorch.tensor.utils import is_custom

    layer = base.TransformerEngineBaseModule
    for name in ("__init__", "prepare_forward"):
        setattr(layer, name, _claiming_a_gpu(getattr(layer, name)))
    real = cpp_extensions.general_gemm

    def gemm(A: Any, B: Any, *args: Any, **keywords: Any) -> Any:
        return (real if is_custom(A) or is_custom(B) else _gemm)(A, B, *args, **keywords)

    for module in (linear, layernorm_linear, cpp_extensions):
        module.general_gemm = gemm
    # The recipe "tensorwise" by the package's own slow reference: numbers are rounded to FP8, products are torch's.
    emulation = {"__new__": lambda _cls, **_: recipe.CustomRecipe(qfactory=current_scaling_ref_factory)}
    recipe.Float8CurrentScaling = type("Float8CurrentScaling", (recipe.Float8CurrentScaling,), emulation)
    for module in (extension, cpp_extensions):
        module.rmsnorm_fwd, module.rmsnorm_bwd = _rmsnorm_fwd, _rmsnorm_bwd
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: 0
    # What it returns is to be ignored, where the gradient went into main_grad: not a number, so that use shows.
    for module in (base, linear, layernorm_linear):
        module.get_dummy_wgrad = _not_a_gradient


def _claiming_a_gpu(method: Any) -> Any:
    @functools.wraps(method)
    def wrapped(*args: Any, **keywords: Any) -> Any:
        with _as_if_on_a_gpu():
            return method(*args, **keywords)

    return wrapped


def _not_a_gradient(shape: list[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    return torch.full(shape, 0.0 if zero else float("nan"), dtype=dtype)
