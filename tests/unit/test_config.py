# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings are checked one by one, cards survive their file, recipes become exactly the flags they say."""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from typing import Literal

import pytest

from hydra_mcore.config import (
    CARD_NAME,
    ConfigError,
    HydraOptions,
    ModelCard,
    ModelShape,
    StageOptions,
    add_flags,
    field_docs,
)
from hydra_mcore.errors import InputError
from hydra_mcore.heads import HeadMap, HeadMapError
from hydra_mcore.stages import STAGES

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_groups=2,
    head_dim=16,
    ffn_hidden_size=48,
    vocab_size=64,
    native_length=128,
    rope_theta=1e4,
    tied_embeddings=False,
    qkv_bias=True,
    rope_scaling={"rope_type": "linear", "factor": 2.0},
)
FACTS = dataclasses.asdict(SHAPE)
FINGERPRINT = "0123456789abcdef"


def card() -> ModelCard:
    head_map = HeadMap.from_fa([(0, 1)], 2, 4, 2, fingerprint=FINGERPRINT, made_by={"seed": 3})
    options = HydraOptions(fusion="norm", gdn_conv_kernel=0)
    return ModelCard(shape=SHAPE, head_map=head_map, options=options, fingerprint=FINGERPRINT, stage="align")


LITERALS = [
    (cls, name, typing.get_args(hint))
    for cls in (HydraOptions, StageOptions)
    for name, hint in typing.get_type_hints(cls).items()
    if typing.get_origin(hint) is Literal
]


@pytest.mark.parametrize(("cls", "name", "choices"), LITERALS, ids=[name for _, name, _ in LITERALS])
def test_named_choices(cls, name, choices):
    for choice in choices:
        assert getattr(cls(**{name: choice}), name) == choice
    with pytest.raises(ConfigError, match=f"^{name} is 'sideways'; choose one of .*{choices[-1]}"):
        cls(**{name: "sideways"})


NAN = float("nan")


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (HydraOptions, {"gdn_conv_kernel": -1}, "gdn_conv_kernel is -1; it counts taps"),
        (HydraOptions, {"gdn_write_max": 0.0}, "gdn_write_max is 0.0; .* 0 < max <= 2"),
        (HydraOptions, {"gdn_write_max": 2.5}, "gdn_write_max is 2.5"),
        (HydraOptions, {"gdn_write_max": NAN}, "gdn_write_max is nan"),
        (HydraOptions, {"fa_log_scale_base": 1.0}, "fa_log_scale_base must exceed 1"),
        (HydraOptions, {"fa_log_scale_base": NAN}, "fa_log_scale_base must exceed 1"),
        (HydraOptions, {"gdn_half_life": 0.0}, "gdn_half_life must exceed 0"),
        (HydraOptions, {"gdn_half_life": NAN}, "gdn_half_life must exceed 0"),
        (HydraOptions, {"kda_conv_kernel": 2**12 + 1}, "kda_conv_kernel is 4097; it counts taps"),
        (HydraOptions, {"kda_write_max": NAN}, "kda_write_max is nan"),
        (HydraOptions, {"kda_half_life": -1.0}, "kda_half_life must exceed 0"),
        (HydraOptions, {"lightning_slope": 0.0}, "lightning_slope is 0.0; choose 0 < slope <= 1"),
        (HydraOptions, {"lightning_slope": 1.5}, "lightning_slope is 1.5"),
        (HydraOptions, {"lightning_slope": NAN}, "lightning_slope is nan"),
        (StageOptions, {"kl_temperature": 0.0}, "kl_temperature is .*; it must be a number of at least 1e-06"),
        (StageOptions, {"kl_temperature": NAN}, "kl_temperature is .*; it must be a number of at least 1e-06"),
        (StageOptions, {"kl_weight": -0.1}, "_weight is .*; it must be a number of at least 0"),
        (StageOptions, {"ce_weight": -1.0}, "_weight is .*; it must be a number of at least 0"),
        (StageOptions, {"ce_weight": NAN}, "_weight is .*; it must be a number of at least 0"),
    ],
)
def test_numbers_out_of_range(cls, changes, message):
    with pytest.raises(ConfigError, match=message):
        cls(**changes)


def test_edges_of_the_ranges_are_allowed():
    HydraOptions(gdn_conv_kernel=0, gdn_write_max=2.0, fa_log_scale_base=1.01, gdn_half_life=0.5, lightning_slope=1.0)
    StageOptions(kl_weight=0.0, ce_weight=0.0, kl_temperature=0.1)


def test_the_teacher_has_nothing_added():
    teacher = HydraOptions.teacher()
    assert (teacher.fa_position, teacher.fa_gate, teacher.fusion) == ("rope", "none", "none")
    assert not any(teacher.log_scale_in(stage) for stage in ("align", "distill", "extend", "inference"))


@pytest.mark.parametrize(
    ("option", "stages"),
    [("never", ()), ("extend", ("extend", "inference")), ("always", ("align", "distill", "extend", "inference"))],
)
def test_when_queries_are_scaled(option, stages):
    options = HydraOptions(fa_log_scale=option)
    assert tuple(s for s in ("align", "distill", "extend", "inference") if options.log_scale_in(s)) == stages


def test_the_stages_are_those_of_the_table():
    assert typing.get_args(typing.get_type_hints(StageOptions)["stage"]) == tuple(STAGES)


def test_every_option_is_documented():
    for cls in (HydraOptions, StageOptions):
        docs = field_docs(cls)
        assert list(docs) == [item.name for item in dataclasses.fields(cls)] and all(docs.values())


def options_parser(cls: type) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="p", exit_on_error=False)
    add_flags(parser.add_argument_group(cls.__name__), cls)
    return parser


def test_flags_default_to_the_dataclass_and_take_its_types(capsys):
    layer, stage = options_parser(HydraOptions), options_parser(StageOptions)
    for cls, parser in ((HydraOptions, layer), (StageOptions, stage)):
        assert cls(**vars(parser.parse_args([]))) == cls()
        parser.print_help()  # a bare % in a docstring would raise here
    assert "[paper: nope]" in capsys.readouterr().out
    found = layer.parse_args(["--gdn-half-life", "30", "--gdn-conv-kernel", "2", "--fusion", "norm"])
    assert (found.gdn_half_life, found.gdn_conv_kernel, found.fusion) == (30.0, 2, "norm")
    found = stage.parse_args(["--dry-run", "--run-dir", "r"])
    assert found.dry_run is True and found.run_dir == "r"
    with pytest.raises(argparse.ArgumentError, match="invalid choice: 'sideways'"):
        layer.parse_args(["--fusion", "sideways"])


def test_a_card_survives_its_file(tmp_path):
    card().save(tmp_path)
    again = ModelCard.load(tmp_path)
    assert again == card() and again.head_map.made_by == {"seed": 3}
    assert [path.name for path in tmp_path.iterdir()] == [CARD_NAME]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw | {"format": 9}, "format 9, this version reads 2; make the checkpoint again"),
        (lambda raw: {key: raw[key] for key in raw if key != "format"}, "format None"),
        (lambda raw: [raw], "format 'list'"),
        (lambda raw: {key: raw[key] for key in raw if key != "shape"}, "key 'shape' is missing"),
        (lambda raw: {key: raw[key] for key in raw if key != "stage"}, "key 'stage' is missing"),
        (
            lambda raw: raw | {"shape": raw["shape"] | {"depth": 3}},
            "shape: unknown key 'depth'; written by another version",
        ),
        (
            lambda raw: raw | {"options": raw["options"] | {"gdn_tea": 1}},
            "options: unknown key 'gdn_tea'; written by another version",
        ),
        (lambda raw: raw | {"options": raw["options"] | {"fusion": "new"}}, "fusion is 'new'"),
        (
            lambda raw: raw | {"options": raw["options"] | {"gdn_conv_kernel": "4"}},
            "options: gdn_conv_kernel is '4'; expected a whole number",
        ),
        (
            lambda raw: raw | {"shape": raw["shape"] | {"num_layers": 3}},
            "the head map has .*'num_layers': 2.*, the shape others",
        ),
        (
            lambda raw: raw | {"shape": raw["shape"] | {"hidden_size": 10**15}},
            "hidden_size is 1000000000000000; it must be from 1 to",
        ),
        (
            lambda raw: raw | {"shape": raw["shape"] | {"norm_epsilon": float("nan")}},
            "shape: norm_epsilon is nan, which is no number",
        ),
        (lambda raw: raw | {"stages": [{"stage": "align"}]}, r"stages\[0\]: key 'sequence_length' is missing"),
        (lambda raw: raw | {"source": {"dtype": 3}}, "source: dtype is 3; expected text"),
    ],
)
def test_broken_cards(tmp_path, change, message):
    card().save(tmp_path)
    path = tmp_path / CARD_NAME
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ConfigError, match=message):
        ModelCard.load(tmp_path)


def test_cards_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"no model.json, .*; make one with tools/convert.py import"):
        ModelCard.load(tmp_path)
    for content in (b'{"format"', b"\xff\xfe"):
        (tmp_path / CARD_NAME).write_bytes(content)
        with pytest.raises(ConfigError, match=r"model.json: not JSON"):
            ModelCard.load(tmp_path)


def test_a_card_names_the_broken_head_map(tmp_path):
    card().save(tmp_path)
    path = tmp_path / CARD_NAME
    raw = json.loads(path.read_text())
    raw["head_map"]["layers"][1]["gdn"] = [0, 1, 2]
    path.write_text(json.dumps(raw))
    with pytest.raises(HeadMapError, match="layer 1 lacks head 3"):
        ModelCard.load(tmp_path)


def test_head_maps_that_fit_a_teacher():
    card().check_head_map(card().head_map)
    card().check_head_map(HeadMap.from_fa([(1, 1)], 2, 4, 2))  # no fingerprint, no facts: any model of this shape
    card().check_head_map(HeadMap.from_fa([(1, 1)], 2, 4, 2, model=FACTS))
    card().check_head_map(HeadMap.from_fa([(1, 1)], 2, 4, 2, model=FACTS, fingerprint=FINGERPRINT))


@pytest.mark.parametrize(
    ("head_map", "message"),
    [
        (HeadMap.from_fa([], 3, 4, 2), "num_layers is 3 there, 2 in the teacher"),
        (HeadMap.from_fa([], 2, 8, 2), "num_heads is 8 there, 4 in the teacher"),
        (HeadMap.from_fa([], 2, 4, 4), "num_kv_groups is 4 there, 2 in the teacher"),
        (HeadMap.from_fa([], 2, 4, 2, fingerprint="f" * 64), "weights ffffffffffff there, 0123456789ab in the teacher"),
        (
            HeadMap.from_fa([], 2, 4, 2, model=FACTS, fingerprint="f" * 64),
            "weights ffffffffffff there, 0123456789ab in the teacher",
        ),
        (
            HeadMap.from_fa(
                [], 2, 4, 2, model=FACTS | {"rope_theta": 1e6}, fingerprint="f" * 64
            ),  # a fact is named before the weights
            "rope_theta is 1000000.0 there, 10000.0 in the teacher",
        ),
        (
            HeadMap.from_fa([], 2, 4, 2, model={"tied_embeddings": True}),
            "tied_embeddings is True there, False in the teacher",
        ),
        (HeadMap.from_fa([], 2, 4, 2, model={"colour": 7}), "colour is 7 there, None in the teacher"),
    ],
)
def test_head_maps_of_another_teacher(head_map, message):
    with pytest.raises(ConfigError) as refused:
        card().check_head_map(head_map)
    assert str(refused.value) == f"the head map is for another model: {message}; select heads for this teacher"
    assert isinstance(refused.value, InputError)


@pytest.mark.parametrize("name", list(FACTS))
def test_every_fact_of_a_shape_tells_models_apart(name):
    mine = FACTS[name]
    theirs = not mine if isinstance(mine, bool) else None if name == "rope_scaling" else mine * 2
    assert (
        card().difference(FACTS | {name: theirs}, FINGERPRINT)
        == f"{name} is {theirs} there, {FACTS[name]} in the teacher"
    )
    assert card().difference({name: FACTS[name]}, FINGERPRINT) == ""


def test_a_shape_as_megatron_flags():
    """Every fact of the shape reaches the flag that Megatron reads it from."""
    found = SHAPE.to_recipe()
    expected = {
        "num-layers": 2,
        "hidden-size": 32,
        "num-attention-heads": 4,
        "num-query-groups": 2,
        "kv-channels": 16,
        "ffn-hidden-size": 48,
        "vocab-size": 64,
        "rotary-base": 10_000,
        "norm-epsilon": 1e-6,
        "untie-embeddings-and-output-weights": True,
        "qk-layernorm": True,
        "add-qkv-bias": True,
    }
    assert {key: found[key] for key in expected} == expected
