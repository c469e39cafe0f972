# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The verification passes what is right, and each of its checks fails for what it is there to catch, and for nothing
else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hydra_mcore.config import HydraOptions
from hydra_mcore.convert.hf_export import export_hf
from hydra_mcore.convert.hf_import import import_hf
from hydra_mcore.convert.inherit import hybridize
from hydra_mcore.evaluation import layout_logits, subject, verification
from hydra_mcore.evaluation.verification import NAMES
from hydra_mcore.heads import HeadMap, HeadsByKind
from hydra_mcore.model import fa_heads
from hydra_mcore.model.build import load_model
from hydra_mcore.model.checkpoints import save_weights
from hydra_mcore.model.runtime import process_groups
from tests.support.paths import ROOT
from tests.support.stages import randomise
from tests.support.tiny_hf import ODD, tiny_qwen3
from tools.verify import main

LAYERS, HEADS, GROUPS = 4, ODD["num_attention_heads"], ODD["num_key_value_heads"]
SIZES = {"num_hidden_layers": LAYERS, "vocab_size": 64}  # which two ranks can share
# No FA head, one, some of uneven groups, all; others of every kind, of uneven groups too.
MIXED = (
    HeadsByKind(gdn=(1,), kda=(0, 4, 5), lightning=(2, 3)),
    HeadsByKind(fa=(4,), gdn=(0, 2), kda=(1,), lightning=(3, 5)),
    HeadsByKind(fa=(0, 1, 5), gdn=(2,), kda=(3,), lightning=(4,)),
    HeadsByKind(fa=range(HEADS)),
)
HEAD_MAP = HeadMap(num_heads=HEADS, num_kv_groups=GROUPS, layers=MIXED)
OPTIONS = HydraOptions(
    fa_log_scale="always", fa_log_scale_base=7.0, gdn_conv_kernel=3, gdn_write_max=2.0, gdn_gate="headwise",
    gdn_half_life=20.0, kda_conv_kernel=2, kda_gate="elementwise", kda_half_life=20.0, lightning_slope=0.02,
    fusion="competition",
)  # fmt: skip
ALONE = tuple(name for name in NAMES if name != "layouts")  # what needs no other processes
EXPORT = {("export", ""), ("packed", "")}


@dataclasses.dataclass(frozen=True)
class Made:
    """Folders: a Hugging Face model, the teacher imported from it, a student of random weights, the student's
    export.
    """

    hf: Path
    teacher: Path
    student: Path
    export: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("verify")
    folders = Made(root / "hf", root / "teacher", root / "student", root / "verified")
    tiny_qwen3(folders.hf, **SIZES)
    with process_groups():
        import_hf(folders.hf, folders.teacher)
        hybridize(folders.teacher, HEAD_MAP, OPTIONS, root / "fresh")
        trained(root / "fresh", folders.student)
        export_hf(folders.student, folders.export)
    return folders


def trained(fresh: Path, folder: Path, change: Callable[[torch.nn.Module], None] = randomise) -> None:
    """A checkpoint whose weights have moved away from those of ``fresh``."""
    card, model = load_model(fresh)
    with torch.no_grad():
        change(model)
    save_weights([model], dataclasses.replace(card, stage="extend"), folder)
    shutil.copyfile(fresh / "head_map.json", folder / "head_map.json")


def run(*argv: Path | str) -> tuple[int, str]:
    """Exit status and stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as stop:
        main([str(item) for item in argv])
    return int(stop.value.code or 0), said.getvalue()


def results(folder: Path, *argv: Path | str, only: tuple[str, ...] = ALONE) -> dict[tuple[str, str], dict[str, Any]]:
    """Each line of a verification, by its check and part; the exit status must say whether one failed."""
    code, said = run(*argv, "--json", folder / "found.json", "--only", *only)
    assert code < 2, said
    found = {(line["check"], line["part"]): line for line in json.loads((folder / "found.json").read_text())["results"]}
    assert code == any(line["verdict"] == "FAIL" for line in found.values())
    return found


def failed(found: dict[tuple[str, str], dict[str, Any]]) -> set[tuple[str, str]]:
    return {line for line, result in found.items() if result["verdict"] == "FAIL"}


# What is right passes


def test_a_students_checks_all_pass_on_the_command_line(made: Made, tmp_path: Path) -> None:
    """As a user sees it: one line a check and nothing else, nothing left behind, every number where float32 puts it."""
    command = [
        sys.executable,
        "tools/verify.py",
        made.student,
        "--teacher",
        made.teacher,
        "--hf",
        made.hf,
        "--json",
        tmp_path / "found.json",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "HF_MODULES_CACHE"}
    environment |= {"TMPDIR": str(tmp_path), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cores, total = os.cpu_count() or 1, len(verification.PROOFS)
    skipped = 1 + (3 if cores < 2 else 0) + (2 if cores < 4 else 0)  # the server, layouts
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{made.student}: extend, 10 FA heads of 24; 2 x 64 tokens, random (seed 0)")
    assert len(lines) == total + 2 and lines[-1] == f"{total - skipped} passed, 0 failed, {skipped} skipped"
    assert "megatron" not in done.stderr.lower() and "warning" not in done.stderr.lower()
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"], "the export and its code are gone"
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert [line["check"] for line in found] == [check.name for check in verification.PROOFS]
    numbers = [line["numbers"] for line in found if line["numbers"]]
    assert len(numbers) >= 8 and all(0 <= each["kl"] < 1e-9 and each["relative"] < 1e-4 for each in numbers)


def test_a_teachers_checks_all_pass(made: Made, tmp_path: Path) -> None:
    found = results(tmp_path, made.teacher, "--hf", made.hf, only=NAMES)
    left_out = {line for line, result in found.items() if result["verdict"] == "skipped"}
    assert not failed(found) and {check for check, _ in left_out} <= {"layouts", "served"}
    assert ("identity", "head map") not in found and ("identity", "teacher") not in found, "these are a student's"
    assert found["source", ""]["numbers"]["tokens"] == 128
    assert all(
        result["numbers"]["tokens"] == 128 + 64
        for (check, _), result in found.items()
        if check == "layouts" and result["numbers"]
    )
    assert found["padding", "left"]["numbers"]["tokens"] == sum([1, 10, 19, 28, 37, 46, 55, 64])


def test_text_by_the_checkpoints_tokenizer(tiny_teacher: Path, tmp_path: Path) -> None:
    text = ("--text", ROOT / "README.md", "--length", "96", "--sequences", "3")
    found = results(tmp_path, tiny_teacher, *text, only=("source", "export", "packed", "decode"))
    assert not failed(found) and found["export", ""]["numbers"]["tokens"] == 3 * 96
    assert found["source", ""]["verdict"] == "skipped" and "--hf" in found["source", ""]["said"]


def test_what_lacks_an_argument_is_skipped_with_the_flag_that_it_needs(made: Made, tmp_path: Path) -> None:
    found = results(tmp_path, made.student, only=("source", "all-fa", "served", "identity"))
    skipped = {line: result["said"] for line, result in found.items() if result["verdict"] == "skipped"}
    flags = ("--hf", "--teacher", "--served")
    assert {line: next(flag for flag in flags if flag in said) for line, said in skipped.items()} == {
        ("source", ""): "--hf",
        ("all-fa", ""): "--teacher",
        ("served", ""): "--served",
        ("identity", "weights"): "--teacher",
        ("identity", "teacher"): "--teacher",
    }
    assert "--teacher" in results(tmp_path, made.student, "--hf", made.hf, only=("source",))["source", ""]["said"]


# What is wrong fails


def edited_export(made: Made, folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the export with one file changed; its name is its own, because Python keeps imported code by name."""
    shutil.copytree(made.export, folder)
    text = (folder / file).read_text()
    assert text.count(old) == 1
    (folder / file).write_text(text.replace(old, new))
    return folder


BROKEN_CODE = {
    "conv_state_forgotten": (
        "gdn_heads_hydra_head.py",
        'mixed_bsc, states["conv"] = self.conv(',
        "mixed_bsc, _ = self.conv(",
        {("decode", "in steps"), ("decode", "in chunks")},
    ),
    "padding_is_written": (
        "gdn_heads_hydra_head.py",
        "        if padding is not None:\n            real_bs1 =",
        "        if False:\n            real_bs1 =",
        {("padding", "left")},
    ),
    "padding_is_attended_to": (
        "lightning_heads_hydra_head.py",
        "        if call.padding is None:\n            return self.recur",
        "        if True:\n            return self.recur",
        {("padding", "left")},
    ),
    "positions_count_right_padding": (
        "modeling_hydra_head.py",
        "(real_bt.cumsum(dim=1) - 1).clamp(min=0)[:, past:]",
        "(position_ids - (~real_bt).sum(dim=1, keepdim=True)).clamp(min=0)",
        {("padding", "right")},
    ),
}


@pytest.fixture
def whatever_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that is not this version's runs too: these tests plant in it the faults that a version of ours might
    have.
    """
    monkeypatch.setattr(subject, "check_model_code", lambda *_: None)


@pytest.mark.usefixtures("whatever_code")
@pytest.mark.parametrize("name", BROKEN_CODE)
def test_broken_code_in_the_export(made: Made, tmp_path: Path, name: str) -> None:
    file, old, new, expected = BROKEN_CODE[name]
    export = edited_export(made, tmp_path / name, file, old, new)
    assert failed(results(tmp_path, made.student, "--teacher", made.teacher, "--export", export)) == expected


@pytest.mark.usefixtures("whatever_code")
def test_code_that_raises_is_a_failure_not_a_traceback(made: Made, tmp_path: Path) -> None:
    old = "        if padding is not None:\n            x_bsc = "
    export = edited_export(
        made,
        tmp_path / "raising",
        "gdn_heads_hydra_head.py",
        old,
        old.replace("x_bsc = ", "raise ValueError('planted')#"),
    )
    found = results(tmp_path, made.student, "--export", export)
    assert failed(found) == {("padding", "left"), ("padding", "right")}
    assert found["padding", "left"]["said"] == "ValueError: planted"


def test_a_wrong_weight_in_the_export(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.export, tmp_path / "wrong_weight")
    file = tmp_path / "wrong_weight" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.2.self_attn.gdn.conv.weight"][0, 0, 0] += 0.5  # one number of the whole model
    save_file(weights, file, metadata={"format": "pt"})
    found = results(tmp_path, made.student, "--export", tmp_path / "wrong_weight")
    assert failed(found) == EXPORT and found["export", ""]["numbers"]["kl"] > 1e-6


def test_an_export_that_was_rounded_says_so(made: Made, tmp_path: Path) -> None:
    with process_groups():
        export_hf(made.student, tmp_path / "rounded", torch.bfloat16)
    found = results(tmp_path, made.student, "--export", tmp_path / "rounded")
    assert (
        failed(found) == EXPORT
        and "is bfloat16 in" in found["export", ""]["said"]
        and "float32 in the checkpoint" in found["export", ""]["said"]
    )


def test_documents_that_see_each_other(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that go on over the end of a document: the log-position scale of FA queries shows them."""
    monkeypatch.setattr(fa_heads, "positions", lambda part, device: torch.arange(part.num_tokens, device=device))
    assert failed(results(tmp_path, made.student, "--export", made.export)) == {("packed", "")}


def test_an_inheritance_that_misplaces_a_column(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def misplacing(teacher: torch.nn.Module, student: torch.nn.Module) -> None:
        inherit(teacher, student)
        with torch.no_grad():
            weight = student.decoder.layers[1].self_attention.linear_proj.weight
            weight[:, [0, 1]] = weight[:, [1, 0]]

    inherit = verification.inherit
    monkeypatch.setattr(verification, "inherit", misplacing)
    assert failed(results(tmp_path, made.student, "--teacher", made.teacher, "--hf", made.hf)) == {("all-fa", "")}


@pytest.fixture(scope="module")
def other(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Another teacher of the same shape, and where it came from."""
    root = tmp_path_factory.mktemp("other")
    shutil.copytree(made.hf, root / "hf")
    weights = load_file(root / "hf" / "model.safetensors")
    weights["model.layers.3.self_attn.v_proj.weight"][0] *= 1.5
    save_file(weights, root / "hf" / "model.safetensors", metadata={"format": "pt"})
    with process_groups():
        import_hf(root / "hf", root / "teacher")
    return dataclasses.replace(made, hf=root / "hf", teacher=root / "teacher")


def test_another_teacher(made: Made, other: Made, tmp_path: Path) -> None:
    found = results(tmp_path, made.student, "--teacher", other.teacher, "--hf", other.hf)
    assert failed(found) == {("identity", "teacher")} and "weights" in found["identity", "teacher"]["said"]


def test_another_source(made: Made, other: Made, tmp_path: Path) -> None:
    found = results(tmp_path, made.teacher, "--hf", other.hf)
    assert failed(found) == {("source", "")} and found["source", ""]["numbers"]["kl"] > 1e-6
    tiny_qwen3(tmp_path / "wider", **SIZES, intermediate_size=60)
    found = results(tmp_path, made.teacher, "--hf", tmp_path / "wider")
    assert failed(found) == {("source", "")}
    assert found["source", ""]["said"].endswith("is another model: ffn_hidden_size is 60 there, 56 in the teacher")


def test_a_teacher_that_was_rounded_is_not_its_source(made: Made, tmp_path: Path) -> None:
    with process_groups():
        import_hf(made.hf, tmp_path / "teacher", torch.bfloat16)
    found = results(tmp_path, tmp_path / "teacher", "--hf", made.hf)
    assert failed(found) == {("source", "")} and "is float32 in" in found["source", ""]["said"]
    assert found["identity", "weights"]["verdict"] == "skipped"
    assert "float32 values were rounded to bfloat16" in found["identity", "weights"]["said"]


def edited_json(source: Path, folder: Path, name: str, *keys: str | int, value: Any) -> Path:
    """A copy of a folder with one value of one of its JSON files changed."""
    shutil.copytree(source, folder)
    whole = place = json.loads((folder / name).read_text())
    for key in keys[:-1]:
        place = place[key]
    assert place[keys[-1]] != value
    place[keys[-1]] = value
    (folder / name).write_text(json.dumps(whole))
    return folder


def test_a_wrong_fingerprint_on_the_card(made: Made, tmp_path: Path) -> None:
    teacher = edited_json(made.teacher, tmp_path / "teacher", "model.json", "fingerprint", value="0" * 64)
    found = results(tmp_path, teacher, "--hf", made.hf)
    assert failed(found) == {("identity", "weights")}
    assert found["identity", "weights"]["said"].endswith("the card says 000000000000")


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("layers", 1), {"fa": [0], "gdn": [1, 2, 3, 4, 5]}, "layer 1 has FA heads 0, the card says 4"),
        (("fingerprint",), "1" * 64, "111111111111, the card says"),
    ],
    ids=["heads", "fingerprint"],
)
def test_another_head_map_beside_the_checkpoint(made: Made, tmp_path: Path, keys: tuple, value: Any, said: str) -> None:
    student = edited_json(made.student, tmp_path / "student", "head_map.json", *keys, value=value)
    found = results(tmp_path, student, "--teacher", made.teacher, "--export", made.export)
    assert failed(found) == {("identity", "head map")} and said in found["identity", "head map"]["said"]


@pytest.mark.parametrize(
    ("keys", "value", "expected"),
    [
        (("teacher", "fingerprint"), "2" * 64, {("identity", "export")}),
        (("gdn_write_max",), 1.5, {("identity", "export"), *EXPORT}),
    ],
    ids=["fingerprint", "option"],
)
def test_an_export_that_says_something_else(
    made: Made, tmp_path: Path, keys: tuple[str], value: Any, expected: set
) -> None:
    export = edited_json(made.export, tmp_path / f"says_{keys[-1]}", "config.json", *keys, value=value)
    assert failed(results(tmp_path, made.student, "--teacher", made.teacher, "--export", export)) == expected


def test_a_tensor_that_is_not_finite(made: Made, tmp_path: Path) -> None:
    def spoil(model: torch.nn.Module) -> None:
        model.decoder.layers[0].mlp.linear_fc2.weight[3, 4] = float("nan")

    with process_groups():
        trained(made.student, tmp_path / "student", spoil)
    found = results(
        tmp_path, tmp_path / "student", "--teacher", made.teacher, "--export", made.export, only=("identity", "export")
    )
    assert failed(found) == {("identity", "finite"), ("export", "")}
    assert found["identity", "finite"]["said"] == "tensor decoder.layers.0.mlp.linear_fc2.weight holds NaN or infinity"
    assert found["export", ""]["numbers"]["kl"] is None, "JSON has no NaN"


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="the verification starts no ranks on one core")
def test_layouts_that_break(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks run a copy of the package in which pipelines raise and context parallel parts start from nothing."""
    shutil.copytree(ROOT / "hydra_mcore", tmp_path / "hydra_mcore", ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in (
        ("ops/context_parallel.py", "return state_bhdv", "return 0 * state_bhdv"),
        (
            "model/build.py",
            "    transformer = transformer_config(",
            "    assert groups.pp.size() == 1, 'planted'\n    transformer = transformer_config(",
        ),
    ):
        text = (tmp_path / "hydra_mcore" / name).read_text()
        assert old in text
        (tmp_path / "hydra_mcore" / name).write_text(text.replace(old, new))
    monkeypatch.setattr(layout_logits, "ROOT", tmp_path)
    found = results(tmp_path, made.student, only=("layouts",))
    assert {("layouts", "PP 2"), ("layouts", "CP 2")} <= failed(found) and found["layouts", "TP 2"]["verdict"] == "pass"
    assert found["layouts", "PP 2"]["said"] == "the ranks failed: AssertionError: planted"
    assert found["layouts", "CP 2"]["numbers"]["kl"] > 1e-6


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="the verification starts no ranks on one core")
def test_ranks_that_never_answer(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_logits, "LAUNCH_SECONDS", 0.1)
    found = results(tmp_path, made.student, only=("layouts",))
    assert {("layouts", "TP 2"), ("layouts", "PP 2"), ("layouts", "CP 2")} <= failed(found)
    assert found["layouts", "TP 2"]["said"] == "the ranks failed: no answer within 0.1 seconds"


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="the verification starts no ranks on one core")
def test_ranks_that_are_killed(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "hydra_mcore" / "evaluation" / "layout_logits.py"
    module.parent.mkdir(parents=True)
    for package in module.parents[:2]:
        (package / "__init__.py").touch()
    module.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(layout_logits, "ROOT", tmp_path)
    said = results(tmp_path, made.student, only=("layouts",))["layouts", "TP 2"]["said"]
    assert said.startswith("the ranks failed: rank ") and said.endswith(
        " was ended by SIGKILL; is there enough memory?"
    )
