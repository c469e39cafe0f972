# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's logits on one process and on several, one parallel layout after the other.

``run_layouts`` starts the ranks; each of them is this file run as a module.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from hydra_mcore.compat import install

install()

import torch  # noqa: E402  the patches come before the engine
import torch.nn.functional as F  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from hydra_mcore.config import ModelCard  # noqa: E402
from hydra_mcore.costs.batch_sizes import rows_a_forward  # noqa: E402
from hydra_mcore.errors import InputError  # noqa: E402
from hydra_mcore.files import replacing, write_json  # noqa: E402
from hydra_mcore.model.build import load_model, model_config, transformer_config  # noqa: E402
from hydra_mcore.model.forward import last_hidden  # noqa: E402
from hydra_mcore.model.runtime import process_groups  # noqa: E402
from hydra_mcore.ops.context_parallel import gather_parts  # noqa: E402
from hydra_mcore.sequence import SequencePart  # noqa: E402

LAUNCH_SECONDS = 1800  # for all layouts of one launch: minutes for a model of some billion parameters on a CPU
GRACE_SECONDS = 2.0  # a rank that fails takes its peers down: wait so long to see who failed first
ROOT = Path(__file__).parents[2]  # where the ranks find this package, installed or not


class Layout(NamedTuple):
    """Sizes of tensor, pipeline and context parallelism."""

    tp: int = 1
    pp: int = 1
    cp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp

    def __str__(self) -> str:
        return " x ".join(f"{name.upper()} {size}" for name, size in self._asdict().items() if size > 1)

    def check(self, card: ModelCard, length: int) -> None:
        """Raise InputError where a model, or a row of ``length`` tokens, does not divide into this layout."""
        model_config(card, "inference", transformer_config(card.shape, torch.float32, self.tp, self.pp))
        SequencePart(length, self.cp)


class Rows(NamedTuple):
    """What a model reads: token ids [b, s]; the first row is also read as documents of these boundaries, packed."""

    tokens_bs: Tensor
    documents: tuple[int, ...]

    @classmethod
    def of(cls, tokens_bs: Tensor) -> Rows:
        """Rows whose packed form has documents of one token, of a few and of many; no two have the same length."""
        s = tokens_bs.shape[1]
        return cls(tokens_bs, (0, 1, s // 7, s // 3, 5 * s // 8, s))


def logits_of(model: GPTModel, rows: Rows) -> dict[str, Tensor] | None:
    """Logits "dense" [b, s, w] and "packed" [1, s, w], float32 on the CPU; None but on the last pipeline stage."""
    batches = rows.tokens_bs.split(rows_a_forward(rows.tokens_bs.shape[1]))
    dense, packed = (
        [_forward(model, ids_bs, None) for ids_bs in batches],
        _forward(model, rows.tokens_bs[:1], rows.documents),
    )
    return None if packed is None else {"dense": torch.cat(dense), "packed": packed}


@torch.no_grad()
def _forward(model: GPTModel, ids_bs: Tensor, documents: tuple[int, ...] | None) -> Tensor | None:
    if (output := last_hidden([model], ids_bs, documents)) is None:
        return None
    whole_sbw = gather_from_tensor_model_parallel_region(F.linear(*output), group=model.pg_collection.tp)
    return gather_parts(whole_sbw, model.pg_collection.cp).transpose(0, 1).float().cpu()


def run_layouts(
    checkpoint_dir: str | Path, rows: Rows, layouts: list[Layout], folder: Path
) -> dict[Layout, Path | str]:
    """Run a checkpoint on as many processes as the layouts have ranks (all the same number), one layout after the
    other.

    Returns:
        For each layout the safetensors file of its logits (named as by ``logits_of``), or a line on why there is none.
    """
    outcome: dict[Layout, Path | str] = {}
    while left := [layout for layout in layouts if layout not in outcome]:
        folder.mkdir(exist_ok=True)
        what = {"checkpoint": str(Path(checkpoint_dir).resolve()), "layouts": left}
        failure = _launch(
            left[0].ranks, what | {"tokens": rows.tokens_bs.tolist(), "documents": rows.documents}, folder
        )
        outcome |= {layout: _file(folder, layout) for layout in left if _file(folder, layout).is_file()}
        unfinished = next((layout for layout in left if layout not in outcome), None)
        if unfinished is not None:  # the others get another launch, without it
            outcome[unfinished] = failure
    return outcome


def _file(folder: Path, layout: Layout) -> Path:
    return folder / f"{'-'.join(map(str, layout))}.safetensors"


def _launch(world_size: int, request: dict, folder: Path) -> str:
    """Start the ranks and wait for their end; returns the last line of the one that failed first.

    This process hosts a store for each layout, so that ports are free for certain and no layout reads what an earlier
    one left behind.
    """
    torch.cuda.empty_cache()  # the ranks may share this process's GPU
    stores = [
        torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in request["layouts"]
    ]
    write_json(folder / "request.json", request | {"ports": [store.port for store in stores]}, indent=None)
    common = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # torch's word for a store that no rank hosts
    common |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))}
    command = [sys.executable, "-m", "hydra_mcore.evaluation.layout_logits", str(folder)]
    ranks: list[subprocess.Popen] = []
    try:
        for rank in range(world_size):
            environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(folder / f"rank{rank}.log", "w") as log:
                streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
                ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, **streams))
        return _wait(ranks, folder)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _wait(ranks: list[subprocess.Popen], folder: Path) -> str:
    """Wait until all have ended, one has failed, or the time is up; says what is wrong, should some logits be
    missing.
    """
    deadline = time.monotonic() + LAUNCH_SECONDS
    while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
        if any(process.poll() for process in ranks):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.05)
    logs = {rank: folder / f"rank{rank}.log" for rank, process in enumerate(ranks) if process.poll()}
    if not logs:
        return f"no answer within {LAUNCH_SECONDS} seconds"
    first = min(logs, key=lambda rank: logs[rank].stat().st_mtime_ns)
    if (status := ranks[first].poll()) < 0:
        return f"rank {first} was ended by {signal.Signals(-status).name}; is there enough memory?"
    return (logs[first].read_text(errors="replace").strip().splitlines() or ["a rank ended without a word"])[-1]


def main() -> None:
    """One rank: the logits of every layout that the request names."""
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text())
    rows = Rows(torch.tensor(request["tokens"]), tuple(request["documents"]))
    for sizes, port in zip(request["layouts"], request["ports"], strict=True):
        os.environ["MASTER_PORT"] = str(port)
        layout = Layout(*sizes)
        with process_groups(layout.tp, layout.pp, alone=False, cp_size=layout.cp):
            _, model = load_model(request["checkpoint"])
            logits = logits_of(model, rows)
            if torch.distributed.get_rank() == layout.ranks - 1:  # the last pipeline stage, whatever the other sizes
                with replacing(_file(folder, layout), alone=True) as beside:
                    save_file({name: x.contiguous() for name, x in logits.items()}, beside)
            del model, logits
            torch.distributed.barrier()  # a rank that is done early must not close the connections of the others


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        sys.exit(f"{type(error).__name__}: {first}")
