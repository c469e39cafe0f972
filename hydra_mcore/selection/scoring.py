# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A whole scoring run: every sub-probe, receivers first, then senders round by round; resumable, on all ranks.

The work is cut into pieces, each a batch of pairs for one purpose. Data-parallel replicas share the pieces of a
purpose; a finished piece goes to the journal, and to all ranks before the next purpose.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from hydra_mcore.errors import InputError
from hydra_mcore.files import disk_problem, disk_refusal
from hydra_mcore.heads import Head
from hydra_mcore.model.runtime import from_first_rank
from hydra_mcore.progress import Progress
from hydra_mcore.selection.attribution import attributed_effects
from hydra_mcore.selection.journal import JournalWriter, read_journal
from hydra_mcore.selection.observe import OBSERVED, observed_scores
from hydra_mcore.selection.probes import ProbeBatch
from hydra_mcore.selection.receivers import PairEffects, receiver_effects
from hydra_mcore.selection.score import CRITICAL, MIN_GAP, ProbeEffects
from hydra_mcore.selection.senders import SenderRuns
from hydra_mcore.selection.teacher import Teacher

Piece = Callable[[], dict[str, Tensor] | None]  # its result; None except on a replica's last pipeline stage


class Scoring:
    """The effects of all heads on the pairs of all probes.

    Args:
        probes: batches by the name of their sub-probe.
        folder: of the journal.
        run: what identifies this run (``read_journal``).

    Raises:
        InputError: the journal holds another run.
    """

    def __init__(
        self, teacher: Teacher, probes: dict[str, list[ProbeBatch]], folder: Path, run: dict[str, Any]
    ) -> None:
        self.teacher = teacher
        self.probes = {name: [batch.to(teacher.device) for batch in batches] for name, batches in probes.items()}
        self.done = from_first_rank(lambda: read_journal(folder, run))
        self.replica, self.replicas = (
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )
        self.writes = teacher.last and parallel_state.get_tensor_model_parallel_rank() == 0
        self.journal = JournalWriter(folder, run, f"replica{self.replica}")

    def exact(self, roles: str = "both") -> dict[str, ProbeEffects]:
        """Receivers by Eq 10 and, if both roles are wanted, senders by path patching until a round finds no new
        head.
        """
        received = self._of_every_pair("receivers", receiver_effects, ())
        return (
            received
            if roles == "receiver"
            else {name: self._senders(name, effects) for name, effects in received.items()}
        )

    def attributed(self) -> dict[str, ProbeEffects]:
        """Both roles estimated from gradients."""
        return self._of_every_pair("attribution", attributed_effects, ((),))

    def observed(self) -> dict[str, np.ndarray]:
        """Scores [l, h] that only look, averaged over the pairs of the probes whose answer is copied; none without
        such.
        """
        pieces: dict[str, Piece] = {}
        for name, batches in self.probes.items():
            for index, batch in enumerate(batches):
                if batch.source_bp is not None:
                    pieces[f"{name} observed {index}"] = partial(self._observed, batch)
        if not pieces:
            return {}
        results = self.run("observed scores", pieces)
        mean_nlh = np.concatenate([result["scores"] for result in results], axis=-1).mean(-1)
        return dict(zip(OBSERVED, mean_nlh, strict=True))

    def _observed(self, batch: ProbeBatch) -> dict[str, Tensor]:
        return {"scores": observed_scores(self.teacher, batch)}

    def _of_every_pair(
        self,
        what: str,
        effects: Callable[[Teacher, ProbeBatch], PairEffects | None],
        receivers: tuple[tuple[Head, ...], ...],
    ) -> dict[str, ProbeEffects]:
        """Effects by probe; the batches of all probes are one run, as a probe alone has too few for many replicas."""
        pieces: dict[str, Piece] = {}
        for name, batches in self.probes.items():
            for index, batch in enumerate(batches):
                pieces[f"{name} {what} {index}"] = lambda batch=batch: _facts(effects(self.teacher, batch))
        results = iter(self.run(what, pieces))
        return {
            name: self._effects(name, list(itertools.islice(results, len(batches))), receivers)
            for name, batches in self.probes.items()
        }

    def _effects(
        self, name: str, results: list[dict[str, np.ndarray]], receivers: tuple[tuple[Head, ...], ...]
    ) -> ProbeEffects:
        joined = {key: np.concatenate([result[key] for result in results], axis=-1) for key in results[0]}
        # Divided by almost nothing, an effect is no number; such pairs are left out by the same rule.
        moved_b = joined["clean"] - joined["corrupt"] >= MIN_GAP
        effects_rlhb = np.where(moved_b, joined["effects"], 0.0)
        capability = self.probes[name][0].capability
        return ProbeEffects(
            capability, effects_rlhb, receivers, joined["clean"], joined["corrupt"], joined["solved"].astype(bool)
        )

    def _senders(self, name: str, effects: ProbeEffects) -> ProbeEffects:
        """Rounds of senders, the critical heads of each round being the receivers of the next, until none is new.

        Heads of the first layer have none before them, so they are no receivers.
        """
        known: set[Head] = set()
        while effects.usable and (
            found := sorted(head for head in _critical(effects.mean_rlh()[-1]) - known if head[0] > 0)
        ):
            known |= set(found)
            round_lhb = self._sender_round(name, effects, tuple(found), len(effects.receivers) + 1)
            stacked_rlhb = np.concatenate([effects.effects_rlhb, round_lhb[None]])
            effects = dataclasses.replace(
                effects, effects_rlhb=stacked_rlhb, receivers=(*effects.receivers, tuple(found))
            )
        return effects

    def _sender_round(self, name: str, effects: ProbeEffects, receivers: tuple[Head, ...], number: int) -> np.ndarray:
        """Effects [l, h, b] through these receivers; only pairs that count are run."""
        batches, used_b = self.probes[name], effects.used_b
        starts = np.cumsum([0, *(len(batch.clean_bs) for batch in batches)])
        kept = {
            index: [int(pair) for pair in range(len(batch.clean_bs)) if used_b[starts[index] + pair]]
            for index, batch in enumerate(batches)
        }
        runs: dict[int, SenderRuns] = {}

        def piece(index: int, layer_idx: int) -> dict[str, Tensor] | None:
            if index not in runs:
                runs.clear()  # one batch's activations at a time
                runs[index] = SenderRuns(self.teacher, batches[index].take(kept[index]), receivers)
            effects_hb = runs[index].effects(layer_idx)
            return None if effects_hb is None else {"effects": effects_hb}

        layers = range(max(layer for layer, _ in receivers))
        places = list(itertools.product([index for index, pairs in kept.items() if pairs], layers))
        pieces = {
            f"{name} senders {number} {index} {layer_idx}": partial(piece, index, layer_idx)
            for index, layer_idx in places
        }
        results = iter(self.run(f"{name}: senders, round {number}", pieces))
        round_lhb = np.zeros(effects.effects_rlhb.shape[1:])
        for index, layer_idx in places:
            round_lhb[layer_idx][:, starts[index] + np.array(kept[index])] = next(results)["effects"]
        return round_lhb

    def run(self, label: str, pieces: dict[str, Piece]) -> list[dict[str, np.ndarray]]:
        """The results of all pieces, in order, on every rank; those in the journal are not run again."""
        open_pieces = [name for name in pieces if name not in self.done]
        fresh: dict[str, Any] = {}
        problem = ""
        mine = open_pieces[self.replica :: self.replicas]
        first = torch.distributed.get_rank() == 0
        for name in Progress(mine, desc=label, unit="piece", leave=False, disable=not (first and mine)):
            result = pieces[name]()
            if self.writes:
                fresh[name] = {key: value.tolist() for key, value in result.items()}
                problem = problem or self._keep(name, fresh[name])
        everyone: list[tuple[str, dict[str, Any]]] = [("", {})] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, (problem, fresh))
        if problem := next((said for said, _ in everyone if said), ""):
            raise InputError(problem)
        for _, part in everyone:
            self.done |= part
        return [{key: np.asarray(value) for key, value in self.done[name].items()} for name in pieces]

    def _keep(self, name: str, value: Any) -> str:
        """Put a piece into the journal; what the disk says if it refuses: the other ranks must not wait for one that
        stops.
        """
        try:
            self.journal.add(name, value)
        except OSError as error:
            if (refusal := disk_refusal(error)) is None:
                raise
            return disk_problem(refusal)
        return ""


def _critical(mean_lh: np.ndarray) -> set[Head]:
    return {(int(layer), int(head)) for layer, head in np.argwhere(abs(mean_lh) >= CRITICAL)}


def _facts(result: PairEffects | None) -> dict[str, Tensor] | None:
    if result is None:
        return None
    return {
        "effects": result.effects_rlhb,
        "clean": result.clean_b,
        "corrupt": result.corrupt_b,
        "solved": result.solved_b,
    }
