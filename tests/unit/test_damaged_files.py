# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Damaged files of every kind: what uses them works with a valid object or says one line, in bounded memory, and loses
nothing.

A bounded sample of the damage runs in the quick suite, all of it in the slow one, but for whole reports of damaged
files: these take about a second each.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from hydra_mcore.config import HydraOptions, ModelCard
from hydra_mcore.convert.hydra_family import to_config
from hydra_mcore.convert.model_card import write_model_card
from hydra_mcore.corpus.manifest import Manifest, Shard, ShardFile, expand_blend
from hydra_mcore.corpus.shards import begun
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.records import Records
from hydra_mcore.evaluation.report import check_report, write_report
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.build import build_model
from hydra_mcore.model.rotary import rotary_frequencies
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.ruler.material import PromptMaterial
from hydra_mcore.ruler.prompts import Prompt
from hydra_mcore.ruler.sets import _load, _save, draw_pairs
from hydra_mcore.ruler.wording import RULER, load_wording, read_wording
from hydra_mcore.selection.choose import choose_heads
from hydra_mcore.selection.evidence import KnockOut
from hydra_mcore.selection.figures import knock_out_curves
from hydra_mcore.selection.journal import JournalWriter, read_journal
from hydra_mcore.selection.jsonl import load_pairs
from hydra_mcore.selection.report import write_report as write_selection_report
from hydra_mcore.selection.score import HeadScores
from hydra_mcore.tokenizer import open_tokenizer
from hydra_mcore.train.checkpoint_care import VERSIONS, note_versions
from hydra_mcore.train.wandb_run import _run_record
from tests.support.damage import ODD, as_text, damaged_bytes, damaged_texts, outcome, survey
from tests.support.paths import ROOT, TINY_TEACHER
from tests.support.small_tokenizers import small_tokenizer
from tests.unit.evaluation.test_evaluation_report import STUDENT, TEACHER, keep_all
from tests.unit.selection.test_selection_report import KNOCK_OUT, made_scores
from tests.unit.test_config import FACTS, FINGERPRINT, card
from tools.commands.prepare_data import check_vocabulary

PROMPTS = [
    Prompt(np.arange(9, dtype=np.int32), 2, ("a", "b\n"), np.ones(2, np.int32), ((1, 3),), (0.25,)) for _ in range(3)
]
SCHEMA = json.loads((ROOT / "docs" / "head_map.schema.json").read_text())
QUICK = 20  # damaged forms of a file
REPORTED = 200  # of a file that a report is written of, in the slow suite

every_amount = pytest.mark.parametrize(
    "sample", [QUICK, pytest.param(None, marks=pytest.mark.slow)], ids=["sample", "all"]
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file: where a valid one is written, and what commands do with it."""

    write: Callable[[Path], Path]
    use: Callable[[Path], Any]
    dear: int = 1  # how many times fewer forms are tried in the quick suite


def write_map(folder: Path) -> Path:
    HeadMap.from_fa(
        [(0, 1), (1, 0)], 2, 4, 2, fingerprint=FINGERPRINT, model=FACTS, made_by={"seed": 3, "of": {"a": [1, 2]}}
    ).save(path := folder / "head_map.json")
    return path


def use_map(path: Path) -> None:
    """As hybridize does; what it takes, the schema takes too."""
    head_map = HeadMap.load(path)
    card().check_head_map(head_map)
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(path.read_bytes()))
    head_map.save(path.with_name("again.json"))


def write_card(folder: Path) -> Path:
    source = {
        "config": {"model_type": "qwen3", "eos_token_id": 3},
        "dtype": "bfloat16",
        "other_dtypes": {"a": "float32"},
    }
    stages = [{"stage": "align", "sequence_length": 32, "batch_size": 4, "iterations": 10}]
    whole = dataclasses.replace(card(), source=source | {"output_layer_stored": True}, stages=stages)
    whole.save(folder)
    return folder / "model.json"


def use_card(path: Path) -> None:
    found = ModelCard.load(path.parent)
    rotary_frequencies(found.shape)
    to_config(found, "bfloat16")
    write_model_card(path.parent, found, None)
    found.save(path.parent / "again")


def write_needles(folder: Path) -> Path:
    return Path(shutil.copyfile(TINY_TEACHER / "needles.json", folder / "needles.json"))


def use_needles(path: Path) -> None:
    source = PromptMaterial(small_tokenizer("byte"), read_wording(path), None).in_noise()
    list(draw_pairs("niah_single_2", 700, 1, 0, source))


def write_wording(folder: Path) -> Path:
    raw = dataclasses.asdict(RULER) | {"name": "mine", "chat": ["<user>", "<model>"]}
    (path := folder / "wording.json").write_text(json.dumps(raw))
    return path


def use_wording(path: Path) -> None:
    wording = load_wording(str(path), small_tokenizer("byte"), path.parent)
    wording.one.filled(kind="number", query="x")
    assert len(wording.digest) == 64


def write_scores(folder: Path, **size: Any) -> Path:
    given = {"pairs": 2, "observed": {"attention": np.ones((3, 4))}, "weights": {"general": 2.0}, **size}
    made_scores(**given).save(path := folder / "scores.json")
    return path


def write_few_scores(folder: Path) -> Path:
    """Every field once: more probes and pairs would only repeat the damage, and each report takes a second."""
    return write_scores(folder, pairs=1, probes={"copying": "general"})


def use_scores(path: Path) -> None:
    scores = HeadScores.load(path)
    scores.check_teacher(dataclasses.replace(teacher_of_scores(), fingerprint=scores.fingerprint))
    scores.ranking()
    scores.save(path.with_name("again.json"))


@cache
def teacher_of_scores() -> ModelCard:
    shape = made_scores().shape
    return ModelCard(shape=shape, head_map=HeadMap.all_fa(3, 4, 2), options=HydraOptions.teacher(), fingerprint="")


def report_scores(path: Path) -> None:
    scores = HeadScores.load(path)
    table, facts = scores.scores_lh.tolist(), {"made_by": {"scores": scores.settings, "weights": scores.weights}}
    choice = choose_heads(
        "global",
        scores.shape,
        3,
        scores=table,
        ranking=scores.ranking(),
        kv_budget=None,
        tp_size=1,
        every=None,
        **facts,
    )
    write_selection_report(path.parent, scores, choice, model_name="x")


def write_knock_out(folder: Path) -> Path:
    (path := folder / "knock_out.json").write_text(json.dumps(KNOCK_OUT.to_dict()))
    return path


def use_knock_out(path: Path) -> None:
    knock_out_curves(path.with_name("curves.png"), KnockOut.load(path))


RUN = {"teacher": "abc", "length": 64, "probes": ["one", "two"], "model": {"num_layers": 2}}
PIECES = {
    "one receivers 0": {"effects": [[0.1, -2e-7]], "solved": [True]},
    "one receivers 1": {"effects": [[0.5, 1]], "solved": [False]},
}


def write_journal(folder: Path) -> Path:
    journal = JournalWriter(folder, RUN, "replica0")
    for name, value in PIECES.items():
        journal.add(name, value)
    return journal.path


def use_journal(path: Path) -> None:
    """What is there is what was written, or not there; a journal can be gone on with."""
    found = read_journal(path.parent, RUN)
    assert found.items() <= PIECES.items()


def write_pairs(folder: Path) -> Path:
    pair = {"clean": "the cat sat", "corrupt": "the dog sat", "answer": "cat", "distractor": "dog"}
    (path := folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    return path


def write_manifest(folder: Path) -> Path:
    for name in ("data-00000.bin", "data-00000.idx"):
        (folder / name).write_bytes(b"x" * 8)
    files = {suffix: ShardFile(8, "0" * 64) for suffix in (".bin", ".idx")}
    run = {"source": {"files": [{"path": "a", "bytes": 3}], "text_key": "text"}, "limits": {"tokens": None}}
    Manifest(run, [Shard("data-00000", 3, 40, 9, {"empty": 1}, files, [0, 3])]).save(path := folder / "data.json")
    return path


def without_checksum(folder: Path) -> Path:
    raw = json.loads((path := write_manifest(folder)).read_text())
    path.write_text(json.dumps({key: raw[key] for key in raw if key != "checksum"}))
    return path


def use_manifest(path: Path) -> None:
    expand_blend([str(path.with_suffix(""))])
    manifest = Manifest.load(path)
    manifest.check_files(path.parent)
    assert manifest.max_id >= 0 and sum(manifest.skipped.values()) >= 0
    unfinished = path.with_name("data.unfinished.json")
    shutil.copyfile(path, unfinished)
    run = {"source": {"files": [{"path": "a", "bytes": 3}], "text_key": "text"}, "limits": {"tokens": None}}
    begun(path.with_suffix(""), run)


def write_records(folder: Path) -> Path:
    keep_all(Records(folder))
    return folder


def piece_file(pattern: str) -> Callable[[Path], Path]:
    return lambda folder: sorted((write_records(folder) / "records").glob(f"*/{pattern}"))[0]


def use_records(path: Path) -> None:
    """The report of all other records; what is damaged is asked again."""
    out = path.parents[2]
    records = Records(out)
    records.check_names([TEACHER, STUDENT])
    write_report(out, None)


def use_rows(path: Path) -> None:
    records = Records(path.parents[2])
    for row in records.rows():
        records.check_wording(list(row.scores))
    records.register([TEACHER, STUDENT])


def write_results(folder: Path) -> Path:
    write_records(folder)
    write_report(folder, None)
    return folder / "results.json"


def write_versions(folder: Path) -> Path:
    note_versions(folder)
    return folder / VERSIONS


def write_run(folder: Path) -> Path:
    (path := folder / "run.json").write_text(json.dumps({"id": "a1b2c3d4", "described": True}))
    return path


def write_vocabulary(folder: Path) -> Path:
    (path := folder / "config.json").write_text(json.dumps({"vocab_size": 100, "model_type": "x"}))
    return path


class Encoder:
    vocab_size = 50


KINDS = {
    "head map": Kind(write_map, use_map),
    "card": Kind(write_card, use_card),
    "needles": Kind(write_needles, use_needles),
    "wording": Kind(write_wording, use_wording),
    "scores": Kind(write_scores, use_scores, 2),
    "scores, reported": Kind(write_few_scores, report_scores),
    "knock-out": Kind(write_knock_out, use_knock_out, 6),
    "journal": Kind(write_journal, use_journal),
    "pairs": Kind(write_pairs, lambda path: load_pairs(small_tokenizer("byte"), path)),
    "manifest": Kind(write_manifest, use_manifest),
    "old manifest": Kind(without_checksum, use_manifest),
    "record of a model": Kind(piece_file("model.json"), use_rows, 2),
    "record of prompts": Kind(piece_file("niah*.json"), use_rows, 2),
    "record of text": Kind(piece_file("text*.json"), use_rows, 2),
    "record of a model, reported": Kind(piece_file("model.json"), use_records),
    "record of text, reported": Kind(piece_file("text*.json"), use_records),
    "results": Kind(write_results, lambda path: check_report(path.parent), 2),
    "versions": Kind(write_versions, lambda path: note_versions(path.parent)),
    "run": Kind(write_run, _run_record),
    "vocabulary": Kind(write_vocabulary, lambda path: check_vocabulary(path, Encoder())),
}


REPORTS = [kind for kind in KINDS if "reported" in kind]
OTHERS = [kind for kind in KINDS if kind not in REPORTS]


@pytest.mark.parametrize(
    ("kind", "sample"),
    [
        *(pytest.param(kind, QUICK, id=f"{kind}, sample") for kind in OTHERS),
        *(pytest.param(kind, None, id=f"{kind}, all", marks=pytest.mark.slow) for kind in OTHERS),
        *(pytest.param(kind, REPORTED, id=kind, marks=pytest.mark.slow) for kind in REPORTS),
    ],
)
def test_damage_is_one_line(tmp_path: Path, kind: str, sample: int | None) -> None:
    path, use = KINDS[kind].write(tmp_path), KINDS[kind].use
    assert outcome(lambda: use(path)) == "", "the valid file is valid"
    text = path.read_text()
    if path.suffix == ".jsonl":
        contents = [*damaged_bytes(text.encode()), *damaged_lines(text)]
        contents = contents if sample is None else contents[:: max(1, len(contents) // sample)]
    else:
        contents = damaged_texts(text, sample and max(2, sample // KINDS[kind].dear))
    assert survey(path, contents, lambda: use(path)) == []


def damaged_lines(text: str) -> Iterator[bytes]:
    """A file of JSON lines with one line's value damaged."""
    lines = text.splitlines()
    for index, line in enumerate(lines):
        for damaged in damaged_texts(line):
            yield b"\n".join(
                [
                    *(each.encode() for each in lines[:index]),
                    damaged,
                    *(each.encode() for each in lines[index + 1 :]),
                    b"",
                ]
            )


@pytest.mark.parametrize("pattern", ["model.json", "niah_single_1-512*.json", "text-200*.json", "text-200*.npy"])
def test_a_damaged_record_is_said_and_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pattern: str
) -> None:
    path = piece_file(pattern)(tmp_path)
    whole, before = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}, Records(tmp_path).rows()
    owner = next(row for row in before if row.contestant.key == path.parent.name)
    path.write_bytes(path.read_bytes()[:-20])
    records = Records(tmp_path)
    after = {row.contestant.name: row for row in records.rows()}
    kept = after.get(owner.contestant.name)
    lost = len(owner.scores) + len(owner.text) - (len(kept.scores) + len(kept.text) if kept else 0)
    assert lost == (len(owner.scores) + len(owner.text) if pattern == "model.json" else 1)
    records.rows()
    said = capsys.readouterr().err
    assert (
        said.startswith(f"a damaged record is left out, and made again where it is asked for: {path.parent}/")
        and said.count("\n") == 1
    )
    piece = next((piece for piece in (*owner.scores, *owner.text) if piece.file_name.startswith(path.stem)), None)
    assert piece is None or not records.holds(owner.contestant, piece)
    keep_all(records)  # asked again
    assert Records(tmp_path).rows() == before and capsys.readouterr().err == ""
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.name != "model.json"} == {
        file: content for file, content in whole.items() if file.name != "model.json"
    }


def arrays(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Files in the place of [2, 199] int32 token ids: of other shapes and types, pickles, archives, headers that claim
    a lot.
    """
    path = folder / "x.npy"
    right = np.zeros((2, 199), dtype=np.int32)
    for name, array in {
        "float": right.astype(float), "wide": right.astype(np.int64), "flat": right.ravel(), "longer": np.zeros((2,
            200), np.int32),
        "empty": right[:0], "texts": right.astype(str), "fields": np.zeros(2, dtype=[("a", "i4")]),
        "dates": np.zeros(2, "M8[s]"),
        "objects": np.array([[Bomb()] * 199] * 2, dtype=object), "big-endian": right.astype(">i4"),
    }.items():  # fmt: skip
        np.save(path, array, allow_pickle=True)
        yield name, path.read_bytes()
    np.savez_compressed(folder / "x.npz", a=np.zeros(1 << 24, dtype=np.int8))
    yield "archive", (folder / "x.npz").read_bytes()
    np.save(path, right)
    for shape in (
        "(2, 199000000000000)",
        "(2, -199)",
        "(2, 1e9)",
        "(2, 'x')",
        "((((((((",
        "[" * 5000,
        "(2, 199), )",
        "2",
        "()",
        "(None, 199)",
    ):
        head = f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}, }}".encode()
        head += b" " * (-(len(head) + 11) % 64) + b"\n"
        yield shape[:20], b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + right.tobytes()


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/hydra-mcore-bomb"),))


def test_arrays_that_are_no_token_ids(tmp_path: Path) -> None:
    path = piece_file("text-200*.npy")(tmp_path)
    (tmp_path / "made").mkdir()
    others = dict(arrays(tmp_path / "made"))
    for name, content in others.items():
        path.write_bytes(content)
        assert outcome(lambda: use_rows(path)) == "", name
        assert not any(path in row.likeliest.values() for row in Records(tmp_path).rows()), name
    path = piece_file("text-200*.npy")(tmp_path)
    assert any(path in row.likeliest.values() for row in Records(tmp_path).rows())
    assert survey(path, [*others.values(), *damaged_bytes(path.read_bytes(), count=10)], lambda: use_rows(path)) == []
    path.write_bytes(others["objects"])
    assert outcome(lambda: use_records(path)) == ""
    assert not Path("/tmp/hydra-mcore-bomb").exists()


def test_damaged_sets_of_prompts_are_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = PROMPTS
    _save(path := tmp_path / "set.safetensors", prompts)

    def same() -> bool:
        found = _load(path)
        return (
            found is not None
            and [vars(prompt).keys() for prompt in found] == [vars(prompt).keys() for prompt in prompts]
            and all(
                np.array_equal(getattr(a, field.name), getattr(b, field.name))
                for a, b in zip(found, prompts, strict=True)
                for field in dataclasses.fields(Prompt)
            )
        )

    assert same() and capsys.readouterr().err == ""
    content = path.read_bytes()
    for damaged in [*damaged_bytes(content, count=60), *(content[:8] + as_text(odd).encode() for odd in ODD)]:
        path.write_bytes(damaged)
        assert outcome(lambda: _load(path)) == ""
        assert same() or _load(path) is None
        if not same():
            assert capsys.readouterr().err.startswith(f"{path}: damaged (")
    path.unlink()
    path.mkdir()
    assert _load(path) is None


@every_amount
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizers_are_one_line(tmp_path: Path, name: str, sample: int | None) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_TEACHER / file, tmp_path / file)
    text = (tmp_path / name).read_text()
    contents = [
        *list(damaged_bytes(text.encode(), count=4 if sample else 100)),
        *(as_text(odd).encode() for odd in ODD),
    ]
    if name == "tokenizer_config.json":
        contents += damaged_texts(text, sample and 10)
    assert survey(tmp_path / name, contents, lambda: open_tokenizer(tmp_path)) == []


@every_amount
def test_models_of_cards_that_pass(tmp_path: Path, sample: int | None) -> None:
    """A damaged card that is taken makes a model, or says a line."""
    path, built = write_card(tmp_path), 0
    text = path.read_text()
    with process_groups():
        for content in damaged_texts(text, sample and 400, seed=1):
            path.write_bytes(content)
            try:
                found = ModelCard.load(tmp_path)
            except InputError:
                continue
            if found == dataclasses.replace(card(), stages=found.stages, source=found.source):
                continue  # nothing that a model is made of has changed
            built += 1
            assert outcome(lambda found=found: build_model(found)) == "", content[:2000]
    assert built
