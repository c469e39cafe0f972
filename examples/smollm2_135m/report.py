# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Write the report of run.py: needles, perplexity, answers of teacher and student, which heads stay, how align went.

example:
  python -m examples.smollm2_135m.report --config examples/smollm2_135m/recipe.yaml
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from hydra_mcore.commands import one_line_errors
from hydra_mcore.files import replacing, write_text
from hydra_mcore.recipe import Recipe

QUESTION = "In Python, what does a for loop do? Answer in one sentence."
ANSWER_TOKENS = 48


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, nargs="+", required=True, metavar="FILE", help="the recipe of the run")
    return parser.parse_args(argv)


@one_line_errors("report")
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    at = {name: Recipe.load(args.config, name).values for name in ("import", "select", "align", "evaluate", "export")}
    out, heads = Path(at["align"]["run-dir"]), Path(at["select"]["out"]) / "figures"
    evaluation = Path(at["evaluate"]["out"])
    pictures = ("heads.png", "knock_out.png", "replaceability.png")
    for picture in (*(heads / name for name in pictures), evaluation / "accuracy.png"):
        with replacing(out / picture.name) as beside:
            shutil.copy(picture, beside)
    loss_figure(out / "align.png", out / "align")
    accuracy, _, losses = (evaluation / "report.md").read_text().partition("\n\n")[2].partition("\n## Held-out text\n")
    answers = "\n\n".join(
        f"**{name}**: {answer(model)}"
        for name, model in (("teacher", at["import"]["hf"]), ("student", at["export"]["out"]))
    )
    text = f"""# SmolLM2-135M-Instruct as a HydraHead model

{accuracy.partition("![")[0]}
Held-out text. {losses.partition("![")[0].strip()}

## Which heads stay

Causal score of every head, kept heads framed, and what the best GDN head would leave of each:

![causal score of every head](heads.png)

![what linear heads leave of every head](replaceability.png)

The teacher's accuracy without some of its heads:

![accuracy against heads removed](knock_out.png)

## Accuracy against length

![accuracy against prompt length](accuracy.png)

## Align

![loss of align](align.png)

## An answer

{QUESTION}

{answers}
"""
    write_text(out / "report.md", text)


def loss_figure(path: Path, stage_dir: Path) -> None:
    """Relative error summed over layers, by step."""
    from examples.tiny.demo_report import read_losses  # takes seconds: not for --help
    from hydra_mcore import figures

    figure = figures.empty(6, 3.6)
    axes = figures.plain(figure.subplots())
    figures.training_curve(axes, *read_losses(stage_dir))
    axes.set(xlabel="step", ylabel="sum of relative errors of the layers")
    axes.set_ylim(bottom=0)
    figures.save(figure, path)


def answer(model_dir: str) -> str:
    """What a Hugging Face model says, by its own chat template, greedily."""
    import torch  # takes seconds: not for --help

    from hydra_mcore import compat

    compat.install()
    from hydra_mcore.evaluation.hugging_face import HuggingFaceModel
    from hydra_mcore.model.runtime import process_groups
    from hydra_mcore.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(model_dir)
    chat = [{"role": "user", "content": QUESTION}]
    given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with process_groups():
        model = HuggingFaceModel(Path(model_dir), torch.float32)
        found_bs = model.generated(given["input_ids"], ANSWER_TOKENS, frozenset({tokenizer.eos_token_id}))
    said = " ".join(tokenizer.decode(found_bs[0], skip_special_tokens=True).split())
    return said or "(nothing: it ends its answer at once)"


if __name__ == "__main__":
    main()
