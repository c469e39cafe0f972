# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Which of Megatron's flags a stage takes, and with which values: what it does not is refused in one line that names
the flag.
"""

import argparse
import re
import runpy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml
from megatron.training.arguments import add_megatron_arguments

from hydra_mcore.config import ConfigError, ModelShape, StageOptions, add_stage_flags
from hydra_mcore.errors import InputError
from hydra_mcore.recipe import STAGE_SECTIONS, Recipe
from hydra_mcore.stages import default_flags
from hydra_mcore.train.arguments import ENGINE, ENGINE_CPU, ENGINE_GPU
from hydra_mcore.train.flags import UNUSED, FlagParser, check_values, flag_name, refusal, unused
from tests.support.paths import ROOT

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=32,
    num_heads=8,
    num_kv_groups=2,
    head_dim=8,
    ffn_hidden_size=48,
    vocab_size=64,
    native_length=64,
).to_recipe()
DEFAULTS = ENGINE | ENGINE_CPU | default_flags("extend") | {"split": "100,0,0", "data-path": "data"}
# What may stand in a recipe instead of the value that is meant.
ODD = [
    *"null true false x [] {} [[1]] [null] [true] .nan .inf -.inf -1 -5 0 -0.5 1.5 1e20 nan 2026-01-01"
    " 0x7fffffffffffffff".split(),
    *(
        '""',
        "{a: 1}",
        "[1, x]",
        "2026-01-01T10:00:00Z",
        "2026-13-45",
        "!!binary aGk=",
        '"\\ud800"',
        '"a\\nb"',
        '"--help"',
        '"-h"',
        "1:30",
    ),
    *("1" + "0" * 20, "1" + "0" * 400, "1" + "0" * 5000, "x" * 5000, "&a [*a]", "*a", "[" * 500, "{a: " * 500),
]


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return add_stage_flags(add_megatron_arguments(FlagParser(allow_abbrev=False)))


@pytest.fixture(scope="module")
def card(parser: argparse.ArgumentParser) -> argparse.Namespace:
    return parser.parse_args(Recipe("card", SHAPE).to_flags(parser))


def settle(
    parser: argparse.ArgumentParser, card: argparse.Namespace, values: dict[str, Any], *argv: str
) -> argparse.Namespace:
    """What a recipe and a command line come to, as ``resolve`` has it before it looks at files."""
    known = parser.parse_args([*Recipe("r.yaml", values).over(DEFAULTS).over(SHAPE).to_flags(parser), *argv])
    StageOptions(**{name: getattr(known, name) for name in StageOptions.__dataclass_fields__})
    check_values(parser, known, card, SHAPE)
    return known


BAD = """
seq-length 0; seq-length -5; train-iters 100000000000000000000; train-iters 0; train-samples 5; lr-decay-samples 5;
log-interval 0
split x; split nan; split inf; split 0,1,0; split 1,1,1,1; split 100,-1; split 1e3,0,0; log-interval -1;
exit-interval 0; eval-interval 0
micro-batch-size 0; micro-batch-size -1; global-batch-size 0; global-batch-size -8; rampup-batch-size 0 0 0; lr nan;
lr inf; lr -1
min-lr nan; weight-decay nan; weight-decay -0.1; clip-grad nan; clip-grad inf; adam-beta1 1; adam-beta2 nan; adam-eps 0
lr-warmup-fraction 2; lr-warmup-iters -1;
 seed -1; seed 0; seed 4294967296; lr 3e38; num-workers -1; num-workers 1000000; save-interval 0; eval-iters -1
optimizer sgd; optimizer muon; ckpt-format torch; transformer-impl inference_optimized; exit-signal SIGNONE;
exit-signal 15
tensor-model-parallel-size 0; pipeline-model-parallel-size 0; context-parallel-size 0; tensor-model-parallel-size -1
pipeline-model-parallel-size -1; context-parallel-size -1; num-layers-per-virtual-pipeline-stage 0;
recompute-num-layers 0
distributed-timeout-minutes 0; distributed-timeout-minutes 100000000; data-timeout inf; kl-weight nan; ce-weight inf;
kl-temperature inf
keep-last 0; keep-every -1; needle-length -1; profile-ranks -1; ddp-bucket-size 0"""


@pytest.mark.parametrize(
    "argv", [case.strip() for line in BAD.split("\n")[1:] for case in line.split(";") if case.strip()]
)
def test_values_are_refused_by_name(parser: argparse.ArgumentParser, card: argparse.Namespace, argv: str) -> None:
    name, *values = argv.split()
    with pytest.raises(ConfigError) as refused:
        settle(parser, card, {}, f"--{name}", *values)
    assert re.search(rf"\b{name}\b|\b{name.replace('-', '_')}\b", str(refused.value)) and "\n" not in str(refused.value)


def test_a_schedule_that_would_fill_the_memory_names_both_its_flags(
    parser: argparse.ArgumentParser, card: argparse.Namespace
) -> None:
    with pytest.raises(ConfigError, match="train-iters 1000000000 x global-batch-size 128 are more than"):
        settle(parser, card, {}, "--train-iters", "1000000000")
    with pytest.raises(ConfigError, match=r"--train-samples.*use train-iters"):
        settle(parser, card, {}, "--train-samples", "100")


def test_no_number_is_nan_infinite_or_endless(parser: argparse.ArgumentParser, card: argparse.Namespace) -> None:
    """All flags of whole and of other numbers, which are more than anybody would list."""
    tried = 0
    for action in parser._actions:
        if action.type not in (int, float) or unused(action) or flag_name(action) in SHAPE:
            continue
        for value in ("-1000",) if action.type is int else ("nan", "inf"):
            words = [f"{action.option_strings[0]}={value}"]
            if isinstance(action.nargs, int):
                words = [action.option_strings[0], *[value] * action.nargs]
            with pytest.raises(ConfigError) as refused:
                settle(parser, card, {}, *words)
            said = str(refused.value)
            assert flag_name(action) in said or action.dest in said, said
            tried += 1
    assert tried > 80


def test_the_shape_of_the_model_is_its_card_s(parser: argparse.ArgumentParser, card: argparse.Namespace) -> None:
    other = {"normalization": "LayerNorm", "position-embedding-type": "none"}
    for name, value in SHAPE.items():
        settle(parser, card, {name: value})
        wrong = other[name] if isinstance(value, str) else not value if isinstance(value, bool) else value + 1
        for ways in (
            {"values": {name: wrong}, "argv": []},
            {"values": {}, "argv": Recipe("c", {name: wrong}).to_flags(parser)},
        ):
            if not ways["values"] and not ways["argv"]:
                continue  # false on the command line: there is no such flag
            with pytest.raises(ConfigError, match="the card of the model says"):
                settle(parser, card, ways["values"], *ways["argv"])
    with pytest.raises(ConfigError, match="add-bias-linear is True, and the card of the model says False"):
        settle(parser, card, {"add-bias-linear": True})


def test_flags_that_do_nothing_are_refused_by_name(parser: argparse.ArgumentParser, card: argparse.Namespace) -> None:
    """Whatever their value, which is not even looked at: some of Megatron's are evaluated as Python."""
    refused = [
        action for action in parser._actions if action.option_strings and action.dest != "help" and unused(action)
    ]
    assert len(refused) > 400
    for action in refused:
        with pytest.raises(ConfigError, match=rf"{action.option_strings[0]}.* cannot be used here"):
            parser.parse_args([action.option_strings[0], *([] if action.nargs == 0 else ["[1]*9**9"])])


@pytest.mark.parametrize(
    "name",
    [
        *(
            "fp8-margin",
            "num-experts",
            "sft",
            "spec",
            "yaml-cfg",
            "trust-remote-code",
            "save",
            "load",
            "moe-layer-freq",
        ),
        *("hybrid-layer-pattern", "test-mode", "checkpoint-activations", "mock-data", "exp-avg-dtype"),
    ],
)
def test_recipes_cannot_ask_for_them_either(
    parser: argparse.ArgumentParser, card: argparse.Namespace, name: str
) -> None:
    value = True if parser._option_string_actions[f"--{name}"].nargs == 0 else "8"
    with pytest.raises(ConfigError, match=f"--{name}.* cannot be used here"):
        settle(parser, card, {name: value})


def test_the_table_of_unused_flags_has_no_line_too_many(parser: argparse.ArgumentParser) -> None:
    flags = [(flag_name(action), action.container.title) for action in parser._actions if action.option_strings]
    for patterns in UNUSED.values():
        assert set(re.findall(r"\[(.*?)\]", patterns)) <= {title for _, title in flags}
        for pattern in re.sub(r"\[.*?\]", "", patterns).split():
            assert any(fnmatchcase(name, pattern) for name, _ in flags), pattern


def test_what_is_documented_is_taken(parser: argparse.ArgumentParser) -> None:
    names = set(DEFAULTS) | set(ENGINE_GPU)
    for path in ROOT.glob("examples/*/*.yaml"):
        raw = yaml.safe_load(path.read_text())
        names |= {
            key
            for part in (raw, *(raw.get(stage) or {} for stage in STAGE_SECTIONS))
            if "task" not in raw
            for key in part
        }
    flags = {flag_name(action): action for action in parser._actions if action.option_strings}
    text = "\n".join(
        path.read_text()
        for path in [*ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")]
        if path.name not in ("LOG.md", "flags.md")  # where refused flags stand too
    )
    names |= set(re.findall(r"-m hydra_mcore\.train[^`\n]*", text) and re.findall(r"--([a-z][a-z-]+)", text)) & set(
        flags
    )
    assert [name for name in sorted(names & set(flags)) if unused(flags[name])] == []


def _fuzz(parser: argparse.ArgumentParser, card: argparse.Namespace, folder: Path, key: str, value: str) -> str:
    """How a recipe with an odd value ends: "" if it is taken, else the one line."""
    path = folder / "r.yaml"
    path.write_text(f"{key}: {value}\n")
    try:
        settle(parser, card, Recipe.load(path, "extend").values)
    except InputError as error:
        return str(error)
    return ""


def test_odd_values_in_recipes(parser: argparse.ArgumentParser, card: argparse.Namespace, tmp_path: Path) -> None:
    """A flag of each kind, times every odd value: taken, or one short line that names it."""
    for key in "run-dir kl-weight packed-documents seq-length split exit-signal profile-ranks".split():
        for value in ODD:
            said = _fuzz(parser, card, tmp_path, key, value)
            assert not said or (
                re.search(rf"{key}|{key.replace('-', '_')}|r\.yaml", said) and "\n" not in said and len(said) < 400
            ), said


@pytest.mark.slow
def test_odd_values_of_every_flag(parser: argparse.ArgumentParser, card: argparse.Namespace, tmp_path: Path) -> None:
    for action in parser._actions:
        if not action.option_strings or action.dest == "help" or unused(action):
            continue
        for value in ODD:
            said = _fuzz(parser, card, tmp_path, flag_name(action), value)
            names = rf"{flag_name(action)}|{action.dest}|{action.dest.replace('_', '-')}|r\.yaml"
            assert not said or (re.search(names, said) and "\n" not in said and len(said) < 400), said


CHECKS = """
def bare(args):
    assert args.min_lr <= args.lr
def worded(args):
    assert args.min_lr <= args.lr, '''too
        high'''
def raised(args):
    if args.lr < 1:
        raise ValueError("no good")
def crashed(args):
    return 1 % int(args.lr)
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bare", "args.min_lr <= args.lr (min-lr 1.0, lr 0.5)"),
        ("worded", "too high (min-lr 1.0, lr 0.5)"),
        ("raised", "no good (lr 0.5)"),
        ("crashed", "integer modulo by zero (lr 0.5)"),
    ],
)
def test_a_refusal_of_megatron_names_flags(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "checks.py").write_text(CHECKS)
    args = argparse.Namespace(min_lr=1.0, lr=0.5)
    with pytest.raises(Exception) as found:
        runpy.run_path(str(tmp_path / "checks.py"))[name](args)
    assert str(refusal(found.value, args)) == f"Megatron refuses these settings: {said}"
