# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Random tiny models and data, and the stages of the transfer run on forked ranks."""

import argparse
import dataclasses
import functools
import inspect
from pathlib import Path

import numpy as np
import torch
from megatron.training.arguments import add_megatron_arguments

import hydra_mcore.train.run  # noqa: F401  here, so that forked ranks find it imported
from hydra_mcore.config import HydraOptions, ModelShape
from hydra_mcore.heads import HeadMap, HeadsByKind
from tests.support.launch import model_parallel, run_ranks

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=32,
    num_heads=8,
    num_kv_groups=2,  # four heads a group: two or four ranks must split groups
    head_dim=8,
    ffn_hidden_size=48,
    vocab_size=64,
    native_length=64,
    rope_theta=1e4,
    # a first token can give a GDN head a nearly zero output, which RMSNorm with 1e-6 would multiply by a thousand,
    # rounding included: layouts could then not be compared to 1e-5
    norm_epsilon=1e-2,
)
# No FA head, one, some (three: a number that neither 2 nor 4 ranks divide), all; every kind in one layer.
HEAD_MAP = HeadMap(
    num_heads=SHAPE.num_heads,
    num_kv_groups=SHAPE.num_kv_groups,
    layers=(
        HeadsByKind(gdn=(0, 1, 5), kda=(2, 3), lightning=(4, 6, 7)),
        HeadsByKind(fa=(5,), gdn=(0, 2, 7), kda=(1,), lightning=(3, 4, 6)),
        HeadsByKind(fa=(0, 3, 6), gdn=(1, 2, 4, 5, 7)),
        HeadsByKind(fa=range(8)),
    ),
)
FLAGS = [
    "--tokenizer-type",
    "NullTokenizer",
    "--split",
    "100,0,0",
    "--seq-length",
    "32",
    "--micro-batch-size",
    "2",
    "--global-batch-size",
    "8",
    "--train-iters",
    "10",
    "--lr-warmup-iters",
    "2",
    "--log-interval",
    "1",
    "--save-interval",
    "1000",
    "--no-save-rng",
    "--head-statistics-interval",
    "0",  # their picture takes a second: tests of them ask for them
]

# Every start makes several parsers, and Megatron's find their help by parsing its source: once for all forked ranks.
inspect.getsource = functools.cache(inspect.getsource)
add_megatron_arguments(argparse.ArgumentParser())


def make_run(
    folder: Path, head_map: HeadMap = HEAD_MAP, options: HydraOptions | None = None, shape: ModelShape = SHAPE
) -> Path:
    """Write folder/teacher, folder/student (random weights, gates included) and folder/data; returns ``folder``."""
    run_ranks(_write_checkpoints, 1, folder, head_map, options or HydraOptions(), shape)
    write_data(folder / "data", shape.vocab_size)
    return folder


def _write_checkpoints(rank: int, folder: Path, head_map: HeadMap, options: HydraOptions, shape: ModelShape) -> None:
    from hydra_mcore.config import teacher_card
    from hydra_mcore.model.build import build_model
    from hydra_mcore.model.checkpoints import save_weights

    teacher = teacher_card(shape, fingerprint="f" * 64)
    student = dataclasses.replace(teacher, head_map=head_map, options=options, stage="student")
    with model_parallel():
        for name, card in (("teacher", teacher), ("student", student)):
            model = build_model(card, "align")
            randomise(model)
            save_weights([model], card, folder / name)


def randomise(model: torch.nn.Module) -> None:
    """Move every parameter off its start, so that no gate, norm or scale is trivial."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))


def write_data(prefix: Path, vocab_size: int, documents: int = 128) -> None:
    """An IndexedDataset of random documents: of one token, ending on and around part borders, longer than a row."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    random = np.random.default_rng(0)
    for _ in range(documents):
        tokens = random.integers(vocab_size - 1, size=random.choice([1, 2, 7, 8, 9, 16, 30, 80]))
        tokens[-1] = vocab_size - 1  # ends the document, as NullTokenizer counts
        builder.add_document(torch.from_numpy(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def run_stage(
    folder: Path, stage: str, world_size: int, *flags: str, run: str = "run", start_from: Path | None = None
) -> dict[str, dict[int, float]]:
    """Run a stage on forked ranks in folder/run; returns what it logged: name -> step -> value."""
    start = ["--start-from", str(start_from or folder / "student")]
    argv = ["--stage", stage, "--run-dir", str(folder / run), "--teacher", str(folder / "teacher"), *start]
    argv += ["--data-path", str(folder / "data"), "--data-cache-path", str(folder / "cache"), *FLAGS, *flags]
    run_ranks(_train, world_size, argv, timeout=140)
    return logged(folder / run / stage / "tensorboard")


def gradients(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Adam's first moment of every parameter, which after one step is 0.1 x the clipped gradient."""
    return optimizer_state(checkpoint, "exp_avg")


def optimizer_state(checkpoint: Path, key: str) -> dict[str, torch.Tensor]:
    """What the optimizer keeps of every parameter (exp_avg, exp_avg_sq, param), whole, by its name in a checkpoint."""
    import torch.distributed.checkpoint as dcp

    prefix, reader = f"optimizer.state.{key}.", dcp.FileSystemReader(checkpoint)
    index = reader.read_metadata().state_dict_metadata
    state = {name: torch.zeros(value.size) for name, value in index.items() if name.startswith(prefix)}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _train(rank: int, argv: list[str]) -> None:
    from hydra_mcore.train.__main__ import main

    main(argv)


def logged(tensorboard: Path) -> dict[str, dict[int, float]]:
    """Every scalar in a TensorBoard folder; a later process's value of a step wins."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tensorboard), size_guidance={"scalars": 0}).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
