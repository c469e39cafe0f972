# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a layer is said to keep against the tensors that autograd saves."""

from __future__ import annotations

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape
from hydra_mcore.costs.activations import Run, layer_bytes
from hydra_mcore.heads import HeadMap, HeadsByKind
from hydra_mcore.model.build import contiguous_parts, model_config, transformer_config
from hydra_mcore.model.runtime import process_groups

LENGTH, ROWS = 192, 2
SHAPE = ModelShape(
    num_layers=1, hidden_size=40, num_heads=4, num_kv_groups=2, head_dim=8, ffn_hidden_size=56, vocab_size=100,
    native_length=256
)  # fmt: skip
LAYERS = {
    "FA": HeadsByKind(fa=range(4)), "FA, GDN": HeadsByKind(fa=[1, 2], gdn=[0, 3]), "GDN": HeadsByKind(gdn=range(4)),
    "KDA": HeadsByKind(kda=range(4)), "Lightning": HeadsByKind(lightning=range(4)),
}  # fmt: skip
OPTIONS = {
    "default": HydraOptions(),
    "gates": HydraOptions(
        fa_gate="none", gdn_gate="elementwise", gdn_conv_kernel=0, kda_gate="elementwise", kda_conv_kernel=0,
        lightning_gate="none",
    ),
    "competition": HydraOptions(
        fa_gate="headwise", gdn_gate="headwise", fusion="competition", fa_position="rope", kda_gate="headwise",
        lightning_gate="headwise",
    ),
    "plain": HydraOptions(
        gdn_kv="per_group", fusion="norm", gdn_qk_norm="none", kda_kv="per_group", kda_qk_norm="none",
        lightning_kv="per_group", lightning_qk_norm="none", lightning_position="nope",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("recompute", [(), ("core_attn",)], ids=["", "recompute"])
def test_a_layer_keeps_what_is_said(dtype: torch.dtype, options: str, layer: str, recompute: tuple[str, ...]) -> None:
    head_map = HeadMap(4, 2, (LAYERS[layer],))
    card = ModelCard(shape=SHAPE, head_map=head_map, options=OPTIONS[options], fingerprint="")
    run = Run("extend", LENGTH, ROWS, ROWS, 1, dtype.itemsize, 4, recompute=recompute)
    kept = layer_bytes(card, 0, 0, run)
    expected = kept.before + kept.after + kept.mlp + (0 if recompute else kept.core)
    assert _saved_bytes(card, dtype, recompute) == pytest.approx(expected, rel=0.03)


def _saved_bytes(card: ModelCard, dtype: torch.dtype, recompute: tuple[str, ...]) -> int:
    """Bytes of the storages, weights aside, that the layer's backward pass waits for."""
    with process_groups():
        transformer = transformer_config(card.shape, dtype)
        if recompute:
            transformer.recompute_granularity, transformer.recompute_modules = "selective", list(recompute)
        config = model_config(card, "extend", transformer)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = contiguous_parts(config.get_builder_cls()(config).build_model(groups), card.shape)
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        saved: dict[int, torch.Tensor] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            saved.setdefault(x.untyped_storage()._cdata, x)
            return x.detach()  # an output that its own node keeps would never be freed

        hidden = torch.randn(LENGTH, ROWS, SHAPE.hidden_size, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            kept_alive = model.decoder.layers[0](
                hidden_states=hidden, attention_mask=None, rotary_pos_emb=model.rotary_pos_emb(LENGTH)
            )
        assert kept_alive is not None
        return sum(x.untyped_storage().nbytes() for address, x in saved.items() if address not in weights)
