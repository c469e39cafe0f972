# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Values at the edge of what is taken start, train and save: nothing that passes the checks fails later."""

from pathlib import Path

import pytest

from hydra_mcore.model.checkpoints import TRACKER
from tests.support.stages import make_run, run_stage

LARGEST = str(2**53)
EDGES = (
    (
        "--lr 0 --min-lr 0 --lr-warmup-init 0 --clip-grad 0 --weight-decay 1 --adam-eps 1e-300 --adam-beta1 0"
        " --adam-beta2 0 --seed 2147483647 --distributed-timeout-minutes 1000000 --data-timeout 1e9 --exit-signal"
        f" SIGUSR1 --tensorboard-queue-size 1 --log-interval {LARGEST} --eval-interval {LARGEST} --exit-interval"
        f" {LARGEST} --exit-duration-in-mins {LARGEST} --keep-every {LARGEST} --head-statistics-interval {LARGEST}"
        f" --manual-gc --manual-gc-interval {LARGEST}"
    ),
    (
        "--lr-decay-style linear --clip-grad 1e-30 --seed 1 --ddp-bucket-size 1 --rampup-batch-size 2 2 16"
        " --dataloader-type cyclic --timing-log-level 2 --log-params-norm --log-num-zeros-in-grad"
        " --train-sync-interval 1"
    ),
    (
        "--lr-decay-style inverse-square-root --weight-decay-incr-style cosine --start-weight-decay 0"
        " --end-weight-decay 1 --recompute-granularity selective --mlp-chunks-for-training 2 --no-initialization"
        " --use-cpu-initialization --check-for-large-grads"
    ),
)


@pytest.mark.slow
def test_the_edges_of_what_is_taken_train(tmp_path: Path) -> None:
    make_run(tmp_path)
    for number, flags in enumerate(EDGES):
        run_stage(tmp_path, "extend", 1, "--train-iters", "4", *flags.split(), run=f"run{number}")
        assert (tmp_path / f"run{number}" / "extend" / TRACKER).read_text() == "4"
