# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A new kind of heads needs its own files and nothing else: the commands take it from the teacher to text.

Every command is a process of its own, into which ``sitecustomize.py`` puts the kind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.commands import printed
from tests.support.paths import ROOT
from tests.support.stages import FLAGS, logged, write_data
from tests.support.tiny_hf import tiny_qwen3

WORDS = 64
# All three kinds in a layer, none of FA, toy heads alone.
LAYERS = [{"fa": [1, 4], "gdn": [0, 5], "toy": [2, 3]}, {"gdn": [0, 1, 3], "toy": [2, 4, 5]}, {"toy": list(range(6))}]
TRAINED = {"one": (1,), "tp2": (2, "--tensor-model-parallel-size", "2"), "cp2": (2, "--context-parallel-size", "2")}


def run(*command: object) -> str:
    """A command's output, with the toy kind; it must succeed."""
    path = os.pathsep.join((str(ROOT / "tests" / "toy_kind"), str(ROOT)))
    return printed(*command, path=path, OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher from Hugging Face, a student with toy heads, training data."""
    root = tmp_path_factory.mktemp("toy")
    tiny_qwen3(root / "hf", vocab_size=WORDS)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(root / "hf")
    counts = {"num_layers": 3, "num_heads": 6, "num_kv_groups": 2}
    facts = {"format": 3, "model": counts, "fingerprint": "", "strategy": "by hand", "budget": 2, "layers": LAYERS}
    (root / "map.json").write_text(json.dumps(facts))
    run("tools/convert.py", "import", "--hf", root / "hf", "--out", root / "teacher")
    options = ("--toy-decay", "0.8", "--gdn-kv", "per_group", "--fusion-scale", "one")
    given = ("--teacher", root / "teacher", "--head-map", root / "map.json")
    run("tools/convert.py", "hybridize", *given, *options, "--out", root / "student")
    write_data(root / "data", WORDS)
    return root


def test_without_its_files_nobody_knows_the_kind(made: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/verify.py", str(made / "student")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "toy" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_step_is_the_same_on_every_layout_and_watched(made: Path) -> None:
    losses, statistics = {}, {}
    for name, (ranks, *layout) in TRAINED.items():
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "-m", "hydra_mcore.train")
        start = ("--teacher", made / "teacher", "--start-from", made / "student", "--run-dir", made / name)
        data = ("--data-path", made / "data", "--packed-documents")
        steps = (
            "--train-iters",
            "2",
            "--lr-warmup-iters",
            "1",
            "--micro-batch-size",
            "1",
            "--head-statistics-interval",
            "1",
        )
        run(*launch, "--stage", "align", *start, *data, *FLAGS, *steps, *layout)
        found = logged(made / name / "align" / "tensorboard")
        losses[name], statistics[name] = found["align loss"], {key for key in found if key.startswith("toy ")}
    assert losses["tp2"] == pytest.approx(losses["one"], rel=1e-5)
    assert losses["cp2"] == pytest.approx(losses["one"], rel=1e-5)
    assert statistics["one"] == statistics["tp2"] == statistics["cp2"] >= {"toy query size/all", "toy rms/layer 02"}


def test_a_plan_counts_it(made: Path) -> None:
    recipe = made / "recipe.yaml"
    recipe.write_text(f"run-dir: {made}\nteacher: {made / 'teacher'}\nseq-length: 64\nglobal-batch-size: 8\n")
    text = run("tools/plan.py", "--config", recipe, "--stage", "align", "--gpus", "1")
    assert "Toy heads" in text and "linear attention" in text and "--replaceable-by gdn)" in text


def test_it_cannot_imitate(made: Path) -> None:
    """A kind may do without ``READS``."""
    wanted = ("--score", "product", "--linear", "toy", "--ratio", "2:1", "--dry-run", "--out", made / "chosen")
    path = os.pathsep.join((str(ROOT / "tests" / "toy_kind"), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "tools/select_heads.py", "--teacher", made / "teacher", *wanted],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "toy heads cannot imitate: name gdn or kda or lightning in" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_export_decodes_as_the_checkpoint_does(made: Path) -> None:
    """``verify`` compares logits on layouts, padded rows and decoding in steps; then a process without this project."""
    run("tools/convert.py", "export", "--checkpoint", made / "student", "--out", made / "export")
    verified = run(
        "tools/verify.py", made / "student", "--teacher", made / "teacher", "--export", made / "export", "--json",
        made / "verified.json",
    )  # fmt: skip
    assert ", 0 failed," in verified
    generate = (
        "import sys, torch; sys.modules.update(hydra_mcore=None)\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(made / 'export')!r}, trust_remote_code=True)\n"
        "ids = torch.arange(1, 9)[None]\n"
        "print(model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist())\n"
        "print(model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)[0].tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", generate], cwd=made, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    cached, anew = map(json.loads, done.stdout.splitlines())
    assert cached == anew and len(cached) == 16 and torch.tensor(cached).max() < WORDS
