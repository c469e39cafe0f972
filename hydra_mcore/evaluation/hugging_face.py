# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A causal language model of a Hugging Face directory, as evaluation sees it. No code of the directory is ever run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, logging

from hydra_mcore.config import ConfigError
from hydra_mcore.convert.hf_code import model_class
from hydra_mcore.convert.hf_config import CONFIG_NAME, HuggingFaceError, read_object
from hydra_mcore.convert.hydra_family import MODEL_TYPE
from hydra_mcore.costs.batch_sizes import LOGITS_AT_ONCE
from hydra_mcore.errors import first_line
from hydra_mcore.evaluation.models import repeat_stop
from hydra_mcore.model.rotary import yarn_scaling

# What transformers raises for a directory that it cannot use; safetensors' own is for files cut short.
_MISFIT = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
    LookupError,
    ImportError,
    SafetensorError,
)


def load_config(folder: Path, yarn: float | None = None) -> PreTrainedConfig:
    """A directory's config.json, positions stretched by the factor ``yarn``.

    Raises:
        InputError: transformers does not know the model without code of the directory, or YaRN cannot stretch it.
    """
    try:
        values = read_object(folder / CONFIG_NAME)
        if values.get("model_type") == MODEL_TYPE:
            config = model_class().config_class.from_pretrained(folder)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except _MISFIT as error:
        raise HuggingFaceError(f"{folder}: transformers cannot read its config.json ({first_line(error)})") from None
    if yarn is None:
        return config
    rope = getattr(config, "rope_parameters", None)
    if getattr(config, "fa_position", "rope") != "rope" or not isinstance(rope, dict) or "rope_theta" not in rope:
        raise ConfigError(
            f"{folder}: its attention does not read positions by one RoPE, so YaRN cannot stretch it; leave YaRN out"
        )
    own = None if rope.get("rope_type", "default") == "default" else rope
    try:
        config.rope_parameters = {**rope, **yarn_scaling(yarn, config.max_position_embeddings, own)}
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    return config


class HuggingFaceModel:
    """An ``EvaluatedModel`` run by transformers; whole on each process, so that every process is a replica.

    Args:
        folder: a model of a class that transformers has, or an export of ours.
        dtype: of the parameters.
        yarn: factor by which YaRN stretches the positions; None for the model as it is.

    Raises:
        InputError: as ``load_config``, or weights that are not those of the model in config.json.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, yarn: float | None = None) -> None:
        logging.set_verbosity_error()  # a command has its own output, and its refusals are one line
        logging.disable_progress_bar()
        config = load_config(folder, yarn)
        loader = model_class() if config.model_type == MODEL_TYPE else AutoModelForCausalLM
        options = {"config": config, "dtype": dtype, "output_loading_info": True, "trust_remote_code": False}
        try:
            model, loading = loader.from_pretrained(folder, **options)
        except UnpicklingError:  # transformers' reader of *.bin files takes tensors alone
            raise HuggingFaceError(
                f"{folder}: its *.bin weights are damaged or could run code; get them as safetensors"
            ) from None
        except _MISFIT as error:
            raise HuggingFaceError(f"{folder}: its weights do not fit its config.json ({first_line(error)})") from None
        if loading["missing_keys"]:
            name = min(loading["missing_keys"])
            raise HuggingFaceError(
                f"{folder}: its weights do not fit its config.json (no tensor {name}); copy it again"
            )
        self.model: PreTrainedModel = model.eval().to(torch.cuda.current_device())
        self.model.generation_config = (
            GenerationConfig()
        )  # its own may ask for sampling, penalties and other stop tokens
        self.replica, self.replicas = torch.distributed.get_rank(), torch.distributed.get_world_size()

    @torch.no_grad()
    def predicted(self, ids_bs: Tensor, start: int) -> Tensor:
        """int64 [b, s - start]: the likeliest token at each position from ``start`` (at least 1) on, given all before
        it.
        """
        return torch.cat([logits_bpw.argmax(-1) for _, logits_bpw in self._logits(ids_bs, start)], dim=1).cpu()

    @torch.no_grad()
    def token_losses(self, ids_bs: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log likelihood (nats, float32) of every token but the first, and the likeliest token there: both [b,
        s - 1].
        """
        losses, found = [], []
        for labels_bp, logits_bpw in self._logits(ids_bs, 1):
            losses.append(F.cross_entropy(logits_bpw.float().transpose(1, 2), labels_bp, reduction="none"))
            found.append(logits_bpw.argmax(-1))
        return torch.cat(losses, dim=1).cpu(), torch.cat(found, dim=1).cpu()

    @torch.no_grad()
    def generated(self, ids_bs: Tensor, room: int, stop: frozenset[int]) -> Tensor:
        """int64 [b, room]: greedy decoding; behind the first token of ``stop`` that token is repeated."""
        ids_bs = ids_bs.to(self.model.device)
        greedy = GenerationConfig(
            max_new_tokens=room, do_sample=False, eos_token_id=sorted(stop) or None, pad_token_id=0
        )
        found_bs = self.model.generate(ids_bs, attention_mask=torch.ones_like(ids_bs), generation_config=greedy)
        found_br = F.pad(found_bs, (0, ids_bs.shape[1] + room - found_bs.shape[1])).cpu()[:, ids_bs.shape[1] :]
        return repeat_stop(found_br, stop)

    def collect[T](self, mine: list[T]) -> list[list[T]]:
        """The lists of all replicas, by replica."""
        lists: list[list[T]] = [[]] * self.replicas
        torch.distributed.all_gather_object(lists, mine)
        return lists

    def _logits(self, ids_bs: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The tokens [b, p] from ``start`` on and the logits [b, p, w] that predict them, a few positions at a time."""
        ids_bs = ids_bs.to(self.model.device)
        trunk = self.model.base_model(input_ids=ids_bs[:, :-1], use_cache=False, return_dict=True)
        size = max(1, LOGITS_AT_ONCE // (len(ids_bs) * self.model.config.get_text_config().vocab_size))
        for first in range(start, ids_bs.shape[1], size):
            hidden_bpm = trunk.last_hidden_state[:, first - 1 : first - 1 + size]
            yield ids_bs[:, first : first + size], self._head(type(trunk)(last_hidden_state=hidden_bpm))

    def _head(self, trunk: ModelOutput) -> Tensor:
        """The logits of hidden states by the model's own last steps, which may be more than one product (scales, caps).

        Run once over all positions they would make logits of length x vocabulary; so the trunk, already run, is
        replaced by what it gave for some of them.
        """
        self.model.base_model.forward = lambda *args, **keywords: trunk
        try:
            return self.model(inputs_embeds=trunk.last_hidden_state).logits
        finally:
            del self.model.base_model.forward
