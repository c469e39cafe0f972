# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Chat templates that name the day: an evaluation goes on with that of its first run, whatever the calendar says."""

from __future__ import annotations

import copy
import json
import multiprocessing
import shutil
from datetime import date, datetime, tzinfo
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from hydra_mcore.errors import InputError
from hydra_mcore.evaluation import records
from hydra_mcore.evaluation.records import Records
from hydra_mcore.ruler.chat import chat_around
from hydra_mcore.ruler.wording import load_wording
from tests.support.contestants import write_contestants
from tests.support.small_tokenizers import small_tokenizer
from tools.evaluate import main

# As Llama 3.1 and SmolLM3 have it.
LLAMA = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b"
    " %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}system\nCutting Knowledge Date:"
    " December 2023\nToday Date: {{ date_string }}\n\n{{ messages[0].content }}\nassistant\n"
)
SMOLLM = "{%- set today = strftime_now('%d %B %Y') -%}Today Date: {{ today }}\n{{ messages[0].content }}\nassistant\n"
PLAIN = "{{ messages[0].content }}\nassistant\n"


def with_template(template: str) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(small_tokenizer("qwen"))
    tokenizer.chat_template = template
    return tokenizer


def calendar_says(day: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Move the clock of transformers' templates and of the records."""

    class Now(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.fromisoformat(day).replace(tzinfo=tz)

    class Today(date):
        @classmethod
        def today(cls) -> date:
            return datetime.fromisoformat(day).date()

    monkeypatch.setattr(chat_template_utils, "datetime", Now)
    monkeypatch.setattr("hydra_mcore.evaluation.records.date", Today)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA, "Today Date: 07 Mar 2026"),
        (SMOLLM, "Today Date: 07 March 2026"),
        (PLAIN, ""),
        ("{{ strftime_now('%H:%M:%S.%f %Z%z') }} {{ messages[0].content }}!", "00:00:00.000000 "),
        ("{{ strftime_now('%A %-d %j %U %s'[:-3]) }} {{ messages[0].content }}!", "Saturday 7 066 09"),
        ("{{ strftime_now('%') }}{{ strftime_now('') }}{{ strftime_now('%Q') }}{{ messages[0].content }}!", ""),
        ("{% macro d() %}{{ strftime_now('%Y') }}{% endmacro %}{{ d() }} {{ messages[0].content }}", "2026"),
        ("{% if date_string is defined %}never{% endif %}{{ messages[0].content }}", ""),
    ],
)
def test_a_template_is_the_same_text_at_every_hour(
    template: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, found = with_template(template), set()
    for now in ("2026-03-07 23:59:59", "2026-03-08 00:00:01", "2030-12-31 12:00:00"):
        calendar_says(now, monkeypatch)
        found.add(chat_around(tokenizer, lambda: date(2026, 3, 7)))
    ((before, _),) = found
    assert expected in before and "never" not in before


def test_the_day_is_asked_only_where_it_shows() -> None:
    def asked() -> date:
        raise AssertionError

    assert load_wording("chat", with_template(PLAIN), Path("none"), asked).name == "chat"
    assert load_wording(
        "chat", with_template("{{ strftime_now('%H') }} {{ messages[0].content }}"), Path("none"), asked
    )
    with pytest.raises(AssertionError):
        load_wording("chat", with_template(LLAMA), Path("none"), asked)
    days = [
        load_wording("chat", with_template(LLAMA), Path("none"), lambda day=day: date(2026, 3, day)).digest
        for day in (7, 7, 8)
    ]
    assert days[0] == days[1] != days[2]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ now() }} {{ messages[0].content }}", "the chat template fails ('now' is undefined)"),
        ("{{ raise_exception('Only tools\nhere') }}", "the chat template fails (Only tools)"),
        ("{% if %}", "the chat template fails (Expected an expression"),
        ("{{ strftime_now(5) }} {{ messages[0].content }}", "the chat template fails ("),
        ("{{ range(10**9) }} {{ messages[0].content }}", "the chat template fails ("),
        ("{{ range(99999)|random }} {{ messages[0].content }}", "the chat template is another text each time"),
        ("{{ messages[0].content }} {{ messages[0].content }}", "does not show the user's words once"),
        ("nothing", "does not show the user's words once"),
    ],
)
def test_templates_that_cannot_be_used_are_one_line(template: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        chat_around(with_template(template), date.today)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Contestants whose tokenizers have a chat template with the date."""
    folder = write_contestants(tmp_path_factory.mktemp("runs"))
    for place in ("teacher", "student"):
        tokenizer = AutoTokenizer.from_pretrained(folder / place / "tokenizer")
        tokenizer.chat_template = LLAMA
        shutil.rmtree(folder / place / "tokenizer")
        tokenizer.save_pretrained(folder / place / "tokenizer")
    return folder


def evaluate(runs: Path, out: Path, *more: str, model: str = "teacher") -> None:
    asked = ("--tasks", "niah_single_1", "--lengths", "256", "--prompts", "2", "--no-text-loss", "--template", "chat")
    main(["--models", f"{model}={runs / model}", *asked, "--out", str(out), *more])


def test_an_evaluation_goes_on_the_next_day(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    calendar_says("2026-03-07 23:59:00", monkeypatch)
    evaluate(runs, tmp_path)
    calendar_says("2026-03-08 00:01:00", monkeypatch)
    evaluate(runs, tmp_path, model="student")
    found = json.loads((tmp_path / "results.json").read_text())
    teacher, student = (line["tasks"][0] for line in found["models"].values())
    assert (
        found["date"] == "2026-03-07"
        and teacher["digest"] == student["digest"]
        and teacher["wording"] == student["wording"]
    )
    assert "says that today is 2026-03-07." in (tmp_path / "report.md").read_text()
    capsys.readouterr()
    evaluate(runs, tmp_path, "--skip-existing", "--date", "2026-03-07")
    assert "holds a report with every piece already" in capsys.readouterr().out
    evaluate(runs, tmp_path / "again", "--date", "2026-03-07")
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["date"] == "2026-03-07" and again["models"]["teacher"]["tasks"][0]["digest"] == teacher["digest"]
    evaluate(runs, tmp_path / "other")
    other = json.loads((tmp_path / "other" / "results.json").read_text())
    assert other["date"] == "2026-03-08" and other["models"]["teacher"]["tasks"][0]["digest"] != teacher["digest"]
    capsys.readouterr()
    for flags, said in [
        (("--date", "2026-03-08"), f"--date 2026-03-08: prompts in {tmp_path} are of 2026-03-07; leave --date out"),
        (("--date", "tomorrow"), "argument --date: invalid"),
    ]:
        with pytest.raises(SystemExit) as stop:
            evaluate(runs, tmp_path, *flags)
        assert stop.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "records" / "today").write_text("yesterday")
    with pytest.raises(SystemExit) as stop:
        evaluate(runs, tmp_path)
    assert (
        stop.value.code == 2
        and "records/today: holds no day; write the day" in capsys.readouterr().err.splitlines()[-1]
    )


def note(root: Path, day: int, barrier: Barrier, found: Queue) -> None:
    class Today(date):
        @classmethod
        def today(cls) -> date:
            return date(2026, 3, day)

    records.date = Today
    barrier.wait()
    found.put(str(Records(root).today(None)))


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_jobs_around_midnight_agree_on_a_day(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    for attempt in range(5):
        barrier, found = fork.Barrier(6), fork.Queue()
        jobs = [fork.Process(target=note, args=(tmp_path / str(attempt), day, barrier, found)) for day in (7, 8) * 3]
        for job in jobs:
            job.start()
        days = {found.get(timeout=60) for _ in jobs}
        for job in jobs:
            job.join()
        assert len(days) == 1 and [path.name for path in (tmp_path / str(attempt) / "records").iterdir()] == ["today"]
