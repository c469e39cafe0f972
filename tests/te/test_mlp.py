# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The MLP with its norm by Transformer Engine against the local one: outputs, gradients, and where these are summed."""

import pytest
import torch

from hydra_mcore.config import teacher_card
from hydra_mcore.model.build import model_config, transformer_config
from tests.support.launch import model_parallel, run_ranks
from tests.support.stages import SHAPE, randomise
from tests.te.test_heads import _worst

TOKENS, BATCH, GRADIENTS = 12, 2, 2e-6


@pytest.mark.parametrize(("tp_size", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_it_computes_what_the_local_one_does(tp_size: int, sequence_parallel: bool) -> None:
    for equal, worst, norms in run_ranks(_compare, tp_size, tp_size, sequence_parallel, timeout=120):
        assert equal and worst < GRADIENTS
        # Every rank has the norm's whole gradient as soon as it is made: Megatron's own sum comes too late for ranks
        # whose heads, and so whose buffers of gradients, differ (rule 2 of model/parameters.py).
        assert norms < GRADIENTS


def _compare(rank: int, tp_size: int, sequence_parallel: bool) -> tuple[bool, float, float]:
    """Whether outputs are equal to the last bit, the worst gradient, and the norm's against that of all tokens."""
    with model_parallel(tp=tp_size):
        local, other = (_layer(name, tp_size, sequence_parallel) for name in ("local", "transformer_engine"))
        randomise(local)
        with torch.no_grad():
            for name, parameter in _parameters(other).items():
                parameter.copy_(_parameters(local)[name])
        assert not getattr(other.mlp.linear_fc1.layer_norm_weight, "sequence_parallel", False)
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(TOKENS, BATCH, SHAPE.hidden_size, generator=generator) for _ in range(2))
        if sequence_parallel:
            x, weight = x.chunk(tp_size)[rank], weight.chunk(tp_size)[rank]
        results = [_run(layer, x, weight) for layer in (local, other)]
        (out, gradients), (other_out, other_gradients) = results
        worst = max(_worst(other_gradients[name], gradient) for name, gradient in gradients.items())
        copies = [torch.empty_like(other_gradients["norm"]) for _ in range(tp_size)]
        torch.distributed.all_gather(copies, other_gradients["norm"])
        return torch.equal(out, other_out), worst, max(_worst(copy, copies[0]) for copy in copies)


def _layer(implementation: str, tp_size: int, sequence_parallel: bool) -> torch.nn.Module:
    from megatron.core.process_groups_config import ProcessGroupCollection

    config = transformer_config(SHAPE, torch.float32, tp_size)
    config.sequence_parallel, config.transformer_impl = sequence_parallel, implementation
    settings = model_config(teacher_card(SHAPE, fingerprint="f" * 64), "extend", config)
    model = settings.get_builder_cls()(settings).build_model(ProcessGroupCollection.use_mpu_process_groups())
    return model.decoder.layers[0]


def _parameters(layer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    fc1, fc2 = layer.mlp.linear_fc1, layer.mlp.linear_fc2
    norm = fc1.layer_norm_weight if hasattr(fc1, "layer_norm_weight") else layer.pre_mlp_layernorm.weight
    return {"norm": norm, "fc1": fc1.weight, "fc2": fc2.weight}


def _run(layer: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    x = x.clone().requires_grad_()
    out, _ = layer.mlp(layer.pre_mlp_layernorm(x))
    (out * weight).sum().backward()
    return out.detach(), {"input": x.grad} | {name: weight.grad for name, weight in _parameters(layer).items()}
