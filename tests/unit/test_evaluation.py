# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores equal what decoding token by token gives, losses what a float64 loop gives; one exam for all models."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape
from hydra_mcore.evaluation import report
from hydra_mcore.evaluation.evaluate import Exam, Results, take_exam
from hydra_mcore.evaluation.forward import TOKENS_A_FORWARD, logits_at
from hydra_mcore.evaluation.perplexity import TEXT_TOKENS, TextLoss, text_loss, text_windows
from hydra_mcore.evaluation.scoring import TASK_GROUPS, Score, answers_right, needle_prompts
from hydra_mcore.heads import HeadMap, InputError
from hydra_mcore.model.build import build_model, save_weights, teacher_card
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.selection.needles import TASKS, NeedleFormat, NeedlePrompt
from tools.evaluate import main

TEACHER = Path(__file__).parents[2] / "examples" / "tiny" / "teacher"
SEED, VOCAB, LENGTH = 1_000_000, 1024, 64
SHAPE = ModelShape(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_groups=2,
    head_dim=8,
    ffn_hidden_size=48,
    vocab_size=VOCAB,
    native_length=48,
    rope_theta=1e4,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(TEACHER)


@pytest.fixture(scope="module")
def fmt() -> NeedleFormat:
    return NeedleFormat.load(TEACHER / "needles.json")


@pytest.fixture(scope="module")
def text(tokenizer) -> np.ndarray:
    source = Path(dataclasses.__file__).read_text(encoding="utf-8")
    return np.asarray(tokenizer.encode(source, add_special_tokens=False), dtype=np.int64)


@pytest.fixture
def groups():
    with process_groups():
        yield


def random_student(options: HydraOptions | None = None) -> tuple[ModelCard, torch.nn.Module]:
    """A hybrid model whose logits vary with position and content."""
    head_map = HeadMap.from_fa([(0, 1), (1, 0), (1, 3)], SHAPE.num_layers, SHAPE.num_heads, SHAPE.num_kv_groups)
    card = dataclasses.replace(teacher_card(SHAPE, "f"), head_map=head_map, options=options or HydraOptions())
    return card, random_model(card)


def random_model(card: ModelCard) -> torch.nn.Module:
    model = build_model(card).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return model


class Knower(torch.nn.Module):
    """Says the next token of the texts it was shown, except where told to err; elsewhere it says token 0."""

    def __init__(self, texts: list[np.ndarray], errs: dict[int, int], says_at: slice) -> None:
        super().__init__()
        self.output_layer = torch.nn.Linear(VOCAB, VOCAB, bias=False)
        torch.nn.init.eye_(self.output_layer.weight)
        self.batches: list[int] = []
        self.said = {}
        for index, ids in enumerate(texts):
            said = np.zeros_like(ids)
            said[:-1][says_at] = ids[1:][says_at]
            if index in errs:
                said[errs[index]] = (said[errs[index]] + 1) % VOCAB
            self.said[ids.tobytes()] = said

    def forward(self, ids_bs, position_ids_bs, mask):
        assert mask is None and torch.equal(position_ids_bs, torch.arange(ids_bs.shape[1]).expand_as(ids_bs))
        self.batches.append(len(ids_bs))
        said_bs = torch.from_numpy(np.stack([self.said[ids.numpy().tobytes()] for ids in ids_bs]))
        hidden_sbm = torch.nn.functional.one_hot(said_bs, VOCAB).float().transpose(0, 1)
        return self.output_layer(hidden_sbm).transpose(0, 1)


def scored(model, prompts) -> list[bool]:
    return [right for batch in answers_right(model, prompts) for right in batch]


def test_right_means_every_answer_token_and_only_those(tokenizer, fmt, text):
    prompts = needle_prompts("niah_single_3", fmt, tokenizer, text, LENGTH, 70, SEED)
    start, last = prompts[0].answer_start, LENGTH - 2
    answer = slice(start - 1, LENGTH - 1)  # the tokens before, and the last one, predict nothing that counts
    errs = {3: start - 1, 65: last, 69: start}  # in the first and the second batch
    model = Knower([p.ids for p in prompts], errs, answer)
    assert scored(model, prompts) == [index not in errs for index in range(70)]
    assert model.batches == [64, 6], f"{TOKENS_A_FORWARD} tokens a forward"
    short_sighted = Knower([p.ids for p in prompts], {}, slice(start, LENGTH - 1))  # misses the first answer token
    assert scored(short_sighted, prompts) == [False] * 70


def greedy(model, ids: np.ndarray, count: int) -> np.ndarray:
    """Decoding as it is meant: one token after the other, each from a full forward pass."""
    ids_bs = torch.from_numpy(ids)[None]
    for _ in range(count):
        with torch.no_grad():
            logits_bsw = model(ids_bs, torch.arange(ids_bs.shape[1])[None], None)
        ids_bs = torch.cat([ids_bs, logits_bsw[:, -1:].argmax(-1)], dim=1)
    return ids_bs[0, -count:].numpy()


def with_answer(prompt: NeedlePrompt, answer: np.ndarray) -> NeedlePrompt:
    return dataclasses.replace(prompt, ids=np.concatenate([prompt.ids[: prompt.answer_start], answer]))


def test_one_forward_equals_greedy_decoding(groups, tokenizer, fmt, text):
    _, model = random_student()
    prompts = needle_prompts("niah_single_3", fmt, tokenizer, text, LENGTH, 8, SEED)
    count = len(prompts[0].answer)
    decoded = [greedy(model, p.ids[: p.answer_start], count) for p in prompts]
    assert len({tuple(ids) for ids in decoded}) > 1, "one answer to all would prove little"
    # What the model does decode is right, the true answers (of which it knows nothing) are not, nor is any near miss.
    asked, expected = list(prompts), [bool((p.answer == ids).all()) for p, ids in zip(prompts, decoded, strict=True)]
    for prompt, ids in zip(prompts, decoded, strict=True):
        asked.append(with_answer(prompt, ids))
        expected.append(True)
        for place in range(count):
            near = ids.copy()
            near[place] = (near[place] + 1) % VOCAB
            asked.append(with_answer(prompt, near))
            expected.append(False)
    assert expected.count(True) == 8
    assert scored(model, asked) == expected


def test_logits_only_where_asked(groups):
    _, model = random_student()
    ids_bs = torch.randint(VOCAB, (2, 40))
    with torch.no_grad():
        full = model(ids_bs, torch.arange(40).expand_as(ids_bs), None)
    torch.testing.assert_close(logits_at(model, ids_bs, slice(30, 39)), full[:, 30:39], rtol=0, atol=1e-5)
    with pytest.raises(IndexError):
        logits_at(model, ids_bs + VOCAB, slice(0, 1))
    assert not model.output_layer._forward_pre_hooks


def test_rotary_reaches_beyond_the_native_length(groups):
    """A model answers at any length as one whose native length is larger would."""
    logits = []
    for native in (16, 4096):
        model = random_model(teacher_card(dataclasses.replace(SHAPE, native_length=native), "f"))
        ids_bs = torch.arange(200)[None] % 7
        logits.append(logits_at(model, ids_bs, slice(0, 200)))
    assert torch.equal(*logits)
    # Same token, same phase of the pattern: only rotary tells position 150 from 150 + 49 apart.
    assert (logits[0][0, 150] - logits[0][0, 199]).abs().max() > 1e-6


# Newcombe, Statistics in Medicine 17 (1998), table I, method 3; and by hand at the edges: n / (n + z^2).
@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_wilson_interval(correct, total, low, high):
    assert Score(correct, total).interval == pytest.approx((low, high), abs=5e-5)
    assert Score(total - correct, total).interval == pytest.approx((1 - high, 1 - low), abs=5e-5)
    assert low <= Score(correct, total).accuracy <= high


def test_perplexity_equals_a_loop_in_float64(groups, text):
    _, model = random_student()
    windows_bs = text_windows(text[: 5 * 33 + 7], 33)
    assert windows_bs.shape == (5, 33) and torch.equal(windows_bs.flatten(), torch.from_numpy(text[: 5 * 33]))
    losses = []
    for ids in windows_bs:
        with torch.no_grad():
            logits_sw = model(ids[None], torch.arange(33)[None], None)[0].double().numpy()
        for place in range(32):
            row = logits_sw[place]
            losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[ids[place + 1]])
    found = text_loss(model, windows_bs)
    assert np.std(losses) > 0.5, "one loss everywhere would prove little"
    assert found.tokens == len(losses) == 160 and found.length == 33
    assert found.nll == pytest.approx(np.mean(losses), rel=1e-6)
    assert found.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


def test_windows_of_every_length_read_the_same_text():
    ids = np.arange(2 * TEXT_TOKENS)
    for length in (2, 512, 1024):
        assert torch.equal(text_windows(ids, length).flatten(), torch.arange(TEXT_TOKENS))
    assert text_windows(ids, TEXT_TOKENS + 1).shape == (1, TEXT_TOKENS + 1)  # one window at least


def test_perplexity_is_summed_over_batches(text):
    count = 2 * TOKENS_A_FORWARD // LENGTH + 3
    rows = [np.random.default_rng(i).integers(VOCAB, size=LENGTH) for i in range(count)]
    model = Knower(rows, {}, slice(0, LENGTH - 1))
    found = text_loss(model, torch.from_numpy(np.stack(rows)))
    assert len(model.batches) == 3 and sum(model.batches) == count
    assert found.nll == pytest.approx(np.log(np.e + VOCAB - 1) - 1, rel=1e-6)  # logit 1 at the right token, 0 elsewhere


def build_exam(tokenizer, fmt, text, **changes) -> Exam:
    arguments = {"haystack_ids": text, "lengths": [64, 96], "prompts": 3, "seed": SEED, **changes}
    return Exam.build(tokenizer, fmt, **arguments)


def test_same_arguments_same_exam(tokenizer, fmt, text):
    first, again = build_exam(tokenizer, fmt, text), build_exam(tokenizer, fmt, text)
    assert first.digest == again.digest
    others = [{"seed": SEED + 1}, {"haystack_ids": text[5:]}, {"prompts": 4}, {"lengths": [64, 97]}]
    digests = {build_exam(tokenizer, fmt, text, **changes).digest for changes in others}
    assert len(digests | {first.digest}) == 5
    assert list(first.needles) == [(task, length) for length in (64, 96) for task in TASKS]
    assert all(len(p.ids) == length and p.task == task for (task, length), ps in first.needles.items() for p in ps)


def test_results_of_a_model(groups, tokenizer, fmt, text):
    card, model = random_student()
    exam = build_exam(tokenizer, fmt, text)
    results = take_exam(model, card, exam, "student")
    assert results == take_exam(model, card, build_exam(tokenizer, fmt, text), "again")
    assert (results.num_fa, results.num_heads, results.native_length, results.exam) == (3, 8, 48, exam.digest)
    assert all(score.total == 3 for score in results.needles.values()) and results.lengths == (64, 96)
    assert results.text[96] == text_loss(model, text_windows(text, 96))


def made_up_results(correct: dict[str, int], exam: str = "e") -> Results:
    """200 prompts a task at two lengths, fewer right at the longer one."""
    needles = {(task, length): Score(correct[task] * 64 // length, 200) for length in (64, 128) for task in TASKS}
    text = {length: TextLoss(length=length, tokens=length - 1, nll=float(np.log(7.5))) for length in (64, 128)}
    return Results(
        fingerprint="f",
        stage="align",
        strategy="fixed",
        num_fa=8,
        num_heads=8,
        native_length=64,
        exam=exam,
        seed=SEED,
        needles=needles,
        text=text,
    )


def test_report(tmp_path):
    right = dict(zip(TASKS, (200, 190, 180, 160, 100), strict=True))
    models = {"teacher": made_up_results(right), "a|b": made_up_results(dict.fromkeys(TASKS, 0))}
    assert models["teacher"].group("single-key", 64) == Score(570, 600)
    assert models["teacher"].group("multi-key", 128) == Score(130, 400)
    report.write_report(tmp_path / "out", models, {"prompts": 200})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["accuracy.png", "report.md", "results.json"]
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("| teacher ")]
    assert row.split(" | ")[1:4] == ["8 of 8", "95.0 (93.0-96.5)", "65.0 (60.2-69.5)"]
    assert row.endswith("| 7.50 | 7.50 |")
    assert any(line.startswith("| a/b ") for line in lines), "a bar in a name would break the table"
    assert "| niah_multikey_2 | 64 | 50.0 (43.1-56.9) | 0.0 (0.0-1.9) |" in lines
    assert len({line.count("|") for line in lines[2:6]}) == 1, "header, rule and rows have the same cells"
    raw = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(raw["models"]) == ["teacher", "a|b"] and raw["settings"] == {"prompts": 200}
    second = {"task": "niah_single_2", "length": 64, "correct": 190, "total": 200}
    assert second.items() <= raw["models"]["teacher"]["tasks"][1].items()
    assert len(raw["models"]["teacher"]["groups"]) == 2 * len(TASK_GROUPS)
    assert (tmp_path / "out" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_models_of_different_exams_make_no_report(tmp_path):
    models = {exam: made_up_results(dict.fromkeys(TASKS, 1), exam) for exam in ("one", "other")}
    with pytest.raises(ValueError, match="same exam"):
        report.write_report(tmp_path, models, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 999_999}, "seed 999999: evaluation uses 1000000 and above"),
        ({"prompts": 0}, "0 prompts a task"),
        ({"lengths": []}, "name at least one"),
        ({"lengths": [64, 64]}, "each once"),
        ({"lengths": [1]}, "at least 2"),
        ({"lengths": [9]}, "niah_single_3 with 9 tokens: the length is too short"),
        ({"lengths": [10**6]}, r"1000000 tokens a window: the text has \d+ tokens"),
    ],
)
def test_exam_refuses(tokenizer, fmt, text, changes, message):
    with pytest.raises(InputError, match=message):
        build_exam(tokenizer, fmt, text, **changes)


def test_model_of_another_vocabulary_is_refused(groups, tokenizer, fmt, text):
    card, model = random_student()
    small = dataclasses.replace(card, shape=dataclasses.replace(SHAPE, vocab_size=100))
    with pytest.raises(InputError, match="small: its vocabulary has 100 words, the tokenizer gives token"):
        take_exam(model, small, build_exam(tokenizer, fmt, text), "small")


# The door makes its own process groups.
@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two checkpoints that can be compared, and a text."""
    root = tmp_path_factory.mktemp("runs")
    with process_groups():
        for name in ("teacher", "student"):
            card, model = random_student(HydraOptions(gdn_conv_kernel=0) if name == "student" else None)
            save_weights([model], card, root / name)
            (root / name / "tokenizer").mkdir()
            for file in ("tokenizer.json", "tokenizer_config.json", "needles.json"):
                shutil.copyfile(TEACHER / file, root / name / "tokenizer" / file)
    (root / "text.txt").write_text(Path(dataclasses.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return root


def call(runs: Path, out: Path, *more: str, models: tuple[str, ...] | None = None, text: Path | None = None) -> None:
    models = models or (f"the teacher={runs / 'teacher'}", str(runs / "student"))
    given = ["--lengths", "96", "64", "--prompts", "2", "--haystack", str(text or runs / "text.txt"), "--out", str(out)]
    main(["--models", *models, *given, *more])


def refusal(capsys, status: pytest.ExceptionInfo) -> str:
    """The one line of a refusal."""
    assert status.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_door(runs, tmp_path, capsys):
    call(runs, tmp_path / "out")
    assert "| the teacher | 3 of 8 |" in capsys.readouterr().out
    raw = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(raw["models"]) == ["the teacher", "student"] and raw["settings"]["seed"] == SEED
    teacher, student = raw["models"].values()
    assert teacher["exam"] == student["exam"] and teacher["text"] != student["text"]
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(SystemExit) as status:  # an earlier report is not lost
        call(runs, tmp_path / "out")
    assert "already holds results.json" in refusal(capsys, status)
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_door_refuses_bad_input(runs, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(runs / "student", other)
    (other / "tokenizer" / "tokenizer.json").write_text((TEACHER / "tokenizer.json").read_text() + "\n")
    bare = tmp_path / "bare"
    shutil.copytree(runs / "student", bare, ignore=lambda _, names: {"tokenizer"} & set(names))
    cut = tmp_path / "cut"
    shutil.copytree(runs / "student", cut, ignore=lambda _, names: {".metadata"} & set(names))
    (tmp_path / "file").write_text("x")
    (tmp_path / "short.txt").write_text("import this")
    teacher = str(runs / "teacher")
    cases = [
        ({"models": (teacher, str(other))}, (), "other: its tokenizer is not that of teacher"),
        ({"models": (teacher, str(bare))}, (), "bare: no .*tokenizer.json"),
        ({"models": (teacher, str(cut))}, (), "cut short"),
        ({"models": (teacher, str(tmp_path / "nowhere"))}, (), "no model.json"),
        ({"models": (teacher, f"teacher={runs / 'student'}")}, (), "two are named 'teacher'"),
        ({"text": tmp_path / "missing.txt"}, (), "missing.txt: No such file"),
        ({"text": tmp_path / "short.txt"}, (), "the text has .* tokens; give a longer one"),
        ({}, ("--seed", "5"), "seed 5: evaluation uses 1000000"),
        ({"out": tmp_path / "file" / "out"}, (), "not a writable folder"),
    ]
    for changes, more, message in cases:
        with pytest.raises(SystemExit) as status:
            call(runs, changes.pop("out", tmp_path / "out"), *more, **changes)
        line = refusal(capsys, status)
        assert re.search(f"^evaluate: .*{message}", line), line
    assert not (tmp_path / "out").exists()
