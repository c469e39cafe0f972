# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Training on prepared data: blends, an exact resume on fewer ranks, data that is not for this model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hydra_mcore.corpus import sources
from hydra_mcore.corpus.manifest import Manifest
from hydra_mcore.corpus.shards import Limits, prepare
from hydra_mcore.corpus.sources import FileSource
from hydra_mcore.corpus.tokenize import load_encoder
from tests.distributed.test_bad_input import refusal
from tests.support.stages import SHAPE, make_run, run_stage, write_data

STEPS, STOP = 6, 3
SCHEDULE = ("--train-iters", str(STEPS), "--save-interval", str(STOP), "--micro-batch-size", "1")
OWN_TOKENIZER = (
    "--tokenizer-type",
    "HuggingFaceTokenizer",
)  # the student's, not the one that tests/support/stages.py names


def word_tokenizer(folder: Path, words: int) -> Path:
    """A tokenizer of the words w0, w1 ... of which the last ends documents."""
    vocabulary = {f"w{number}": number for number in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"w{words - 1}", pad_token="w0").save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student has a tokenizer; folder/web is prepared with it in several shards, folder/plain is a bare
    pair.
    """
    folder = make_run(tmp_path_factory.mktemp("blend"))
    word_tokenizer(folder / "student" / "tokenizer", SHAPE.vocab_size)
    write_data(folder / "plain", 40)
    rng = np.random.default_rng(3)
    rows = [
        " ".join(f"w{word}" for word in rng.integers(SHAPE.vocab_size - 1, size=rng.integers(1, 90)))
        for _ in range(120)
    ]
    (folder / "web.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BATCH_CHARACTERS", 500)
        prepare_web(folder / "web", folder, folder / "student")
    return folder


def prepare_web(out: Path, folder: Path, tokenizer: Path) -> Manifest:
    return prepare(
        FileSource([str(folder / "web.jsonl")], "text"), load_encoder(tokenizer), Limits(shard_tokens=2000), out, 1
    )


@pytest.mark.slow
def test_a_blend_goes_on_at_the_exact_sample_with_fewer_ranks(folder: Path) -> None:
    assert len(Manifest.load(folder / "web.json").shards) == 3
    blend = ("--data-path", "0.7", str(folder / "web"), "0.3", str(folder / "plain"), *SCHEDULE)
    whole = run_stage(folder, "extend", 2, *blend, run="whole")
    first = run_stage(folder, "extend", 2, *blend, "--exit-interval", str(STOP), run="parts")
    assert max(first["grad-norm"]) == STOP
    for ranks in (2, 1):
        run = f"parts-{ranks}"
        shutil.copytree(folder / "parts", folder / run)
        resumed = run_stage(folder, "extend", ranks, *blend, run=run)
        for tag in ("extend loss", "grad-norm"):
            exact = ranks == 2
            after = range(STOP + 1, STEPS + 1)
            assert [resumed[tag][step] for step in after] == pytest.approx(
                [whole[tag][step] for step in after], rel=0 if exact else 1e-5
            )
    other = run_stage(folder, "extend", 1, "--data-path", str(folder / "web"), *SCHEDULE, *OWN_TOKENIZER, run="own")
    assert other["extend loss"][1] != pytest.approx(whole["extend loss"][1], rel=1e-3)


def test_data_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    def line(*flags: str) -> str:
        return refusal(folder, *flags, run="refused")

    web = ("--data-path", str(folder / "web"))
    assert "split 969,30,1 leaves a part of its" in line(*web, "--split", "969,30,1")
    other = word_tokenizer(tmp_path / "other", SHAPE.vocab_size - 1)
    prepare_web(tmp_path / "other-data", folder, other)
    assert "was made with another tokenizer (fingerprint" in line(
        "--data-path", str(tmp_path / "other-data"), *OWN_TOKENIZER
    )
    larger = word_tokenizer(tmp_path / "larger", SHAPE.vocab_size + 1)
    prepare_web(tmp_path / "larger-data", folder, larger)
    said = line("--data-path", str(tmp_path / "larger-data"))
    assert f"holds token {SHAPE.vocab_size}, the model has {SHAPE.vocab_size} words" in said
    for path in folder.glob("web*"):
        shutil.copy(path, tmp_path)
    cut = tmp_path / "web-00001.bin"
    cut.write_bytes(cut.read_bytes()[:-2])
    assert "web-00001.bin: has" in line("--data-path", str(tmp_path / "web"))
    (tmp_path / "web.json").write_text("{}")
    assert "no manifest of tools/prepare_data.py" in line("--data-path", str(tmp_path / "web"))
    (tmp_path / "web.json").rename(tmp_path / "web.unfinished.json")
    assert "is not prepared to the end" in line("--data-path", str(tmp_path / "web"))
    assert "plain has no manifest" in line(
        "--data-path", str(folder / "web"), str(folder / "plain"), str(folder / "data")
    )
