# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The job scripts without a cluster: what they would run, what they refuse, and how a stop reaches the ranks."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import wait_for
from tests.support.paths import ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
JOBS = {
    "prepare": ["tools/prepare_data.py --config"],
    "select": [
        "tools/convert.py import --config",
        "tools/select_heads.py --config",
        "tools/convert.py hybridize --config",
    ],
    "align": ["-m hydra_mcore.train --stage align --config"],
    "distill": ["-m hydra_mcore.train --stage distill --config"],
    "extend": ["-m hydra_mcore.train --stage extend --config"],
    "evaluate": ["tools/evaluate.py --config", "tools/convert.py export --config"],
}
SECTIONS = (
    "run-dir: runs/a\nprepare: {a: 1}\nimport: {a: 1}\nselect: {a: 1}\nhybridize: {a: 1}\nevaluate: {a: 1}\nexport: {a:"
    " 1}\n"
)
BASH = shutil.which("bash")
OUTSIDE = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "HYDRA"))}


def bash(*command: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [BASH, *command], cwd=cwd, env={**OUTSIDE, **variables}, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "recipe.yaml").write_text(SECTIONS)
    return str(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(path: Path) -> None:
    done = bash("-n", str(path))
    assert done.returncode == 0, done.stderr
    assert (
        path.read_text().removeprefix("#!/usr/bin/env bash\n").startswith("# Copyright 2026 the hydra_mcore authors.\n")
    )
    if checker := shutil.which("shellcheck"):
        found = subprocess.run([checker, "-x", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("job", JOBS)
def test_a_dry_run_shows_the_commands(job: str, recipe: str) -> None:
    done = bash(f"slurm/{job}.sh", "--dry-run", recipe, "--", "--seed", "3")
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    assert [expected in line for expected, line in zip(JOBS[job], lines, strict=True)] == [True] * len(lines)
    assert all(line.startswith("srun ") and recipe in line for line in lines)
    assert sum(line.endswith(" --seed 3") for line in lines) == 1
    assert "hydra_mcore.torchrun --nnodes=" in done.stdout or job == "prepare"


def test_a_dry_run_of_the_pipeline_shows_all_jobs_in_their_order(recipe: str) -> None:
    done = bash("slurm/pipeline.sh", "--dry-run", recipe, HYDRA_NODES="4", HYDRA_GPUS_PER_NODE="2")
    jobs = [line for line in done.stdout.splitlines() if line.startswith("sbatch ")]
    assert [f" slurm/{job}.sh {recipe}" in line for job, line in zip(JOBS, jobs, strict=True)] == [True] * 6
    assert ["afterok:ID_OF_" in line for line in jobs] == [False] + [True] * 5
    assert ["--nodes=4 --gres=gpu:2" in line for line in jobs] == [False, False, True, True, True, False]
    assert all("--signal=B:USR1@" in line for line in jobs)
    assert ["--gres=gpu:2 " in line for line in jobs] == [False] + [True] * 5
    assert all(expected in done.stdout for commands in JOBS.values() for expected in commands)


def test_flags_of_the_pipeline_go_to_the_three_stages(recipe: str) -> None:
    done = bash("slurm/pipeline.sh", "--dry-run", recipe, "--", "--lr", "2e-5")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and not done.stderr
    assert [line.endswith(" -- --lr 2e-5") for line in lines if line.startswith("sbatch ")] == [False] * 2 + [
        *[True] * 3,
        False,
    ]
    commands = [line.split("--stage ")[1] for line in lines if line.endswith(" --lr 2e-5") and "--stage" in line]
    assert commands == [
        *(f"{stage} --config {recipe} --lr 2e-5" for stage in ("align", "distill", "extend")),
        *(f"{stage} --config {recipe} --dry-run --world-size 8 --lr 2e-5" for stage in ("align", "distill", "extend")),
    ]
    assert done.stdout.count("--lr") == 9


def test_a_recipe_of_the_stages_alone_is_three_jobs(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("run-dir: runs/a\n")
    done = bash("slurm/pipeline.sh", "--dry-run", str(tmp_path / "recipe.yaml"))
    jobs = re.findall(r"^sbatch .* slurm/(\w+)\.sh ", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and jobs == ["align", "distill", "extend"]


def test_the_text_is_prepared_where_the_site_wants_it(recipe: str) -> None:
    options = {"HYDRA_PREPARE_OPTIONS": "--partition=cpu --mem=64G", "HYDRA_GRES": "gpu:h100"}
    lines = bash("slurm/pipeline.sh", "--dry-run", recipe, **options).stdout.splitlines()
    prepare, *others = (line for line in lines if line.startswith("sbatch "))
    assert f" --gres=none --partition=cpu --mem=64G slurm/prepare.sh {recipe}" in prepare
    assert all("--gres=gpu:h100:8 " in line and "--partition" not in line for line in others)


def test_the_examples_of_a_site_can_be_used(tmp_path: Path) -> None:
    """Each with its signs removed, over nothing and over a variable that is set already."""
    text = (ROOT / "slurm" / "env.sh").read_text()
    names = re.findall(r'^#: "\$\{(\w+):=', text, re.MULTILINE)
    assert {"NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "SBATCH_EXCLUSIVE", "SBATCH_MEM_PER_NODE"} <= set(names)
    (tmp_path / "env.sh").write_text(text.replace("#:", ":"))
    shown = bash("-c", "source ./env.sh; env", cwd=tmp_path, NCCL_IB_HCA="mine").stdout.splitlines()
    found = dict(line.split("=", 1) for line in shown if "=" in line)
    assert all(found[name] for name in names) and found["NCCL_IB_HCA"] == "mine"
    assert found["SBATCH_GRES"] == "gpu:8" and found["SBATCH_OUTPUT"] == "runs/logs/%x-%j.out"
    assert (tmp_path / "runs" / "logs").is_dir()


def test_stages_keep_their_old_names(recipe: str) -> None:
    for number, stage in enumerate(("align", "distill", "extend"), 1):
        assert (ROOT / "slurm" / f"stage{number}.sh").resolve() == ROOT / "slurm" / f"{stage}.sh"
        assert f" --stage {stage} " in bash(f"slurm/stage{number}.sh", "--dry-run", recipe).stdout


def test_doctor_runs_on_every_node() -> None:
    done = bash("slurm/doctor.sh", "--dry-run", "--", "--only", "packages")
    assert (
        done.returncode == 0
        and not done.stderr
        and done.stdout
        == (
            "srun --ntasks-per-node=1 --cpu-bind=none .venv/bin/python tools/doctor.py --run-dir runs --only packages\n"
        )
    )


def test_only_the_sections_that_a_recipe_has_are_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("run-dir: runs/a\nhybridize: {a: 1}\n")
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("evaluate:\n  a: 1\n")
    files = (str(tmp_path / "recipe.yaml"), str(overlay))
    assert len(bash("slurm/select.sh", "--dry-run", *files).stdout.splitlines()) == 1
    assert bash("slurm/pipeline.sh", "--dry-run", *files).stdout.count("sbatch ") == 5
    assert (
        f"--config {files[0]} {files[1]}" in bash("slurm/evaluate.sh", "--dry-run", HYDRA_RECIPE=" ".join(files)).stdout
    )


@pytest.mark.parametrize(
    ("sections", "lines"),
    [
        (
            "\"prepare\": {a: 1}\n'import' : {a: 1}\n? hybridize\n: {a: 1}\n",
            2,
        ),  # a section is one however its name is written
        ("# import:\ntext: |\n  prepare:\n  select:\nhybridize:\nimport: {}\n", 0),  # and no other line is
    ],
)
def test_sections_are_what_yaml_says(sections: str, lines: int, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(sections)
    assert len(bash("slurm/select.sh", "--dry-run", str(tmp_path / "recipe.yaml")).stdout.splitlines()) == lines
    said = bash("slurm/prepare.sh", "--dry-run", str(tmp_path / "recipe.yaml")).stdout
    assert ("tools/prepare_data.py" in said) == ('"prepare"' in sections)


def test_a_recipe_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("select: {a: 1}\nimport: {a: 1}\nselect: {b: 1}\n")
    for script in ("pipeline", "select"):
        done = bash(f"slurm/{script}.sh", "--dry-run", str(tmp_path / "recipe.yaml"))
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "recipe.yaml: 'select' stands there twice, on line 1 and on line 3; keep one" in done.stderr
    done = bash("slurm/evaluate.sh", "--dry-run", str(tmp_path / "recipe.yaml"), HYDRA_PYTHON="/nowhere/python")
    assert done.returncode == 2 and "cannot read recipes; run make env" in done.stderr


def test_outside_of_jobs_a_container_is_not_asked_for_sections(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("run-dir: a\n")
    (tmp_path / "image.sqsh").touch()
    site = {"HYDRA_CONTAINER": str(tmp_path / "image.sqsh"), "HYDRA_PYTHON": "/in/the/container/python"}
    assert bash("slurm/pipeline.sh", "--dry-run", str(tmp_path / "recipe.yaml"), **site).stdout.count("sbatch ") == 6
    done = bash("slurm/prepare.sh", str(tmp_path / "recipe.yaml"))  # in the job, the answer is no
    assert done.returncode == 0 and "no section prepare: nothing to do" in done.stdout


GPU_LIST = (
    "#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-a)'\necho '  MIG 1g.10gb Device 0: (UUID: MIG-a)'\necho 'GPU 1: H100"
    " (UUID: GPU-b)'\n"
)


@pytest.mark.parametrize(
    ("variables", "nvidia_smi", "ranks"),
    [
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS_PER_NODE": "8"}, GPU_LIST, "4"),
        ({}, GPU_LIST, "2"),  # SLURM says nothing: the node itself is asked
        ({"SLURM_GPUS_ON_NODE": ""}, GPU_LIST, "2"),
        ({"SLURM_GPUS_ON_NODE": "gpu:8"}, GPU_LIST, "8"),
        ({"SLURM_GPUS_PER_NODE": "8", "SLURM_JOB_GPUS": "0"}, GPU_LIST, "8"),
        ({"SLURM_GPUS_PER_NODE": "h100:4,a100:2"}, GPU_LIST, "6"),
        ({"SLURM_GPUS_PER_NODE": "many"}, GPU_LIST, "2"),
        ({"SLURM_STEP_GPUS": "4,5,7", "SLURM_JOB_GPUS": "0"}, GPU_LIST, "3"),
        ({"SLURM_JOB_GPUS": "0,3,6,7"}, GPU_LIST, "4"),
        ({"CUDA_VISIBLE_DEVICES": "3"}, GPU_LIST, "1"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,GPU-7c", "SLURM_GPUS_ON_NODE": "8"}, GPU_LIST, "3"),
        ({"HYDRA_RANKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4"}, GPU_LIST, "1"),
        ({"HYDRA_GPUS_PER_NODE": "8"}, GPU_LIST, "2"),  # what is asked for is not what a node has
        ({"HYDRA_GPUS_PER_NODE": "0"}, "#!/bin/sh\nexit 9\n", "1"),
        ({"HYDRA_GPUS_PER_NODE": "0", "CUDA_VISIBLE_DEVICES": ""}, GPU_LIST, "1"),
        ({}, "#!/bin/sh\nexit 9\n", None),
        ({"HYDRA_GPUS_PER_NODE": "8", "CUDA_VISIBLE_DEVICES": "NoDevFiles"}, GPU_LIST, None),
        ({"SLURM_GPUS_ON_NODE": "0"}, GPU_LIST, None),
        ({"SLURM_GPUS_PER_NODE": "h100:0", "HYDRA_GPUS_PER_NODE": "8"}, GPU_LIST, None),
        ({"HYDRA_RANKS_PER_NODE": "two"}, GPU_LIST, None),
        ({"HYDRA_RANKS_PER_NODE": "0"}, GPU_LIST, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("script", ["node", "serve_node"])
def test_each_node_counts_its_own_gpus(
    variables: dict[str, str], nvidia_smi: str, ranks: str | None, script: str, tmp_path: Path
) -> None:
    if ranks is None and list(Path("/dev").glob("nvidia[0-9]*")) and not variables:
        pytest.skip("this machine has GPUs")
    (tmp_path / "nvidia-smi").write_text(nvidia_smi)
    (tmp_path / "nvidia-smi").chmod(0o755)
    outside = {name: value for name, value in OUTSIDE.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment = {**outside, "PATH": f"{tmp_path}:{OUTSIDE['PATH']}", "SLURM_NODEID": "0", **variables}
    show = {"node": [BASH, "-c", "echo $PET_NPROC_PER_NODE"], "serve_node": ["echo", "--model", "x"]}[script]
    command = [BASH, f"slurm/{script}.sh", *show]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)
    if ranks is None:
        assert (
            done.returncode == 2
            and not done.stdout
            and done.stderr.count("\n") == 1
            and "HYDRA_RANKS_PER_NODE" in done.stderr
        )
    else:
        server = f"-m vllm.entrypoints.openai.api_server --data-parallel-size {ranks} --model x"
        assert (done.returncode, done.stdout) == (0, f"{ranks if script == 'node' else server}\n")
        what = "ranks" if script == "node" else "copies"
        assert re.fullmatch(rf"{script}.sh: {what} on \S+: {ranks} \(GPUs: \d+ by \S+\)\n", done.stderr)


@pytest.mark.slow
def test_torchrun_takes_the_count_from_the_node(tmp_path: Path) -> None:
    rank = "import os; os.write(1, os.environb[b'LOCAL_WORLD_SIZE'] + b' ')"  # one write, for ranks mix
    (tmp_path / "rank.py").write_text(rank)
    command = [
        "-m",
        "hydra_mcore.torchrun",
        "--nnodes=1",
        "--master-addr=127.0.0.1",
        "--master-port=0",
        str(tmp_path / "rank.py"),
    ]
    done = bash("slurm/node.sh", sys.executable, *command, SLURM_NODEID="0", HYDRA_RANKS_PER_NODE="3")
    assert done.stdout.split() == ["3"] * 3, done.stderr


def test_without_a_recipe_it_is_the_example() -> None:
    assert " --stage extend --config examples/qwen3-1.7b/recipe.yaml\n" in bash("slurm/extend.sh", "--dry-run").stdout


def test_a_container_is_srun_s_business(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "image.sqsh").touch()
    relative = os.path.relpath(tmp_path / "image.sqsh", ROOT)  # Pyxis would look for it in a registry
    variables = {"HYDRA_CONTAINER": relative, "HYDRA_MOUNTS": "/data:/data", "HYDRA_PYTHON": "python3"}
    done = bash("slurm/extend.sh", "--dry-run", recipe, **variables)
    mounts = f"--container-mounts={ROOT}:{ROOT},/data:/data"
    step = f"--container-image={tmp_path}/image.sqsh {mounts} --container-workdir={ROOT} bash slurm/node.sh python3 -m"
    assert step in done.stdout and not done.stderr
    assert "--container" not in bash("slurm/extend.sh", "--dry-run", recipe).stdout


@pytest.mark.parametrize("image", ["image.sqsh", "./image", "/nowhere/image.sqsh"])
def test_an_image_that_is_not_there_is_refused(image: str, recipe: str) -> None:
    for script in ("extend", "pipeline"):
        done = bash(f"slurm/{script}.sh", "--dry-run", recipe, HYDRA_CONTAINER=image)
        assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
        assert f"no file {image} (HYDRA_CONTAINER) in {ROOT}; enroot import makes it" in done.stderr


def test_an_image_in_a_registry_is_imported_by_every_step(recipe: str) -> None:
    variables = {"HYDRA_CONTAINER": "nvcr.io#nvidia/pytorch:26.09-py3"}
    said = bash("slurm/extend.sh", recipe, **variables).stdout  # a job; this is none, and ends after that
    assert said.count("\n") == 1 and "every step imports it again" in said and "docs/container.md" in said
    step = bash("slurm/extend.sh", "--dry-run", recipe, **variables).stdout
    assert step.count("\n") == 1 and f"--container-image={variables['HYDRA_CONTAINER']} --container-mounts=" in step


def test_a_study_s_jobs_are_its_steps(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "align: {train-iters: 1, global-batch-size: 1, seq-length: 8}\nimport: {hf: x, out: y}\n"
        "select: {teacher: y}\nhybridize: {teacher: y}\nevaluate: {lengths: [8]}\n"
    )
    study = tmp_path / "study.yaml"
    study.write_text(
        f"recipes: [recipe.yaml]\nout: {tmp_path}/out\nstages: [align]\nvariants: {{one: {{}}, two: {{}}}}\n"
    )
    python = {"HYDRA_PYTHON": sys.executable}
    shared = bash("slurm/study.sh", "--dry-run", str(study), **python)
    assert shared.returncode == 0 and not shared.stderr
    commands = ["tools/convert.py import", "tools/select_heads.py", "tools/evaluate.py"]
    assert [want in line for want, line in zip(commands, shared.stdout.splitlines(), strict=True)] == [True] * 3
    second = bash("slurm/study.sh", "--dry-run", str(study), SLURM_ARRAY_TASK_ID="1", **python).stdout.splitlines()
    assert len(second) == 4 and all(line.startswith("srun ") and "/seed0/two/recipe.yaml" in line for line in second)
    assert " -m hydra_mcore.torchrun " in second[2] and " -m hydra_mcore.train --config " in second[2]
    done = bash("slurm/study.sh", "--dry-run", str(study), SLURM_ARRAY_TASK_ID="2", **python)
    assert done.returncode == 2 and done.stderr == "study: --job 2: there are shared and 0 to 1\n"


def test_an_export_is_served() -> None:
    export = ("--", "--model", "runs/a/hf", "--max-model-len", "8192")
    done = bash("slurm/serve.sh", "--dry-run", *export, HYDRA_SERVING_PORT="8123")
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and not done.stderr
    command = "bash slurm/serve_node.sh .venv/serving/bin/python --host 0.0.0.0 --port 8123 --model runs/a/hf"
    assert done.stdout.endswith(f" {command} --max-model-len 8192\n")
    done = bash("slurm/serve.sh", "--dry-run")
    assert done.returncode == 2 and done.stderr == (
        "serve.sh: name the export: sbatch slurm/serve.sh -- --model EXPORT_DIR\n"
    )


@pytest.mark.parametrize("job", JOBS)
def test_outside_slurm_a_job_is_refused_in_one_line(job: str, recipe: str) -> None:
    done = bash(f"slurm/{job}.sh", recipe)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"{job}.sh: this is no SLURM job: submit it with sbatch, or see its commands with --dry-run\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere.yaml",), "no recipe nowhere.yaml in "),
        (("--seed", "3"), "unknown option --seed; flags of the command itself go behind --"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = bash("slurm/align.sh", *arguments)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_scripts_say_where_they_must_be_started(recipe: str, tmp_path: Path) -> None:
    for script in ("distill.sh", "pipeline.sh"):
        done = bash(str(ROOT / "slurm" / script), recipe, cwd=tmp_path)
        assert done.returncode == 2 and "repository's root" in done.stderr and done.stderr.count("\n") == 1


def test_pipeline_refuses_what_it_cannot_submit(recipe: str, tmp_path: Path) -> None:
    done = bash("slurm/pipeline.sh", recipe, "--lr", "3")
    assert done.returncode == 2 and "unknown option --lr; flags of the command itself go behind --" in done.stderr
    done = bash("slurm/pipeline.sh", recipe, PATH=str(tmp_path), HYDRA_LOGS=str(tmp_path))
    assert (
        done.returncode == 2
        and done.stderr == "pipeline.sh: no sbatch here: run it on the cluster, or with --dry-run\n"
    )


TORCHRUN = """
import subprocess, sys, time
time.sleep(1)
sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)
"""
RANK = """
import os, pathlib, signal, subprocess, sys, time
folder, loader, stop = pathlib.Path(sys.argv[1]), subprocess.Popen(["sleep", "60"]), []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
(folder / "pids").write_text(f"{os.getppid()} {os.getpid()} {loader.pid}")
while not stop:
    time.sleep(0.05)
time.sleep(0.5)
(folder / "saved").write_text("" if loader.poll() is None else "without its data loader")
loader.kill()
sys.exit(7)
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """slurm/node.sh with a launcher that takes a second to start its rank, which has a data loader."""
    (tmp_path / "torchrun.py").write_text(TORCHRUN)
    (tmp_path / "rank.py").write_text(RANK)
    command = [
        "bash",
        "slurm/node.sh",
        sys.executable,
        *(str(tmp_path / name) for name in ("torchrun.py", "rank.py", "")),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**OUTSIDE, "SLURM_NODEID": "0", "HYDRA_RANKS_PER_NODE": "1"}, start_new_session=True
    )
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("everywhere", [False, True], ids=["the shell", "all processes"])
def test_a_stop_reaches_the_ranks_and_nobody_else(node: subprocess.Popen, tmp_path: Path, everywhere: bool) -> None:
    wait_for(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text(), 10, "the rank runs")
    pids = map(int, (tmp_path / "pids").read_text().split()) if everywhere else ()
    for pid in (*pids, node.pid):
        os.kill(pid, signal.SIGUSR1)
    assert node.wait(timeout=10) == 7
    assert (tmp_path / "saved").read_text() == ""


def test_a_stop_before_the_ranks_run_is_not_lost(node: subprocess.Popen) -> None:
    time.sleep(0.4)
    os.kill(node.pid, signal.SIGUSR1)
    assert node.wait(timeout=10) != 0
