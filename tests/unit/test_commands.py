# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The edges of every command: one line for what ends it, Ctrl-C at any moment, and one writer at a time.

With real processes.
"""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hydra_mcore.commands import one_line_errors, sole_writer
from hydra_mcore.errors import InputError, MachineError
from tests.support.paths import ROOT

HOLD = """
import sys, time
from hydra_mcore.commands import sole_writer
with sole_writer(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""
HOLD_WITH_A_CHILD = HOLD.replace("    print", "    import os\n    os.fork() or time.sleep(60)\n    print")
PARENT = '''
import subprocess, sys
from hydra_mcore.commands import end_with_parent
child = """
import os, signal
signal.alarm(60)  # a child that is left alone fails the test, and does not hang it
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(0)))
print("on", flush=True)
signal.pause()
"""
subprocess.run([sys.executable, "-c", child], preexec_fn=end_with_parent)
'''
COUNT = """
import sys, time
from pathlib import Path
from hydra_mcore.commands import sole_writer
number = Path(sys.argv[1])
for _ in range(20):
    with sole_writer(number, 60):
        value = int(number.read_text())
        time.sleep(0.001)
        number.write_text(str(value + 1))
"""


def python(code: str, *args: str | Path, **keywords: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "4711"}
    command = [sys.executable, "-c", code, *map(str, args)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # a suite that runs in a shell's background ignores SIGINT, and its children would
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    return subprocess.Popen(
        command, env=environment, text=True, cwd=ROOT, preexec_fn=heard, start_new_session=True, **pipes, **keywords
    )


def held(code: str, path: Path) -> subprocess.Popen:
    holder = python(code, path)
    assert holder.stdout.readline() == "held\n"
    return holder


def test_the_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    holder = held(HOLD, out)
    who = (
        rf"out: is being written by process {holder.pid} on \S+, SLURM job 4711, since 2\d\d\d-.*; wait for its end, or"
        r" stop it"
    )
    with pytest.raises(InputError, match=who), sole_writer(out):
        pytest.fail("two writers")
    with sole_writer(tmp_path / "other"):
        pass
    holder.communicate("\n")
    with sole_writer(out):
        assert (tmp_path / "new" / "out.lock").read_text().startswith(f"process {os.getpid()} on ")
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]


@pytest.mark.parametrize("code", [HOLD, HOLD_WITH_A_CHILD], ids=["alone", "a child lives on"])
def test_a_kill_leaves_no_lock(tmp_path: Path, code: str) -> None:
    holder = held(code, tmp_path / "out")
    holder.kill()
    holder.wait()
    with sole_writer(tmp_path / "out"):
        pass
    os.killpg(holder.pid, signal.SIGKILL) if code != HOLD else None
    assert not list(tmp_path.iterdir())


def test_who_is_ending_is_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    holder = held(HOLD, tmp_path / "out")
    start = time.monotonic()
    with pytest.raises(InputError, match=f"process {holder.pid}"), sole_writer(tmp_path / "out", 0.3):
        pytest.fail("two writers")
    assert 0.3 <= time.monotonic() - start < 10
    assert capfd.readouterr().err.count("waiting up to 0.3 seconds for its end\n") == 1
    ender = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {holder.pid}"])
    with sole_writer(tmp_path / "out", 60):
        assert time.monotonic() - start < 30
    assert ender.wait() == 0
    holder.wait()


def test_a_command_ends_with_the_one_that_started_it() -> None:
    parent = python(PARENT)
    assert parent.stdout.readline() == "on\n"
    parent.kill()
    assert parent.stdout.read() == "saved\n"  # read() returns once the child has ended too


def test_never_two_at_a_time(tmp_path: Path) -> None:
    """Each removes the file at its end, while others already wait for it."""
    number = tmp_path / "number"
    number.write_text("0")
    writers = [python(COUNT, number) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert number.read_text() == "60" and list(tmp_path.iterdir()) == [number]


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with sole_writer(tmp_path / "out"), sole_writer(tmp_path / "out"):
        pass
    assert re.findall("out.lock: this file system knows no locks .No locks available.", capfd.readouterr().err) != []


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SystemExit, match="2"), one_line_errors("convert"), sole_writer(tmp_path / "out"):
        pytest.fail("written")
    assert capsys.readouterr().err.startswith(f"convert: {tmp_path}: Permission denied; ")


MAIN = """
import sys, time
from hydra_mcore.commands import one_line_errors, sole_writer

@one_line_errors("tool")
def main():
    with sole_writer(sys.argv[1]):
        print("held", flush=True)
        {work}

main()
"""
BUSY = {
    "sleeping": "time.sleep(60)",
    "importing": "__import__('slow')",
    "an import that eats it": "__import__('greedy')",
    "another error follows": "__import__('broken')",
}
MODULES = {
    "slow": "import time\ntime.sleep(60)",
    "greedy": "import time\ntry:\n    time.sleep(60)\nexcept BaseException:\n    pass\nraise ImportError('greedy')",
    "broken": "import time\ntry:\n    time.sleep(60)\nfinally:\n    raise RuntimeError('connection closed by peer')",
}


@pytest.mark.parametrize("work", BUSY.values(), ids=BUSY)
def test_ctrl_c_is_one_line_and_leaves_no_lock(tmp_path: Path, work: str) -> None:
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    process = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + MAIN.format(work=work), tmp_path / "out")
    assert process.stdout.readline() == "held\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "tool: stopped by Ctrl-C\n")
    assert not (tmp_path / "out.lock").exists()


def test_the_second_ctrl_c_does_not_wait_for_the_end_of_the_first(tmp_path: Path) -> None:
    work = "\n        ".join(
        (
            "try:",
            "    print('trying', flush=True)",
            "    time.sleep(60)",
            "finally:",
            "    print('cleaning', flush=True)",
            "    time.sleep(60)",
        )
    )
    process = python(MAIN.format(work=work), tmp_path / "out")
    assert [process.stdout.readline() for _ in range(2)] == ["held\n", "trying\n"]
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    with sole_writer(tmp_path / "out"):
        pass


def test_a_ctrl_c_waits_until_a_child_is_started(tmp_path: Path) -> None:
    """Also one that another thread takes."""
    work = "\n        ".join(
        (
            "import os, signal, threading",
            "from hydra_mcore.commands import deaf_children",
            "threading.Thread(target=time.sleep, args=(30,), daemon=True).start()",
            "with deaf_children():",
            "    os.kill(os.getpid(), signal.SIGINT)",
            "    time.sleep(0.2)",
            "    print('started', flush=True)",
            "print('went on', flush=True)",
        )
    )
    process = python(MAIN.format(work=work), tmp_path / "out")
    output, said = process.communicate(timeout=60)
    assert (process.returncode, output, said) == (130, "held\nstarted\n", "tool: stopped by Ctrl-C\n")


def test_where_nobody_listens_to_ctrl_c_it_stays_so() -> None:
    code = (
        "import signal, os; signal.signal(signal.SIGINT, signal.SIG_IGN)\nfrom hydra_mcore.commands import"
        " one_line_errors\n"
    )
    code += "with one_line_errors('tool'):\n    os.kill(os.getpid(), signal.SIGINT)\nprint('done')"
    assert python(code).communicate(timeout=30)[0] == "done\n"


def test_other_errors_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="a fault"), one_line_errors("tool"):
        raise RuntimeError("a fault")
    with pytest.raises(SystemExit) as stop, one_line_errors("tool"):
        sys.exit(7)
    assert stop.value.code == 7 and capsys.readouterr().err == ""


@pytest.mark.parametrize(("error", "says"), [(InputError, "RANK"), (MachineError, "LOCAL_RANK")])
def test_one_rank_says_it(
    error: type[InputError], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first rank of the job what all of them see, and the first of each machine what is wrong with that."""
    for rank, local_rank in (("0", "0"), ("1", "1"), ("8", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit, match="2"), one_line_errors("tool"):
            raise error("a fault")
        assert capsys.readouterr().err == ("tool: a fault\n" if os.environ[says] == "0" else "")


def test_a_python_that_is_too_old_is_one_line() -> None:
    old = python("import sys; sys.version_info = (3, 11, 2); import hydra_mcore")
    said = old.communicate(timeout=60)[1]
    assert old.returncode == 2 and said.count("\n") == 1
    assert f"{sys.executable} is 3.11: make env, then source .venv/bin/activate" in said
