# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Statistics of heads: what hooks gather equals what the modules compute, and means are means of the right thing."""

import math

import numpy as np
import pytest
import torch

from hydra_mcore.config import HydraOptions
from hydra_mcore.heads import HeadMap
from hydra_mcore.train.head_statistics import STATISTICS, HeadMonitor, HeadStatistics
from tests.support.launch import model_parallel, run_ranks
from tests.support.stages import HEAD_MAP, SHAPE, randomise

OPTIONS = {
    "default": HydraOptions(),
    "others": HydraOptions(
        fa_gate="headwise",
        gdn_gate="elementwise",
        gate_order="after_norm",
        fusion="norm",
        gdn_write_max=2.0,
        lightning_gate="none",
    ),
    "bare": HydraOptions(fa_gate="none", fusion="none", kda_gate="headwise"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_hooks_gather_what_the_heads_compute(options: HydraOptions) -> None:
    ((found, expected),) = run_ranks(_both, 1, options)
    for name in STATISTICS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)
    assert (np.isnan(found["gate"]) == np.isnan(expected["gate"])).all()


def _both(rank: int, options: HydraOptions) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """By hooks over two micro-batches, and by hand from what each layer's branches are given and return."""
    import dataclasses

    from hydra_mcore.config import teacher_card
    from hydra_mcore.model.build import build_model

    card = dataclasses.replace(teacher_card(SHAPE, "f" * 64), head_map=HEAD_MAP, options=options)
    with model_parallel():
        model = build_model(card, "extend").train()
        randomise(model)
        due = [True]
        monitor = HeadMonitor(model, lambda: due[0])
        calls: list[tuple] = []
        for layer in model.decoder.layers:
            layer.self_attention.register_forward_hook(
                lambda module, args, kwargs, out: calls.append((module, args[0])), with_kwargs=True
            )
        outputs: list[tuple] = []
        for layer in model.decoder.layers:
            for kind, branch in layer.self_attention.branches.items():
                branch.register_forward_hook(
                    lambda module, args, out, a=layer.self_attention, k=kind: outputs.append((a, k, args[0], out.own))
                )
        batches = torch.randint(SHAPE.vocab_size, (2, 2, 16), generator=torch.Generator().manual_seed(3))
        position_ids_bs = torch.arange(16).expand(2, -1)
        for ids_bs in batches:
            model(ids_bs, position_ids_bs, None)
        expected = _by_hand(outputs, options, HEAD_MAP)
        due[0] = False
        model(batches[0], position_ids_bs, None)  # not due
        due[0] = True
        model.eval()(batches[0], position_ids_bs, None)  # not training
        found = HeadStatistics.gather([monitor], HEAD_MAP).by_head()
        assert not monitor.table.any()
    return found, expected


def _by_hand(outputs: list[tuple], options: HydraOptions, head_map: HeadMap) -> dict[str, np.ndarray]:
    values = {name: np.full((SHAPE.num_layers, SHAPE.num_heads), math.nan) for name in STATISTICS}
    for attention in {id(a): a for a, *_ in outputs}.values():
        layer, kinds = attention.layer_idx, head_map.layers[attention.layer_idx]
        order = kinds.heads
        if hasattr(attention.fusion, "scale"):
            for at, head in enumerate(order):
                values["scale"][layer, head] = attention.fusion.scale.weight[at].item()
        for kind in kinds:
            mine = [(x, out) for a, k, x, out in outputs if a is attention and k == kind]
            for at, head in enumerate(kinds[kind]):
                out = torch.stack([o[:, :, at] for _, (o, _) in mine]).double()
                if mine[0][1][1] is not None:
                    gate = torch.stack([g[:, :, at] for _, (_, g) in mine]).double()
                    values["gate"][layer, head] = gate.mean().item()
                    out = out * gate if options.gate_order == "before_norm" else out
                values["rms"][layer, head] = out.square().mean().sqrt().item()
                if kind in ("gdn", "kda"):
                    decay, write = zip(*(attention.branches[kind]._gates(x) for x, _ in mine), strict=True)
                    mean_decay = torch.stack(decay)[:, :, :, at].double().mean().item()
                    values["half-life"][layer, head] = -math.log(2) / mean_decay
                    values["write gate"][layer, head] = torch.stack(write)[..., at].double().mean().item()
    return values


def test_means_over_heads() -> None:
    head_map = HeadMap.from_fa([(0, 1), (1, 0), (1, 1), (1, 2)], num_layers=2, num_heads=3, num_kv_groups=1)
    names, table = list(STATISTICS), np.zeros((len(STATISTICS), 2, 3, 2))
    table[names.index("rms")] = [[(8, 2), (3, 3), (32, 2)], [(1, 1), (4, 4), (4, 1)]]
    table[names.index("half-life"), 0, [0, 2]] = [(-0.1, 2), (-0.3, 2)]
    found = HeadStatistics(table, head_map).by_layer()
    rms = {
        "gdn rms/layer 00": math.sqrt(10),
        "gdn rms/all": math.sqrt(10),
        "fa rms/layer 00": 1.0,
        "fa rms/layer 01": math.sqrt(1.5),
    }
    half_life = math.log(2) / 0.1
    expected = rms | {"fa rms/all": math.sqrt(12 / 9), "gdn to fa rms/layer 00": math.sqrt(10)}
    assert found == pytest.approx(expected | {"gdn half-life/layer 00": half_life, "gdn half-life/all": half_life})
