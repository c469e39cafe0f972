# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What four ranks trained leaves as one model: nothing of their layout shows in the export, or in what is imported
again.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hydra_mcore.convert.hf_export import export_hf
from hydra_mcore.convert.hf_import import import_hf
from tests.support.launch import model_parallel, run_ranks
from tests.support.stages import SHAPE, make_run, run_stage

LENGTH = 40


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose extend stage ran for two steps on TP 2 x PP 2."""
    shape = dataclasses.replace(SHAPE, qkv_bias=True, qk_norm=False)
    folder = make_run(tmp_path_factory.mktemp("trained"), shape=shape)
    flags = ("--train-iters", "2", "--lr-warmup-iters", "1", "--micro-batch-size", "1")
    run_stage(folder, "extend", 4, *flags, "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
    export_hf(folder / "run" / "extend", folder / "hydra")
    return folder


def test_the_export_computes_what_one_process_computes(trained: Path) -> None:
    (expected,) = run_ranks(_logits, 1, trained / "run" / "extend")
    exported = AutoModelForCausalLM.from_pretrained(trained / "hydra", trust_remote_code=True)
    with torch.no_grad():
        found = exported(_tokens()).logits
    assert expected.std() > 0.1, "flat logits would prove nothing"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_model_card_counts_the_tokens_of_the_run(trained: Path) -> None:
    text = (trained / "hydra" / "README.md").read_text()
    assert "| extend | 512 | 32 |" in text, text  # two steps of eight rows of 32 tokens


def test_a_directory_imported_again_loads_on_any_layout_and_trains_on(trained: Path) -> None:
    run_ranks(_import, 1, trained / "hydra", trained / "back")
    run_ranks(_save_by_ranks, 4, trained / "back", trained / "by_four")
    export_hf(trained / "by_four", trained / "again")
    first, again = (load_file(trained / name / "model.safetensors") for name in ("hydra", "again"))
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
    more = ("--train-iters", "1", "--lr-warmup-iters", "0", "--tensor-model-parallel-size", "2")
    losses = run_stage(trained, "extend", 2, *more, run="more", start_from=trained / "back")
    assert losses["extend loss"][1] > 0


def _tokens() -> torch.Tensor:
    return torch.randint(SHAPE.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(5))


def _logits(rank: int, checkpoint: Path) -> torch.Tensor:
    from hydra_mcore.model.build import load_model

    with model_parallel(), torch.no_grad():
        return load_model(checkpoint)[1](_tokens(), torch.arange(LENGTH)[None], None)


def _import(rank: int, hf_dir: Path, checkpoint: Path) -> None:
    with model_parallel():
        import_hf(hf_dir, checkpoint)


def _save_by_ranks(rank: int, source: Path, target: Path) -> None:
    from hydra_mcore.model.build import load_model
    from hydra_mcore.model.checkpoints import save_weights

    with model_parallel(tp=2, pp=2):
        card, model = load_model(source)
        save_weights([model], card, target)
