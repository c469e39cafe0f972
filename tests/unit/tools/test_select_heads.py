# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The head selection command: its files, re-used scores, runs that were stopped, and one clear line for what it cannot
use.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hydra_mcore.config import ModelCard
from hydra_mcore.heads import HeadMap
from hydra_mcore.ruler.needle_format import NeedleFormat
from hydra_mcore.selection.evidence import spearman
from hydra_mcore.selection.head_scoring import identity, needle_material, probes
from hydra_mcore.selection.journal import JournalWriter, read_journal
from hydra_mcore.selection.score import HeadScores
from tests.support.commands import ended
from tests.support.paths import ROOT, TINY_TEACHER
from tools.select_heads import main, parser

SMALL = ["--length", "128", "--pairs", "2"]


def run(teacher: Path, out: Path, *flags: str) -> Path:
    main(["--teacher", str(teacher), "--out", str(out), *flags])
    return out


def scores_of(folder: Path) -> HeadScores:
    return HeadScores.load(folder / "scores.json")


def fa_heads(folder: Path) -> list[tuple[int, int]]:
    layers = HeadMap.load(folder / "head_map.json").layers
    return [(layer_idx, head) for layer_idx, layer in enumerate(layers) for head in layer["fa"]]


def kinds_by_layer(folder: Path) -> list[str]:
    """Of a map whose layers have one kind each."""
    return [kind for layer in HeadMap.load(folder / "head_map.json").layers for (kind,) in [tuple(layer)]]


@pytest.fixture(scope="module")
def selected(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first selection with everything: two pairs of 128 tokens a sub-probe, 96 tokens beside it, knock-out curves."""
    return run(
        tiny_teacher, tmp_path_factory.mktemp("runs") / "heads", *SMALL, "--also-lengths", "96", "--knock-out", "1"
    )


def test_files_for_this_teacher(tiny_teacher: Path, selected: Path) -> None:
    names = ["figures", "head_map.json", "knock_out.json", "report.html", "scores.json", "scores_96.json"]
    assert sorted(file.name for file in selected.iterdir()) == names
    assert (selected / "figures" / "heads.png").read_bytes().startswith(b"\x89PNG")
    card, head_map, scores = (
        ModelCard.load(tiny_teacher),
        HeadMap.load(selected / "head_map.json"),
        scores_of(selected),
    )
    card.check_head_map(head_map)
    scores.check_teacher(card)
    assert head_map.num_fa * 4 == card.shape.num_layers * card.shape.num_heads and all(
        layer["fa"] for layer in head_map.layers
    )
    assert scores.scores_lh.max() > 0.5  # some head of a teacher that retrieves does carry retrieval
    assert head_map.made_by["ratio"] == "3:1" and head_map.made_by["scores"]["length"] == 128
    assert head_map.model == dataclasses.asdict(card.shape) and "torch" in head_map.made_by["versions"]
    assert set(scores.by_capability) == {"retrieval", "general"}
    assert set(scores.observed) == {
        "attention mass",
        "retrieval head",
        "attribution, receivers",
        "attribution, senders",
    }
    curves = json.loads((selected / "knock_out.json").read_text())
    assert curves["prompts"] == 5 and curves["accuracy"]["best first"][0][-1] == 0.0


def test_the_report_tells_what_was_found(selected: Path) -> None:
    page = (selected / "report.html").read_text()
    for text in (
        "niah_single_1",
        "copying",
        "global_c",
        "128",
        "96",
        HeadMap.load(selected / "head_map.json").fingerprint[:12],
    ):
        assert text in page


def test_scores_serve_other_choices_without_the_model(
    tiny_teacher: Path, selected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_mcore.selection.head_scoring.load_model", None)
    known = ("--scores", str(selected / "scores.json"))
    scores = scores_of(selected)
    two = run(tiny_teacher, tmp_path / "two", "--budget", "2", "--strategy", "global", *known)
    assert fa_heads(two) == sorted(scores.ranking()[:2])
    assert (two / "knock_out.json").is_file() and (two / "scores_96.json").is_file()  # the evidence comes along
    few = run(tiny_teacher, tmp_path / "few", "--strategy", "kv_groups", "--kv-groups", "4", *known)
    assert len(fa_heads(few)) == 8 and len({(layer, head // 2) for layer, head in fa_heads(few)}) == 4
    even = run(tiny_teacher, tmp_path / "even", "--strategy", "tp", "--ranks", "4", *known)
    assert {len(layer["fa"]) % 4 for layer in HeadMap.load(even / "head_map.json").layers} == {0}
    retrieval = run(tiny_teacher, tmp_path / "retrieval", "--weight", "general=0", *known)
    fused = HeadScores.load(retrieval / "scores.json")
    np.testing.assert_allclose(
        fused.scores_lh, fused.by_capability["retrieval"][0] / fused.by_capability["retrieval"][0].max(), atol=1e-9
    )


def test_random_and_layer_wise_maps_need_no_scores(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_mcore.selection.head_scoring.load_model", None)
    out = run(tiny_teacher, tmp_path / "random", "--strategy", "layer_random", "--seed", "7")
    assert sorted(file.name for file in out.iterdir()) == ["figures", "head_map.json"]
    assert HeadMap.load(out / "head_map.json").made_by == {"tool": "select_heads", "seed": 7, "ratio": "3:1"}
    hybrid = run(tiny_teacher, tmp_path / "hybrid", "--strategy", "hybrid", "--every", "2")
    assert [len(layer["fa"]) for layer in HeadMap.load(hybrid / "head_map.json").layers] == [0, 8, 0, 8]


def test_other_heads_become_what_is_asked_for(
    tiny_teacher: Path,
    selected: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From known scores: the same heads are kept, the report and the map say what the others become."""
    monkeypatch.setattr("hydra_mcore.selection.head_scoring.load_model", None)
    known = ("--scores", str(selected / "scores.json"), "--linear", "kda", "1-2=gdn", "3=lightning")
    mixed = HeadMap.load(run(tiny_teacher, tmp_path / "mixed", *known) / "head_map.json")
    said = "Kimi Delta Attention (KDA) heads in layer 0, Gated DeltaNet (GDN) heads in layers 1 to 2, Lightning"
    assert f"the others become {said} attention (Lightning) heads in layer 3\n" in capsys.readouterr().out
    plain = HeadMap.load(selected / "head_map.json")
    assert mixed.heads_of("fa") == plain.heads_of("fa") and mixed.layers[1:3] == plain.layers[1:3]
    assert [list(mixed.layers[at]) for at in (0, 3)] == [["fa", "kda"], ["fa", "lightning"]]
    page = re.sub(r"<.*?>", "", (tmp_path / "mixed" / "report.html").read_text())
    assert "linear" not in plain.made_by and mixed.made_by["linear"] == "kda 1-2=gdn 3=lightning"
    assert "map: linearkda 1-2=gdn 3=lightning" in page and f"the other 24 become {said}" in page


def test_other_heads_of_a_recipe(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a list or a word; what the command line says wins; a map that is there stays."""
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "listed"
    section = f"teacher: {tiny_teacher}, strategy: hybrid, out: {out}"
    recipe.write_text(f"select: {{{section}, linear: [kda, 1-2=gdn]}}")
    main(["--config", str(recipe), "--dry-run"])
    said = "Kimi Delta Attention (KDA) heads in layer 0, Gated DeltaNet (GDN) heads in layers 1 to 2, Kimi"
    assert f"would keep 8 of 32 heads (hybrid), the others become {said}" in capsys.readouterr().out
    assert not out.exists()
    main(["--config", str(recipe)])
    assert kinds_by_layer(out) == ["kda", "gdn", "gdn", "fa"]
    recipe.write_text(f"select: {{{section}, linear: kda}}")
    main(["--config", str(recipe), "--skip-existing"])
    assert kinds_by_layer(out) == ["kda", "gdn", "gdn", "fa"]
    main(["--config", str(recipe), "--out", str(tmp_path / "word")])
    assert kinds_by_layer(tmp_path / "word") == ["kda", "kda", "kda", "fa"]
    main(["--config", str(recipe), "--out", str(tmp_path / "flag"), "--linear", "gdn"])
    assert kinds_by_layer(tmp_path / "flag") == ["gdn", "gdn", "gdn", "fa"]


def test_documented_kinds_of_other_heads(tiny_teacher: Path, selected: Path, tmp_path: Path) -> None:
    """The commands of docs/selection.md that name kinds, and HypeNet's recipe: whole layers, the others Lightning."""
    text = re.sub(r" \\\n +", " ", (ROOT / "docs" / "selection.md").read_text())
    layer_wise, mixed = re.findall(r"^ +python tools/select_heads\.py (.*--linear .*)$", text, re.MULTILINE)
    known = ("--scores", str(selected / "scores.json"))
    run(tiny_teacher, tmp_path / "mixed", *known, *without_paths(mixed))
    layers = HeadMap.load(tmp_path / "mixed" / "head_map.json").layers
    assert [list(layer) for layer in layers] == [["fa", kind] for kind in ("lightning", "lightning", "kda", "gdn")]
    run(tiny_teacher, tmp_path / "layers", *without_paths(layer_wise))
    recipes = [str(ROOT / "examples" / "qwen3-1.7b" / name) for name in ("recipe.yaml", "hypenet.yaml")]
    run(tiny_teacher, tmp_path / "recipe", "--config", *recipes)
    hypenet = ["lightning", "lightning", "lightning", "fa"]
    assert kinds_by_layer(tmp_path / "layers") == kinds_by_layer(tmp_path / "recipe") == hypenet


def without_paths(command: str) -> list[str]:
    teacher, teacher_path, out, out_path, *flags = command.split()
    assert (
        (teacher, out) == ("--teacher", "--out") and teacher_path.startswith("runs/") and out_path.startswith("runs/")
    )
    return flags


def test_heads_that_a_linear_head_can_imitate_are_not_kept(
    tiny_teacher: Path,
    selected: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By effect the previous-token heads of the first layer come first, by product the heads that look far back."""
    few = ("--budget", "2", "--strategy", "global")
    asked = ("--score", "product", "--linear", "lightning", "--capabilities", "retrieval", "--knock-out", "0")
    product = run(tiny_teacher, tmp_path / "product", *SMALL, *few, *asked)
    monkeypatch.setattr("hydra_mcore.selection.head_scoring.load_model", None)
    known = ("--scores", str(product / "scores.json"), *few, "--linear", "lightning")
    effect = run(tiny_teacher, tmp_path / "effect", *known)
    assert ({layer for layer, _ in fa_heads(product)}, {layer for layer, _ in fa_heads(effect)}) == ({1}, {0})
    again = run(tiny_teacher, tmp_path / "again", *known, "--score", "product")
    assert fa_heads(again) == fa_heads(product) and HeadMap.load(again / "head_map.json").made_by["score"] == "product"
    residual_lh = scores_of(product).replaceability["lightning"].residual
    residual = run(tiny_teacher, tmp_path / "residual", *known, "--score", "replaceable")
    assert sorted(residual_lh[at] for at in fa_heads(residual)) == sorted(residual_lh.ravel())[-2:]
    other = ("--teacher", str(tiny_teacher), "--out", str(tmp_path / "no"), *known[:-1], "gdn", "--score", "product")
    code, said = ended(main, other)
    assert code == 2 and "by gdn; score the teacher with --replaceable-by gdn" in said
    assert not (tmp_path / "no").exists()


def test_a_capability_of_ones_own(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = NeedleFormat.load(TINY_TEACHER / "needles.json").value_pieces[:12]
    line = "".join(words[:8])
    pairs = [(line + line[: line.index(words[at])], words[at], words[at + 4]) for at in range(4, 8)]
    file = tmp_path / "mine.jsonl"
    made = (
        {"clean": text, "corrupt": text.replace(word, other, 1), "answer": word, "distractor": other}
        for text, word, other in pairs
    )
    file.write_text("".join(json.dumps(pair) + "\n" for pair in made))
    out = run(
        tiny_teacher,
        tmp_path / "out",
        "--probe",
        f"lists={file}",
        "--capabilities",
        "retrieval",
        "--knock-out",
        "0",
        *SMALL,
    )
    scores = HeadScores.load(out / "scores.json")
    assert scores.probes["mine"].capability == "lists" and scores.probes["mine"].used >= 2
    assert "mine (lists)" in capsys.readouterr().out and not (out / "knock_out.json").exists()


def test_what_makes_a_scoring_run_another_one(tiny_teacher: Path, tmp_path: Path) -> None:
    """Another distractor gives other effects from the same prompts, so its pieces must not be taken for these."""
    card, file = ModelCard.load(tiny_teacher), tmp_path / "mine.jsonl"
    found = set()
    for distractor in (" 34", " 56"):
        file.write_text(
            json.dumps({"clean": " # river 12", "corrupt": " # river 78", "answer": " 12", "distractor": distractor})
        )
        args = parser().parse_args(
            ["--teacher", str(tiny_teacher), "--out", str(tmp_path), "--capabilities", "--probe", f"mine={file}"]
        )
        found.add(identity(args, card, probes(args, needle_material(args), 64), 64)["prompts_sha256"])
    assert len(found) == 2
    facts = list(identity(args, card, {}, 64))
    assert facts.index("generator") < facts.index("prompts_sha256")  # so that it is what a journal says first


@pytest.mark.slow
def test_quick_and_rough_ways_rank_alike(tiny_teacher: Path, selected: Path, tmp_path: Path) -> None:
    exact = scores_of(selected)
    rough = HeadScores.load(
        run(tiny_teacher, tmp_path / "rough", "--method", "attribution", "--knock-out", "0", *SMALL) / "scores.json"
    )
    assert rough.settings["method"] == "attribution" and spearman(exact.scores_lh, rough.scores_lh) > 0.7
    half = HeadScores.load(
        run(tiny_teacher, tmp_path / "half", "--dtype", "bf16", "--knock-out", "0", *SMALL) / "scores.json"
    )
    assert half.settings["dtype"] == "bf16" and spearman(exact.effects_lh, half.effects_lh) > 0.9


def test_dry_run_writes_nothing(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny_teacher, tmp_path / "out", "--dry-run", "--pairs", "3", "--length", "512")
    shown = capsys.readouterr().out
    assert "32 heads on 24 pairs of up to 512 tokens" in shown and "two rounds of senders" in shown
    assert "would keep 8 of 32 heads (global_c), the others become Gated DeltaNet (GDN) heads\n" in shown
    assert not (tmp_path / "out").exists()


def test_a_stopped_run_goes_on_and_loses_no_finished_piece(tiny_teacher: Path, selected: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "tools/select_heads.py",
        "--teacher",
        str(tiny_teacher),
        "--out",
        str(out),
        *SMALL,
        "--knock-out",
        "1",
    ]
    journal = out / "unfinished" / "128"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (kept := sum(len(file.read_text().splitlines()) - 1 for file in journal.glob("*.jsonl"))) > 12:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "head_map.json").exists()
    (file,) = journal.glob("*.jsonl")
    facts = json.loads(file.read_text().splitlines()[0])
    pieces = read_journal(journal, facts)
    assert len(pieces) >= kept - 1
    with pytest.raises(SystemExit):
        run(tiny_teacher, out, *SMALL, "--seed", "1")  # another run must not mix in
    marked = {name: value for name, value in pieces.items() if "receivers" in name}
    for value in marked.values():  # a trace that only pieces taken from the journal leave
        value["clean"] = [metric + 1000.0 for metric in value["clean"]]
    file.unlink()
    journal_again = JournalWriter(journal, facts, file.stem)
    for name, value in pieces.items():
        journal_again.add(name, value)
    run(tiny_teacher, out, *SMALL, "--knock-out", "1")
    resumed, whole = HeadScores.load(out / "scores.json"), scores_of(selected)
    for name, probe in whole.probes.items():
        shift = 1000.0 if any(piece.startswith(f"{name} receivers") for piece in marked) else 0.0
        np.testing.assert_allclose(resumed.probes[name].clean_b, probe.clean_b + shift, rtol=1e-4)
    assert marked and not (out / "unfinished").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ratio", "3"], "ratio '3': write linear heads to FA heads"),
        (["--budget", "33", "--strategy", "global"], "budget 33: choose 0 to 32 heads"),
        (["--ratio", "31:1"], "global_c keeps one in each of 4 layers"),
        (["--seed", "1000000"], "seed 1000000"),
        (["--scores", "nowhere.json"], "scores nowhere.json: No such file"),
        (["--length", "4"], "4 tokens"),
        (["--length", "0"], "0 tokens"),
        (["--pairs", "0"], "0 pairs"),
        (["--length", "128", "--also-lengths", "128"], "--also-lengths 128: is scored already"),
        (["--knock-out", "-1"], "--knock-out -1: give a number"),
        (["--text", "nowhere.txt"], "text nowhere.txt: No such file"),
        (["--template", "nowhere.json"], "template nowhere.json: No such file"),
        (["--probe", "law"], "--probe law: write the name"),
        (["--probe", "law=nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--weight", "retrieval=much"], "--weight retrieval=much: write a capability and a number"),
        (["--weight", "retrival=2"], "--weight retrival=2: no such capability; scored are retrieval, general"),
        (["--kv-groups", "3"], "--kv-groups belongs to --strategy kv_groups, not to global_c"),
        (["--strategy", "kv_groups", "--kv-groups", "3"], "kv budget 3: choose 4 to 16 kv groups"),
        (["--strategy", "tp"], "--strategy tp needs --ranks"),
        (["--strategy", "tp", "--ranks", "3"], "3"),
        (["--strategy", "hybrid", "--every", "9"], "every 9: choose 1 to 4"),
        (["--strategy", "hybrid", "--budget", "9"], "9"),
        (["--linear", "fa"], "linear 'fa': 'fa' is no kind of linear heads; choose one of gdn"),
        (["--linear", "gdn", "4=gdn"], "linear '4=gdn': there is no layer 4; layers are 0 to 3"),
        (["--linear", "0-2=gdn", "2=gdn"], "linear '2=gdn': layer 2 has the kind gdn already"),
        (["--strategy", "hybrid", "--linear", "gdn", "3-1=gdn"], "linear '3-1=gdn': write a layer, or the first and"),
        (["--tensor-model-parallel-size", "2"], "1 processes are no multiple of 2 tensor-parallel"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    flags: list[str], message: str, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as stop:
            run(tiny_teacher, tmp_path / "out", *flags, *extra)
        last = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and last.startswith("select_heads: ") and message in last
        assert not (tmp_path / "out").exists()


def test_what_is_no_teacher_and_what_is_taken(
    tiny_teacher: Path, selected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = ModelCard.load(tiny_teacher)
    student = dataclasses.replace(card, head_map=HeadMap.load(selected / "head_map.json"))
    other = dataclasses.replace(card, fingerprint="0" * 64)
    turned = dataclasses.replace(card, shape=dataclasses.replace(card.shape, rope_theta=5e5))
    for name, made in (("student", student), ("other", other), ("turned", turned)):
        made.save(tmp_path / name)
    known = ["--scores", str(selected / "scores.json")]
    for folder, out, flags, message in (
        (tmp_path, tmp_path / "out", [], "not a hydra_mcore checkpoint"),
        (tmp_path / "student", tmp_path / "out", [], "only 8 of 32 heads are full attention; give the teacher"),
        (tmp_path / "other", tmp_path / "out", known, "000000000000 in the teacher; score this teacher anew"),
        (tmp_path / "turned", tmp_path / "out", known, "rope_theta is"),
        (
            tiny_teacher,
            tmp_path / "out",
            [*known, "--weight", "retrival=2"],
            "retrival: no such capability; scored are general, retrieval",
        ),
        (tiny_teacher, selected, [], "already holds a head_map.json"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(folder, out, *flags)
        assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
