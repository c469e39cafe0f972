# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A model behind an OpenAI-compatible server of vLLM, as evaluation sees it: what people serve is what is measured.

Prompts go there as token ids. Of vLLM's own additions to the protocol two are used: log-probabilities of a prompt's
tokens, and token ids of what was written.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydra_mcore.errors import InputError, first_line
from hydra_mcore.evaluation.models import repeat_stop
from hydra_mcore.files import shown

TIMEOUT_S = 1800  # of an answer: a server may read a batch of long prompts on a CPU
SCHEMES = ("http://", "https://")


class ServerError(InputError):
    """A server that does not answer, or not as vLLM's does."""


def is_url(place: str) -> bool:
    return place.startswith(SCHEMES)


def served_folder(url: str) -> Path:
    """The folder of the model that a server serves, as it says itself.

    Raises:
        ServerError: no server, one of other software, or a folder that is not on this machine.
    """
    root = Path(str(_served(url).get("root")))
    if not root.is_dir():
        raise ServerError(
            f"{url}: serves {shown(str(root))}, which is no folder here; its tokenizer and config.json are needed, so"
            " evaluate where that folder can be read"
        )
    return root


def _served(url: str) -> dict[str, Any]:
    """What the server says of its model."""
    models = _ask(url, "models").get("data")
    if not isinstance(models, list) or not models or not isinstance(models[0], dict):
        raise ServerError(f"{url}: names no model; is it vLLM's address, with /v1 at its end?")
    return models[0]


def _ask(url: str, what: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object that a server answers with."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url.rstrip('/')}/{what}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        said = error.read(2000).decode(errors="replace")
        raise ServerError(f"{url}: the server refuses ({error.code}: {first_line(said)[:300]})") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ServerError(f"{url}: no answer ({first_line(str(reason))}); is the server up?") from None
    except ValueError:
        raise ServerError(f"{url}: answers with something else than JSON; is it vLLM's address?") from None
    if not isinstance(found, dict):
        raise ServerError(f"{url}: answers with a {type(found).__name__}; is it vLLM's address?")
    return found


class ServedModel:
    """An ``EvaluatedModel`` on a server; every process that asks is a replica.

    Raises:
        ServerError: as ``served_folder``; here and in each call, a server that refuses or is gone.
    """

    def __init__(self, url: str) -> None:
        self.url, self.name = url, str(_served(url).get("id"))
        self.replica, self.replicas = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def predicted(self, ids_bs: Tensor, start: int) -> Tensor:
        """int64 [b, s - start]: the likeliest token at each position from ``start`` (at least 1) on, given all before
        it.
        """
        return self.token_losses(ids_bs)[1][:, start - 1 :]

    def token_losses(self, ids_bs: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log likelihood (nats, float32) of every token but the first, and the likeliest token there: both [b,
        s - 1].
        """
        losses_bs, likeliest_bs = torch.zeros(ids_bs.shape), torch.zeros_like(ids_bs)
        for row, choice in enumerate(self._complete(ids_bs, 1, prompt_logprobs=1)):
            for place, of_token in enumerate(choice["prompt_logprobs"]):
                if of_token is not None:  # of the first token there is none
                    losses_bs[row, place] = -of_token[str(int(ids_bs[row, place]))]["logprob"]
                    likeliest_bs[row, place] = int(min(of_token, key=lambda token: of_token[token]["rank"]))
        return losses_bs[:, 1:], likeliest_bs[:, 1:]

    def generated(self, ids_bs: Tensor, room: int, stop: frozenset[int]) -> Tensor:
        """int64 [b, room]: greedy decoding; behind the first token of ``stop`` that token is repeated."""
        choices = self._complete(ids_bs, room, ignore_eos=True, return_token_ids=True)
        return repeat_stop(torch.tensor([choice["token_ids"] for choice in choices]), stop)

    def collect[T](self, mine: list[T]) -> list[list[T]]:
        """The lists of all replicas, by replica."""
        lists: list[list[T]] = [[]] * self.replicas
        torch.distributed.all_gather_object(lists, mine)
        return lists

    def _complete(self, ids_bs: Tensor, room: int, **options: Any) -> list[dict[str, Any]]:
        """What follows each row, greedily."""
        asked = {"model": self.name, "prompt": ids_bs.tolist(), "max_tokens": room, "temperature": 0.0, **options}
        choices = _ask(self.url, "completions", asked).get("choices")
        if not isinstance(choices, list) or len(choices) != len(ids_bs):
            raise ServerError(f"{self.url}: answers {len(ids_bs)} prompts otherwise than vLLM does")
        return sorted(choices, key=lambda choice: choice["index"])
