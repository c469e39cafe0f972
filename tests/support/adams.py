# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The three Adams that Megatron-Core may find, on a CPU: torch's AdamW, Transformer Engine's FusedAdam and Apex's.

Transformer Engine's is its own Python with a kernel of torch.  Apex's is a stand-in: nothing of Apex can be installed
without its compiled parts, so ``ApexFusedAdam`` has the settings, the state and the steps that its public source has.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from hydra_mcore.compat import accelerators

ADAMS = ("torch", "te", "apex")


def use_adam(kind: str) -> None:
    """Let Megatron-Core build optimizers of this kind, as if it had found them at its import; for forked ranks."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = _te_fused_adam() if kind == "te" else ApexFusedAdam  # torch's has another name there
    optimizer.USING_PYTORCH_OPTIMIZER = kind == "torch"
    distrib_optimizer.HAVE_APEX_OR_TE = kind != "torch"
    distrib_optimizer.USING_TE_OPTIMIZER = kind == "te"
    distrib_optimizer.USING_APEX_OPTIMIZER = kind == "apex"


def _te_fused_adam() -> type[torch.optim.Optimizer]:
    if sys.modules.get("transformer_engine") is None:
        for name in accelerators.TE:
            sys.modules.pop(name, None)  # conftest.py hid them
    from tests.support import te_on_cpu

    return te_on_cpu.load().optimizers.FusedAdam


def multi_tensor_adam(
    _chunk_size: int,
    _overflow: Tensor,
    tensors: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    adam_w_mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """The kernel of both packages: gradients, parameters and moments as lists; refuses other types, as compiled code
    does.
    """
    if type(step) is not int:
        raise TypeError(f"step is {step!r}, not an int")
    assert adam_w_mode == bias_correction == 1
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    for gradient, parameter, mean, square in zip(*tensors, strict=True):
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = (mean / correction1) / ((square / correction2).sqrt() + eps)
        parameter.sub_(lr * (update + weight_decay * parameter))


class ApexFusedAdam(torch.optim.Optimizer):
    """Stand-in for apex.optimizers.FusedAdam: it counts steps in groups, but not in a group without parameters."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        assert not capturable
        settings = {"bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {"lr": lr, **settings})
        self.adam_w_mode = int(adam_w_mode)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group["step"] + 1 if "step" in group else 1
            held = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in held:
                if not self.state[parameter]:
                    self.state[parameter] = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            tensors = [[parameter.grad for parameter in held], held]
            tensors += [[self.state[parameter][key] for parameter in held] for key in ("exp_avg", "exp_avg_sq")]
            multi_tensor_adam(
                0, torch.zeros(1), tensors, group["lr"], *group["betas"], group["eps"], group["step"],
                self.adam_w_mode, int(group["bias_correction"]), group["weight_decay"],
            )  # fmt: skip
