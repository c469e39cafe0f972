# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What is logged after each step beside Megatron's own values, and what is looked at so that nothing goes wrong
unseen.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import training
from megatron.training.global_vars import get_tensorboard_writer, get_timers, get_wandb_writer
from megatron.training.utils import is_last_rank
from PIL import Image
from torch import Tensor

from hydra_mcore.config import ModelCard
from hydra_mcore.costs.flops import step_flops
from hydra_mcore.files import write_json
from hydra_mcore.selection.figures import statistic_maps
from hydra_mcore.train.anomalies import DataTimeout, LossSpikes, TrainingStopped, nonfinite
from hydra_mcore.train.head_statistics import STATISTICS, HeadStatistics
from hydra_mcore.train.needle_panels import NeedlePanels
from hydra_mcore.train.step import TransferStep
from hydra_mcore.train.wandb_run import send_alert

GIB = 2.0**30
HEADS_FOLDER = "heads"
TOKENS_PER_SECOND = "speed/tokens per second"


class TrainingLog:
    """Called after every step, by every rank; the last one logs.

    Args:
        data: tells how long this rank has waited for data.
        panels: of needles; None for none.
    """

    def __init__(
        self,
        card: ModelCard,
        args: argparse.Namespace,
        step: TransferStep,
        data: DataTimeout,
        panels: NeedlePanels | None,
    ) -> None:
        self.card, self.args, self.step, self.data, self.panels = card, args, step, data, panels
        self.spikes, self.waited, self.started, self.empty = LossSpikes(), 0.0, False, 0

    def log(self, values: dict[str, float], iteration: int) -> None:
        """To TensorBoard and W&B, where this rank has them."""
        if (writer := get_tensorboard_writer()) is not None:
            for name, value in values.items():
                writer.add_scalar(name, value, iteration)
        if (wandb := get_wandb_writer()) is not None:
            wandb.log(values, iteration)

    def begin(self, iteration: int) -> None:
        """Called at the first step. Values of this step and later ones in earlier files are from before a kill;
        TensorBoard is told to forget them.
        """
        self.started = True
        if (writer := get_tensorboard_writer()) is not None and len(list(Path(writer.log_dir).iterdir())) > 1:
            writer.close()  # it opens its next file by itself, starting with this mark
            writer.purge_step = iteration

    def flops(self, args: argparse.Namespace, sequences: int, **_packing: float | None) -> float:
        """Operations of a step by our count, in the place of Megatron's, which knows one kind of heads and no
        teacher.
        """
        return step_flops(self.card, self.step.options.stage, args.seq_length, sequences)

    def speed(self, steps: int) -> dict[str, float]:
        """Means of the ``steps`` since the last time, as Megatron's console counts them (without evaluation and
        saving).
        """
        seconds = get_timers()("interval-time").elapsed(reset=False) / steps
        sequences, length = get_current_global_batch_size(), self.args.seq_length
        flops = self.flops(self.args, sequences)
        waited, self.waited = self.data.waited - self.waited, self.data.waited
        return {
            TOKENS_PER_SECOND: sequences * length / seconds,
            "speed/TFLOPs per second and GPU": flops / seconds / self.args.world_size / 1e12,
            "speed/seconds per step": seconds,
            "speed/seconds per step waiting for data": waited / steps,
        }

    def memory(self) -> dict[str, float]:
        """GiB of the rank that uses most: of its GPU now and at most so far, and of its host at most so far."""
        on_gpu = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.max_memory_allocated())
        used = {"host peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        if torch.cuda.is_available():
            used |= dict(zip(("GPU allocated", "GPU reserved", "GPU peak"), on_gpu, strict=True))
        most = torch.tensor([amount / GIB for amount in used.values()], device=torch.cuda.current_device())
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        return {f"memory/{name} GiB": value for name, value in zip(used, most.tolist(), strict=True)}

    def heads(self, iteration: int) -> None:
        """Log the statistics of all heads: means as scalars, every single one as a picture, a table and a file."""
        statistics = HeadStatistics.gather(self.step.monitors, self.card.head_map)
        if not is_last_rank():
            return
        self.log(statistics.by_layer(), iteration)
        by_head = statistics.by_head()
        file = Path(self.args.save) / HEADS_FOLDER / f"step_{iteration:07d}.json"
        write_json(file, {name: _plain(values_lh) for name, values_lh in by_head.items()}, indent=None)
        picture = file.with_suffix(".png")
        shown = {}
        for name, values_lh in by_head.items():
            logarithm = STATISTICS[name].log_scale
            shown[f"{name} (log10)" if logarithm else name] = np.log10(values_lh) if logarithm else values_lh
        statistic_maps(picture, f"Heads at step {iteration}", shown, self.card.head_map)
        if (writer := get_tensorboard_writer()) is not None:
            writer.add_image("heads", np.asarray(Image.open(picture).convert("RGB")), iteration, dataformats="HWC")
        if (wandb := get_wandb_writer()) is not None:
            values = np.stack(list(by_head.values()), axis=-1).tolist()
            rows: list[tuple[Any, ...]] = []
            for layer_idx, layer in enumerate(self.card.head_map.layers):
                for kind, heads in layer.items():
                    rows += [(layer_idx, head_idx, kind, *values[layer_idx][head_idx]) for head_idx in heads]
            wandb.log_figure("heads", picture, iteration, ("layer", "head", "role", *by_head), rows)

    def needles(self, model: list[torch.nn.Module], optimizer: Any, iteration: int) -> None:
        """Ask the student for needles, as Megatron evaluates: its clock stopped, all weights gathered."""
        get_timers()("interval-time").stop()
        if overlapped := training.should_disable_forward_pre_hook(self.args):
            training.disable_forward_pre_hook(model, optimizer=optimizer)
        scores = self.panels.scores(self.step.students)
        if overlapped:
            training.enable_forward_pre_hook(model)
        self.log({f"needles/{panel}": score.accuracy for panel, score in scores.items()}, iteration)
        if is_last_rank():
            found = ", ".join(f"{panel} {score.correct:g} of {score.total}" for panel, score in scores.items())
            print(f" needles after {iteration} steps: {found}", flush=True)
        get_timers()("interval-time").start(barrier=True)

    def leave_out_empty(self, losses: dict[str, Tensor], totals: dict[str, Any], iteration: int) -> None:
        """Take out losses that are 0 / 0, where no token of the step counted: they are in no log and in no mean of an
        interval.

        Others that are not finite never come here: training stops at them (``train.anomalies.stop_together``).
        """
        empty = [name for name in losses if math.isnan(float(losses[name]))]
        for name in empty:
            del losses[name]
        if empty and is_last_rank():
            print(f" step {iteration}: no token counts in it (the loss mask is zero), so it has no loss", flush=True)
        self.empty += bool(empty)
        if iteration % self.args.log_interval == 0:
            steps = totals.get("advanced iterations", 0) + 1
            if 0 < self.empty < steps:  # Megatron adds this step's loss, and divides by all steps
                for name in losses.keys() | {name for name in totals if not name.endswith(" iterations")}:
                    last = losses.get(name, 0.0)
                    totals[name] = (totals.get(name, 0.0) + last) * steps / (steps - self.empty) - last
            self.empty = 0

    def losses(self, losses: dict[str, Tensor], iteration: int) -> None:
        """Say so when the loss jumps; Megatron hands the step's losses to the last pipeline stage."""
        name = f"{self.step.options.stage} loss"
        if is_last_rank() and name in losses and (bound := self.spikes(loss := float(losses[name]))) is not None:
            line = f"step {iteration}: {name} {loss:.4g} is a spike (the last steps make {bound:.4g} the bound)"
            print(f" {line}", flush=True)
            send_alert("loss spike", line)


@contextlib.contextmanager
def _in_place_of_megatron(**ours: Any) -> Iterator[None]:
    """While open, Megatron's training loop finds these under the names of its own."""
    stock = {name: getattr(training, name) for name in ours}
    try:
        for name, own in ours.items():
            setattr(training, name, own)
        yield
    finally:
        for name, own in stock.items():
            setattr(training, name, own)


@contextlib.contextmanager
def logging_to(log: TrainingLog) -> Iterator[None]:
    """While open, Megatron's training loop calls ``log``: as it logs a step, and as it has done so.

    It counts operations as we do, and its line ends with tokens a second. Its table of parameters and memory in theory,
    which knows no heads like ours, is not printed.
    """
    stock_log, stock_after = training.training_log, training.post_training_step_callbacks
    stock_print = training.print_rank_last
    speed: dict[str, float] = {}

    def print_line(line: str) -> None:
        tokens = f" tokens per second: {speed[TOKENS_PER_SECOND]:.1f} |" if speed and " iteration " in line else ""
        stock_print(line + tokens)

    def log_step(
        losses: dict[str, Tensor], totals: dict[str, Any], rate: Any, iteration: int, *rest: Any, **keywords: Any
    ) -> Any:
        if not log.started:
            log.begin(iteration)
        layers = {
            name: float(losses.pop(name)) for name in list(losses) if "/" in name
        }  # not for the console: one a layer
        log.log(layers, iteration)
        speed.clear()
        if iteration % log.args.log_interval == 0:
            steps = 1 + sum(int(totals.get(f"{outcome} iterations", 0)) for outcome in ("advanced", "skipped"))
            speed.update(log.speed(steps))
            log.log(speed | log.memory(), iteration)
        if log.step.heads_due():
            log.heads(iteration)
        log.leave_out_empty(losses, totals, iteration)
        log.losses(losses, iteration)
        # The line that Megatron adds after a start's first step leaves its interval open, so that the next line would
        # count it again; where that line is due anyway it closes one.
        keywords["is_first_iteration"] = (
            keywords.get("is_first_iteration", False) and iteration % log.args.log_interval != 0
        )
        outcome = stock_log(losses, totals, rate, iteration, *rest, **keywords)
        grad_norm = rest[3]
        if grad_norm is not None and not math.isfinite(grad_norm):
            raise TrainingStopped(nonfinite(iteration, "the gradient"))
        return outcome

    def after(model: list[torch.nn.Module], optimizer: Any, scheduler: Any, iteration: int, *rest: Any) -> Any:
        if log.panels is not None and iteration % log.args.needle_interval == 0:
            log.needles(model, optimizer, iteration)
        return stock_after(model, optimizer, scheduler, iteration, *rest)

    ours = {"training_log": log_step, "post_training_step_callbacks": after, "print_rank_last": print_line}
    ours |= {"num_floating_point_operations": log.flops, "report_theoretical_memory": lambda *_, **__: None}
    with _in_place_of_megatron(**ours):
        try:
            yield
        except TrainingStopped as error:
            send_alert("training stopped", str(error))
            raise


def _plain(values_lh: np.ndarray) -> list[list[float | None]]:
    """For JSON, which has no NaN."""
    return [[None if math.isnan(value) else value for value in row] for row in values_lh.tolist()]
