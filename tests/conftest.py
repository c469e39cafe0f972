# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of the test process.  They come before torch is imported, and forked ranks inherit them.

The tests run on the CPU, also on a machine with a GPU, so that they mean the same everywhere.
``HYDRA_TEST_DEVICE=gpu pytest -m gpu`` runs the others.  ``HYDRA_TEST_TE=1 pytest tests/te`` runs those for which
Transformer Engine's own Python works on the CPU, in processes of their own: it must be there when Megatron is imported.
"""

import gc
import os
import tempfile

REMOTE_CODE = tempfile.TemporaryDirectory(
    prefix="hf_modules_"
)  # transformers copies the code of exported models here, not home
ON_GPU = os.environ.get("HYDRA_TEST_DEVICE", "cpu") == "gpu"
os.environ.update(
    OMP_NUM_THREADS="1",  # several ranks share few cores, and OpenMP's threads do not survive a fork
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    HF_HUB_OFFLINE="1",
    HF_MODULES_CACHE=REMOTE_CODE.name,
    HF_DATASETS_OFFLINE="1",
)
if not ON_GPU:
    os.environ.update(CUDA_VISIBLE_DEVICES="", TORCHDYNAMO_DISABLE="1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from hydra_mcore import compat  # noqa: E402

torch.set_num_threads(1)
WITH_TE = "HYDRA_TEST_TE" in os.environ
if WITH_TE:
    from tests.support import te_on_cpu

    te_on_cpu.load()
compat.install()
collect_ignore = [] if WITH_TE else ["te"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a GPU, saying what is missing."""
    if ON_GPU and torch.cuda.is_available():
        return
    reason = "torch sees no GPU" if ON_GPU else "runs with HYDRA_TEST_DEVICE=gpu on a machine with a GPU"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """What is imported by now stays: looking through it for garbage, again and again, is a tenth of the time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # a library reports what is left at the end of the process


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the tiny example's teacher; not to be written to."""
    from hydra_mcore.convert.hf_import import import_hf
    from hydra_mcore.model.runtime import process_groups
    from tests.support.paths import TINY_TEACHER

    folder = tmp_path_factory.mktemp("tiny") / "teacher"
    with process_groups():
        import_hf(TINY_TEACHER, folder)
    return folder
