# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Write the golden files of a commit: what its commands made of a tiny model, and what its models computed.

Run in a checkout of that commit, whose code it then uses; tests/golden/README.md says what each file is.

    git worktree add /tmp/old COMMIT && cd /tmp/old
    PYTHONPATH=/tmp/old python <this checkout>/tests/golden/make.py <new folder>
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VOCAB, LENGTH, SAVED, STEPS = 64, 48, 2, 4
# No rounding is multiplied by the norms' 1/epsilon, so that other processors come to the same numbers.
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": LENGTH, "rms_norm_eps": 1e-2,
    "tie_word_embeddings": True,
}  # fmt: skip
# Gives a layer of FA heads alone, one of both kinds and one of GDN heads alone.
SELECT = "--budget 6 --strategy global_random --seed 46".split()
SCORE = "--length 96 --pairs 2 --knock-out 0 --text noise --ratio 3:1".split()
# Students by name: all options at their defaults, and all of them at other values.
STUDENTS = {
    "plain": "--text calibration.txt".split(),
    "other": """--text calibration.txt --fa-position rope --fa-log-scale always --fa-log-scale-base 20
        --fa-gate headwise --gdn-position nope --gdn-qk-norm none --gdn-conv-kernel 3 --gdn-conv-activation silu
        --gdn-write-max 2 --gdn-half-life 20 --gdn-gate elementwise --gdn-kv per_group --qkv shared
        --gate-activation silu --gate-order after_norm --fusion competition --fusion-norm-weight none""".split(),
}
TRAIN = f"""--split 100,0,0 --seq-length {LENGTH} --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --min-lr 1e-5
    --lr-warmup-iters 2 --log-interval 1 --save-interval {SAVED}""".split()
# Stages of each student that are stopped with the optimizer's state, and those that are run from its start.
STOPPED = {"plain": "distill", "other": "align"}
FRESH = [("plain", "align"), ("plain", "distill"), ("plain", "extend"), ("other", "extend")]
# Of what a stage logs; memory and seconds are of the machine.
TAGS = ("loss", "kl", "cross-entropy", "grad-norm", "learning-rate", "rms", "half-life", "gate", "scale")
ARCHIVE = "models.tar.xz"
PLAIN = ("heads", "tiny-heads", "expected.json", "expected.npz")  # what is read without unpacking


def training(stage: str, folder: Path, golden: Path, student: str, steps: int, stop: int | None = None) -> list[str]:
    """The flags of a stage in ``folder`` that starts from a golden student."""
    flags = ["--stage", stage, "--run-dir", folder, "--teacher", golden / "teacher", "--start-from", golden / student]
    flags += ["--data-path", golden / "tokens", "--data-cache-path", folder / "cache", "--train-iters", steps]
    flags += ["--exit-interval", stop] if stop else []
    return [*map(str, flags), "--head-statistics-interval", "1", *TRAIN]


def row():
    """The token ids [1, s] that models are compared on."""
    import torch

    return torch.randint(VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(11))


def losses(folder: Path, stage: str) -> dict[str, dict[str, float]]:
    """What a stage logged of the model, float32 as it was: name -> step -> value."""
    from tests.support.stages import logged

    found = logged(folder / stage / "tensorboard")
    named = {tag: steps for tag, steps in found.items() if any(word in tag for word in TAGS) and " vs " not in tag}
    return {tag: {str(step): value for step, value in steps.items()} for tag, steps in named.items()}


def logits(model):
    """float32 logits [s, w] of ``row`` by a model of ours."""
    import torch

    with torch.no_grad():
        return model(row(), torch.arange(LENGTH)[None], None)[0].numpy()


def logits_of_export(folder: Path):
    """The same by an export, on the code that lies in its folder."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(row()).logits[0].numpy()


def main(golden: Path, root: Path) -> None:
    golden.mkdir(parents=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHDYNAMO_DISABLE": "1",
    }

    def command(*words: object) -> None:
        print("$", *words, flush=True)
        subprocess.run(
            [sys.executable, *map(str, words)], cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL
        )

    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    from hydra_mcore.compat import install

    install()
    write_inputs(golden)
    teacher, heads = golden / "teacher", golden / "heads"
    command("tools/convert.py", "import", "--hf", golden / "hf", "--out", teacher)
    command("tools/select_heads.py", "--teacher", teacher, "--out", heads, *SELECT)
    for name, flags in STUDENTS.items():
        flags = [str(golden / flag) if flag.endswith(".txt") else flag for flag in flags]
        given = ("--teacher", teacher, "--head-map", heads / "head_map.json")
        command("tools/convert.py", "hybridize", *given, "--out", golden / name, *flags)
    expected: dict[str, dict] = {"fresh": {}, "stopped": {}}
    with tempfile.TemporaryDirectory() as work:
        for student, stage in FRESH:
            folder = Path(work) / f"{student}-{stage}"
            command("-m", "hydra_mcore.train", *training(stage, folder, golden, student, 3))
            expected["fresh"][f"{student} {stage}"] = losses(folder, stage)
        for student, stage in STOPPED.items():
            folder, kept = Path(work) / student, golden / f"{student}-stopped" / stage
            command("-m", "hydra_mcore.train", *training(stage, folder, golden, student, STEPS, stop=SAVED))
            shutil.copytree(folder / stage, kept, ignore=shutil.ignore_patterns("tensorboard", "*.png"))
            command("-m", "hydra_mcore.train", *training(stage, folder, golden, student, STEPS))
            expected["stopped"][student] = losses(folder, stage)
            command("tools/convert.py", "export", "--checkpoint", kept, "--out", golden / f"{student}-export")
        tiny, scored = Path(work) / "tiny", Path(work) / "scored"
        command("tools/convert.py", "import", "--hf", "examples/tiny/teacher", "--out", tiny)
        command("tools/select_heads.py", "--teacher", tiny, "--out", scored, *SCORE)
        (golden / "tiny-heads").mkdir()
        for name in ("scores.json", "head_map.json"):
            shutil.copyfile(scored / name, golden / "tiny-heads" / name)
    shutil.rmtree(heads / "figures", ignore_errors=True)
    (golden / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    write_logits(golden)
    pack(golden)


def write_inputs(golden: Path) -> None:
    """A Hugging Face model of random weights with a tokenizer of VOCAB words, a text and an indexed data set."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.support.stages import write_data
    from tests.support.tiny_hf import tiny_qwen3

    tiny_qwen3(golden / "hf", **SIZES)
    words = [*(f"w{number}" for number in range(VOCAB - 1)), "<end>"]  # write_data ends documents with the last one
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(golden / "hf")
    text = " ".join(words[(7 * number * number + number // 5) % (VOCAB - 1)] for number in range(600))
    (golden / "calibration.txt").write_text(text + "\n")
    write_data(golden / "tokens", VOCAB)


def write_logits(golden: Path) -> None:
    import numpy as np

    from hydra_mcore.model.build import load_model
    from hydra_mcore.model.runtime import process_groups

    folders = {name: golden / name for name in ("teacher", *STUDENTS)}
    folders |= {f"{name}-stopped": golden / f"{name}-stopped" / stage for name, stage in STOPPED.items()}
    with process_groups():
        found = {name: logits(load_model(folder)[1]) for name, folder in folders.items()}
    found |= {f"{name}-export": logits_of_export(golden / f"{name}-export") for name in STUDENTS}
    np.savez_compressed(golden / "expected.npz", **found)


def pack(golden: Path) -> None:
    """Put the models into one archive: their files are mostly the same numbers and what torch writes around each."""

    def of_nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, 0, "", ""
        entry.mode = 0o755 if entry.isdir() else 0o644
        return entry

    folders = sorted(path for path in golden.iterdir() if path.name not in PLAIN)
    with tarfile.open(golden / ARCHIVE, "w:xz", preset=9) as archive:
        for path in folders:
            archive.add(path, path.name, filter=of_nobody)
    for path in folders:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path.cwd())
