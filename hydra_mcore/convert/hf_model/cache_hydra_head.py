# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a HydraHead model remembers of the tokens it has read; built on transformers' cache classes (tested with 5.0 to
5.24).

FA heads keep keys and values of the kv groups that live in their branch; recurrent heads keep states of constant size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache


class HydraHeadCacheLayer(CacheLayerMixin):
    """What one layer remembers.

    ``keys`` and ``values`` [b, g, s, d] of the kv groups that FA heads read, None without FA heads. ``states`` are
    those of each recurrent kind of heads, by kind and name: "conv" [b, taps - 1, channels], the last inputs of the
    short convolution, "recurrent" [b, h, d, d], float32 (float64 in a float64 model).
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.states: dict[str, dict[str, Tensor]] = {}
        self.num_tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: tensors take the place of None as they come."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [b, g, s, d]; returns all of them so far."""
        if self.keys is not None:
            key_states = torch.cat([self.keys, key_states], dim=-2)
            value_states = torch.cat([self.values, value_states], dim=-2)
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens read, whether or not the layer has FA heads."""
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5

    def crop(self, tokens_to_remove: int) -> None:
        """Raise, because a recurrent state cannot forget; -n asks for n tokens less, n (as of old) for n tokens at
        most.

        Raises:
            NotImplementedError: something would be cut.
        """
        if tokens_to_remove < 0 or 0 < tokens_to_remove < self.num_tokens:
            raise NotImplementedError(
                "a HydraHead cache cannot be cut: recurrent states hold no single tokens; read the prefix again"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._replace(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._replace(lambda x: x[indices.to(x.device)])

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.keys is not None:
            self.keys, self.values = change(self.keys), change(self.values)
        for of_kind in self.states.values():
            of_kind.update({name: change(state) for name, state in of_kind.items()})


class HydraHeadCache(Cache):
    """The cache of a whole model, for ``past_key_values``."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(layers=[HydraHeadCacheLayer() for _ in range(config.num_hidden_layers)])


def as_ours(cache: Cache, config: PretrainedConfig) -> None:
    """Let a ``DynamicCache`` that is still empty hold what these models remember; whoever made it goes on with it.

    Raises:
        ValueError: neither that nor a cache of these models.
    """
    layers = getattr(cache, "layers", ())
    if layers and all(isinstance(layer, HydraHeadCacheLayer) for layer in layers):
        return
    if not isinstance(cache, DynamicCache) or cache.offloading or cache.get_seq_length():
        kind = type(cache).__name__ + (" that offloads" if getattr(cache, "offloading", False) else "")
        raise ValueError(
            f"past_key_values is a {kind}; give a HydraHeadCache, an empty DynamicCache, or none and use_cache=True"
        )
    cache.layers, cache.layer_class_to_replicate = HydraHeadCache(config).layers, None
