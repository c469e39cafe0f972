# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""docs/flags.md: it is what the tables say, the tables leave no flag out, and each flag meets its verdict in a dry run;
what works is read by code that trains.
"""

import argparse
import contextlib
import io
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.training.arguments import add_megatron_arguments

from hydra_mcore.config import ConfigError, add_stage_flags
from hydra_mcore.errors import InputError
from hydra_mcore.recipe import Recipe
from hydra_mcore.stages import default_flags
from hydra_mcore.train.arguments import ENGINE, ENGINE_CPU, resolve
from hydra_mcore.train.data import check_data
from hydra_mcore.train.flags import NEEDS_GPU, SUPPORTED, FlagParser, check_without_gpu, unused
from hydra_mcore.train.run import run_stage
from tests.support.flag_reads import settings_read
from tests.support.launch import run_ranks
from tests.support.paths import ROOT
from tests.support.stages import FLAGS, SHAPE, make_run, write_data
from tools.commands.flag_table import CARD, WORKS, WORKS_WITH_TE, megatron_flags, verdict
from tools.flag_table import main

ACTIONS = megatron_flags()
VERDICTS = {name: verdict(action) for name, action in ACTIONS.items()}
PARSER = add_stage_flags(add_megatron_arguments(FlagParser(allow_abbrev=False)))
ISSUE = ("num-experts", "sft", "hybrid-layer-pattern", "save", "load", "fp8-format", "use-precision-aware-optimizer")
KINDS = ("tensor-model", "pipeline-model", "context")
PP, TP, VPP = (f"{KINDS[1]}-parallel-size 2", f"{KINDS[0]}-parallel-size 2", "num-layers-per-virtual-pipeline-stage 1")
EVAL, WSD = "eval-iters 1 eval-interval 2 split 80,10,10", "lr-decay-style WSD lr-wsd-decay-iters 2"
CONSTANT = "ckpt-assume-constant-structure dist-ckpt-workers 2"
FULL = "recompute-granularity full recompute-method uniform recompute-num-layers 1"
SPLIT = f"{PP} account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split"
DECAY = "weight-decay-incr-style linear start-weight-decay 0.1 end-weight-decay 0.5"
PARTS, PARTS_OF_DATA = "data-path null split null train-data-path DIR/data", ("train", "valid", "test")
TRAININGS = [
    (
        *("extend", 1),
        f"{EVAL} {WSD} manual-gc log-params-norm profile save-interval 2 decoupled-lr 0.01 bf16 timing-log-level 2"
        " ckpt-fully-parallel-load wandb-project tiny",
    ),
    ("distill", 2, f"{PP} {VPP} {FULL} overlap-grad-reduce overlap-param-gather async-save {CONSTANT}"),
    ("align", 2, f"{TP} sequence-parallel recompute-granularity selective"),
]
# Values for flags that do not take the next best one, and what they need beside them; as words of a recipe.
TRIED = {
    "account-for-embedding-in-pipeline-split": SPLIT,
    "account-for-loss-in-pipeline-split": SPLIT,
    "context-parallel-size": "context-parallel-size 2",
    "data-args-path": "data-args-path DIR/blend.txt data-path null",
    "data-cache-path": "data-cache-path DIR/other",
    "data-path": "data-path DIR/other",
    "ddp-param-name-patterns-for-fp32-local-accumulation": (
        "bf16 grad-reduce-in-bf16 ddp-param-name-patterns-for-fp32-local-accumulation *norm*"
    ),
    "decoder-first-pipeline-num-layers": f"{PP} decoder-first-pipeline-num-layers 1",
    "decoder-last-pipeline-num-layers": f"{PP} decoder-last-pipeline-num-layers 1",
    "distribute-saved-activations": f"{TP} {FULL} distribute-saved-activations",
    "distributed-backend": "distributed-backend nccl",
    "end-weight-decay": DECAY,
    "eval-global-batch-size": f"{EVAL} eval-global-batch-size 4",
    "exit-signal": "exit-signal SIGUSR1",
    "fp8-format": "fp8-format hybrid",
    "global-batch-size": "global-batch-size 4",
    "lr-decay-iters": "lr-decay-iters 8",
    "lr-warmup-fraction": "lr-warmup-iters 0 lr-warmup-fraction 0.5",
    "lr-wsd-decay-iters": WSD,
    "lr-wsd-decay-style": f"{WSD} lr-wsd-decay-style linear",
    "micro-batch-size": "micro-batch-size 4",
    "min-lr": "min-lr 1e-7",
    "no-align-param-gather": "overlap-grad-reduce overlap-param-gather no-align-param-gather",
    "no-overlap-p2p-communication": f"{PP} no-overlap-p2p-communication",
    "num-layers-per-virtual-pipeline-stage": f"{PP} {VPP}",
    "num-virtual-stages-per-pipeline-rank": f"{PP} num-virtual-stages-per-pipeline-rank 2",
    "overlap-p2p-communication-warmup-flush": f"{PP} {VPP} overlap-p2p-communication-warmup-flush",
    "overlap-param-gather": "overlap-grad-reduce overlap-param-gather",
    "per-split-data-args-path": "per-split-data-args-path DIR/parts.json data-path null split null",
    "pipeline-model-parallel-layout": f"{PP} pipeline-model-parallel-layout Et|tttL",
    "pipeline-model-parallel-size": PP,
    "rampup-batch-size": "rampup-batch-size 2 2 16",
    "recompute-granularity": FULL,
    "recompute-method": f"{FULL} recompute-method block",
    "recompute-modules": "recompute-granularity selective recompute-modules core_attn moe",
    "recompute-num-layers": f"{FULL} recompute-num-layers 2",
    "sequence-parallel": f"{TP} sequence-parallel",
    "split": "split 90,10,0",
    "start-weight-decay": DECAY,
    "tensor-model-parallel-size": TP,
    "tensorboard-dir": "tensorboard-dir DIR/tensorboard",
    "test-data-path": f"{PARTS} test-data-path DIR/data",
    "train-data-path": PARTS,
    "valid-data-path": f"{PARTS} valid-data-path DIR/data",
    "weight-decay-incr-style": DECAY,
}
# Taken with FP8 alone, for which the heads here are too small: tests/te has others.
OF_FP8 = ("first-last-layers-bf16", "num-layers-at-start-in-bf16", "num-layers-at-end-in-bf16")
OF_TE = () if HAVE_TE else ("no-rope-fusion",)  # Megatron asks at once for the kernel: tests/te has it
# What a flag sets, and the name under which code that trains reads it.
READ_AS = {
    "accumulate_allreduce_grads_in_fp32": "grad_reduce_in_fp32",
    "bias_swiglu_fusion": "bias_activation_fusion",
    "ddp_average_in_collective": "average_in_collective",
    "ddp_bucket_size": "bucket_size",
    "ddp_num_buckets": "num_buckets",
    "ddp_pad_buckets_for_high_nccl_busbw": "pad_buckets_for_high_nccl_busbw",
    "ddp_param_name_patterns_for_fp32_local_accumulation": "param_name_patterns_for_fp32_local_accumulation",
    "ddp_reduce_scatter_with_fp32_accumulation": "reduce_scatter_with_fp32_accumulation",
    "decoder_first_pipeline_num_layers": "num_layers_in_first_pipeline_stage",
    "decoder_last_pipeline_num_layers": "num_layers_in_last_pipeline_stage",
    "grad_reduce_in_bf16": "grad_reduce_in_fp32",
    "num_layers_per_virtual_pipeline_stage": "virtual_pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank": "virtual_pipeline_model_parallel_size",
    "recompute_activations": "recompute_granularity",
}
# What the trainings below do not read, and who does.
READ_ELSEWHERE = {
    "disable_bf16_reduced_precision_matmul": "TransformerConfig sets torch's own switch as it checks itself",
    "merge_file": "the tokenizers of GPT-2",
    "special_tokens": "tokenizers of TikToken and SentencePiece",
    "tiktoken_num_special_tokens": "tokenizers of TikToken",
    "tokenizer_model": "all tokenizers but NullTokenizer",
    "vocab_file": "the tokenizers of GPT-2",
}


def values_of(words: str, folder: Path) -> dict[str, Any]:
    """The keys and values of a recipe, from words: a key that nothing follows is true, null drops what stands there."""
    found: dict[str, Any] = {}
    for word in words.replace("DIR", str(folder)).split():
        if f"--{word}" in PARSER._option_string_actions:
            key, found[word] = word, True
        elif word == "null":
            found[key] = None
        else:
            found[key] = [*found[key], word] if isinstance(found[key], list) else [word]
    return {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in found.items()}


# What the stage of the dry runs has before anything is tried.
BASE = ENGINE | ENGINE_CPU | default_flags("extend") | values_of(" ".join(FLAGS).replace("--", ""), Path())


def away_from_the_default(name: str, folder: Path) -> dict[str, Any]:
    """A flag with another value than the stage would have, and what it needs beside it."""
    action, stage = ACTIONS[name], BASE | SHAPE.to_recipe()
    if name in TRIED:
        return values_of(TRIED[name], folder)
    value = stage.get(name, action.default)
    value = value[0] if isinstance(value, list) and value else value
    if action.nargs == 0:
        return {name: stage.get(name) is not True}
    if action.choices:
        taken = SUPPORTED.get(name, ((), ""))[0]
        return {name: next(str(choice) for choice in action.choices if choice != value and choice not in taken)}
    if action.type in (int, float):
        value = float(value) / 2 + 0.25 if action.type is float and value is not None else int(value or 1) + 1
        return {name: [str(value)] * action.nargs if isinstance(action.nargs, int) else str(value)}
    return {name: "x"}


def dry_runs(rank: int, folder: Path, names: Iterable[str]) -> dict[str, str]:
    """What the stages say to each flag: "" where it is taken, else the line of its refusal. In a process of its own:
    some flags change torch's own settings at once.
    """
    said = {}
    recipe = folder / "recipe.yaml"
    for name in names:
        values = away_from_the_default(name, folder)
        os.environ["WORLD_SIZE"] = "2" if "2" in (values.get(f"{kind}-parallel-size") for kind in KINDS) else "1"
        recipe.write_text(yaml.safe_dump(BASE | {"data-path": str(folder / "data")} | values))
        flags = ["--stage", "extend", "--run-dir", str(folder / "run"), "--start-from", str(folder / "student")]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                run_stage([*flags, "--config", str(recipe), "--dry-run"])
            said[name] = ""
        except InputError as error:
            said[name] = str(error)
    return said


def check_verdicts(said: dict[str, str]) -> None:
    wrong = {}
    for name, line in said.items():
        action, taken = ACTIONS[name], VERDICTS[name].startswith("works") and name not in (*OF_FP8, *OF_TE)
        named = re.search(rf"\b({name}|{action.dest}|{action.dest.replace('_', '-')})\b", line)
        if taken != (not line) or (line and (not named or "\n" in line)):
            wrong[name] = line
    assert wrong == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("flags"))
    write_data(folder / "other", SHAPE.vocab_size)
    (folder / "blend.txt").write_text(f"1 {folder / 'data'}")
    (folder / "parts.json").write_text(json.dumps({part: ["1", str(folder / "data")] for part in PARTS_OF_DATA}))
    return folder


def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Where this fails, run python tools/flag_table.py --out docs/flags.md."""
    page = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    main([])
    assert capsys.readouterr().out == page
    main(["--out", str(tmp_path / "flags.md")])
    assert (tmp_path / "flags.md").read_text(encoding="utf-8") == page


def test_the_page_has_every_flag_once() -> None:
    page = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8").partition("\n## transformer configuration")[2]
    rows = [row.strip("|").split(" | ") for row in page.splitlines() if row.startswith("| ") and "`--" in row]
    found = [(flag, row.strip()) for row, flags in rows for flag in re.findall(r"`--(\S+)`", flags)]
    assert sorted(found) == sorted(VERDICTS.items())


def test_a_flag_that_nobody_judged_is_an_error() -> None:
    new = argparse.ArgumentParser().add_argument_group("training").add_argument("--brand-new")
    with pytest.raises(InputError, match="--brand-new was never judged"):
        verdict(new)


def test_the_lists_hold_no_flag_too_many() -> None:
    """Each flag stands in one list, and is one of Megatron's."""
    judged = [*WORKS, *WORKS_WITH_TE, *NEEDS_GPU, *SUPPORTED, *CARD]
    assert len(judged) == len(set(judged)) and set(judged) <= set(ACTIONS)
    assert [name for name in judged if unused(ACTIONS[name])] == []
    assert set(TRIED) <= set(ACTIONS) and set(READ_AS) | set(READ_ELSEWHERE) <= {a.dest for a in ACTIONS.values()}


def test_flags_meet_their_verdicts_in_a_dry_run(folder: Path) -> None:
    """A dozen of each kind; all of them in the slow test."""
    by_kind: dict[str, list[str]] = {}
    for name, said in sorted(VERDICTS.items()):
        by_kind.setdefault(said.split()[0], []).append(name)
    names = {name for flags in by_kind.values() for name in flags[:: max(1, len(flags) // 12)]}
    check_verdicts(run_ranks(dry_runs, 1, folder, sorted(names | set(ISSUE)))[0])
    assert [path.name for path in (folder / "run").iterdir()] == ["extend.dry_run.txt"]


@pytest.mark.slow
def test_every_flag_meets_its_verdict_in_a_dry_run(folder: Path) -> None:
    check_verdicts(run_ranks(dry_runs, 1, folder, sorted(VERDICTS), timeout=600)[0])
    assert [path.name for path in (folder / "run").iterdir()] == ["extend.dry_run.txt"]


@pytest.mark.parametrize("name", sorted({*NEEDS_GPU, "distributed-backend"}))
def test_without_a_gpu_its_flags_are_refused(name: str, tmp_path: Path) -> None:
    flags = Recipe("r", away_from_the_default(name, tmp_path)).to_flags(PARSER)
    with pytest.raises(ConfigError, match=f"{name}.* needs a GPU, and torch sees none"):
        check_without_gpu(PARSER, PARSER.parse_args(["--distributed-backend", "gloo", *flags]))


def test_training_asks_for_the_gpu_and_a_dry_run_does_not(folder: Path) -> None:
    run = ["--run-dir", str(folder / "run"), "--start-from", str(folder / "student"), "--data-path", "x"]
    flags = ["--stage", "extend", *FLAGS, *run, "--log-energy"]
    with pytest.raises(ConfigError, match="log-energy needs a GPU"):
        resolve(flags)
    assert "--log-energy" in resolve([*flags, "--dry-run"]).flags


def test_split_is_not_for_data_in_parts(folder: Path) -> None:
    args = argparse.Namespace(split="90,10,0", data_path=None, data_args_path=None, per_split_data_args_path=None)
    args.train_data_path, args.valid_data_path, args.test_data_path = [str(folder / "data")], None, None
    with pytest.raises(ConfigError, match=r"split is for data-path; .* leave it out"):
        check_data(args)


@pytest.mark.slow
def test_what_works_is_read_by_code_that_trains(folder: Path) -> None:
    found: set[str] = set()
    for number, (stage, ranks, words) in enumerate(TRAININGS):
        run, values = folder / f"read{number}", values_of(words, folder)
        flags = Recipe("r", BASE | {"data-path": str(folder / "data"), "train-iters": 4} | values).to_flags(PARSER)
        places = ["--run-dir", str(run), "--start-from", str(folder / "student"), "--teacher", str(folder / "teacher")]
        # the first training stops once, and its second start loads a checkpoint
        for steps in [["--exit-interval", "2"], []] if ranks == 1 else [[]]:
            found |= run_ranks(settings_read, ranks, ["--stage", stage, *flags, *places, *steps], timeout=300)[0]
    works = {ACTIONS[name].dest for name in WORKS}
    assert {dest for dest in works if READ_AS.get(dest, dest) not in found} == set(READ_ELSEWHERE)
