# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The decode benchmark: its table, its figure, and that it notices a cache of another size than the formula's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from hydra_mcore.config import ModelShape
from hydra_mcore.heads import HeadsByKind
from tests.support.hf_model import random_model
from tests.support.tiny_hf import tiny_qwen3
from tools.benchmark import main
from tools.benchmarks.decode import measured, prefills, random_decoders

SHAPE = ModelShape(
    num_layers=2, hidden_size=48, num_heads=6, num_kv_groups=2, head_dim=16, ffn_hidden_size=80, vocab_size=64,
    native_length=64
)  # fmt: skip
FLAGS = "--layers 2 --hidden 48 --heads 6 --kv-groups 2 --head-dim 16 --ffn 80 --vocabulary 64".split()
SMALL = "--lengths 40 72 --steps 3".split()


@pytest.fixture(scope="module", autouse=True)
def exported(tmp_path_factory) -> Path:
    """An exported model with layers of uneven kv groups, without FA and without GDN heads; keeps transformers' copies
    of code apart.
    """
    folder = tmp_path_factory.mktemp("hf")
    random_model(folder)
    return folder


def table(text: str) -> list[list[str]]:
    """The cells below the head of the first table."""
    lines = list(itertools.takewhile(bool, text[text.index("\n| ") + 1 :].splitlines()))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_table_and_figure(tmp_path, capsys):
    main(["decode", *FLAGS, *SMALL, "--fa-heads", "2", "3", "--figure", str(tmp_path / "decode.png")])
    rows = table(capsys.readouterr().out)
    maps = [f"{fa}% FA in {groups}% of kv groups" for fa in ("33.3", "50") for groups in (50, 100)]
    maps += [f"{maps[0]}, {kind}" for kind in ("KDA", "Lightning")]
    assert [row[:2] for row in rows] == [[length, name] for length in ("40", "72") for name in maps]
    assert all(row[-2] == "yes" for row in rows)
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["decode.png"]


def students(fa: Sequence[int]) -> HeadsByKind:
    return HeadsByKind.from_fa(fa, SHAPE.num_heads)


def test_bytes_and_calls_by_hand():
    """Float32, 2 layers: keys and values 128 bytes a token and group; 4 GDN heads: a 16 x 16 state, 3 inputs of 3 x 16
    channels each.
    """
    lengths = (9, 64)
    layers = [*map(students, ([0, 1], [0, 3])), HeadsByKind(fa=[0, 1], lightning=[2, 3, 4, 5])]
    found = list(measured(random_decoders(SHAPE, layers, "cpu", "float32"), lengths, steps=3))
    states, convolution = 2 * 4 * 16 * 16 * 4, 2 * 4 * 3 * 3 * 16 * 4
    for length, points in zip(lengths, found, strict=True):
        expected = {
            "teacher": 2 * 2 * 128 * length,
            "33.3% FA in 50% of kv groups": 2 * 1 * 128 * length + states + convolution,
            "33.3% FA in 100% of kv groups": 2 * 2 * 128 * length + states + convolution,
            "33.3% FA in 50% of kv groups, Lightning": 2 * 1 * 128 * length + states,
        }
        assert {point.name: point.cache_bytes for point in points} == expected
        assert {point.name: point.formula_bytes for point in points} == expected
        assert [(len(point.seconds), len(point.faults)) for point in points] == [(3, 3)] * 4
    # Tied embedding, final norm; a layer's norms, MLP, q and o, k and v, q_norm and k_norm.
    teacher = 64 * 48 + 48 + 2 * (2 * 48 + 3 * 80 * 48 + 2 * 96 * 48 + 2 * 32 * 48 + 2 * 16)
    assert found[0][0].read_bytes == 4 * teacher + 2 * 2 * 128 * 9


def test_stored_models(exported, tmp_path, capsys):
    tiny_qwen3(tmp_path)
    main(["decode", "--teacher-hf", str(tmp_path), "--hf", str(exported), *SMALL])
    name = f"{exported}: 50% FA in 66.7% of kv groups, KDA, Lightning"
    assert [(*row[:2], row[-2]) for row in table(capsys.readouterr().out)] == [("40", name, "yes"), ("72", name, "yes")]


def test_another_size_fails(exported, tmp_path, capsys):
    """A sliding window holds 8 bytes beside keys and values, and forgets."""
    tiny_qwen3(tmp_path, use_sliding_window=True, sliding_window=50, max_window_layers=2)
    with pytest.raises(SystemExit) as stop:
        main(["decode", "--teacher-hf", str(tmp_path), "--hf", str(exported), *SMALL])
    assert [row[-2] for row in table(capsys.readouterr().out)] == ["NO", "NO"]
    assert str(stop.value).endswith(": teacher at 40, teacher at 72")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lengths 40 44 --steps 3", "44 tokens after 40"),
        ("--lengths 5 --steps 3", "5 tokens after 0"),
        ("--hf .", "--teacher-hf go together"),
        ("--hf docs --teacher-hf .", "docs: no config.json"),
        ("--hf docs --teacher-hf . --kv-groups 4", "--kv-groups has no use"),
        ("--fa-heads 17", "17 FA heads"),
        ("--layers 1 --head-dim 5", "head_dim is 5"),
        ("--figure nowhere/decode.png", "no such folder"),
    ],
)
def test_bad_input_is_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["decode", *flags.split()])
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in error[-1] and error[-1].startswith("benchmark: ")


def test_a_prefill_reads_the_whole_prompt_in_one_call():
    decoders, lengths = random_decoders(SHAPE, [students([0, 1])], "cpu", "float32"), []
    decoders[1].model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].shape[1])
    )
    points = prefills(decoders, [24, 9], repeats=2)
    assert lengths == [9, 9, 9, 24, 24]  # the shortest warms up
    assert [(point.name, point.length, len(point.seconds)) for point in points[1::2]] == [
        (decoders[1].name, n, 2) for n in (9, 24)
    ]
