# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Head maps survive JSON and are refused by name when broken."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_mcore.config import ModelShape
from hydra_mcore.errors import InputError
from hydra_mcore.files import write_json
from hydra_mcore.heads import HEAD_MAP_FORMAT, HeadMap, HeadMapError, HeadsByKind, first_difference
from hydra_mcore.kinds import DEFAULT_LINEAR, FA, KINDS
from hydra_mcore.selection.choose import STRATEGIES
from tests.support.paths import ROOT

LAYERS, HEADS, GROUPS = 3, 4, 2
NAMES = ", ".join(KINDS)


MODEL = dataclasses.asdict(
    ModelShape(
        num_layers=3,
        hidden_size=12,
        num_heads=4,
        num_kv_groups=2,
        head_dim=4,
        ffn_hidden_size=8,
        vocab_size=10,
        native_length=8,
    )
)
SCHEMA = json.loads((ROOT / "docs" / "head_map.schema.json").read_text())


def some_map() -> HeadMap:
    facts = {"fingerprint": "abc", "model": MODEL, "strategy": "global_c", "made_by": {"seed": 7}}
    return HeadMap.from_fa([(0, 1), (2, 3), (2, 0)], LAYERS, HEADS, GROUPS, **facts)


@st.composite
def head_maps(draw) -> HeadMap:
    groups, group_size = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    heads = groups * group_size
    kept = draw(st.lists(st.sets(st.integers(0, heads - 1)), min_size=1, max_size=4))
    pairs = [(layer_idx, head_idx) for layer_idx, fa in enumerate(kept) for head_idx in fa]
    return HeadMap.from_fa(
        pairs, len(kept), heads, groups, fingerprint=draw(st.text(max_size=8).filter(str.isprintable))
    )


@given(head_maps())
@settings(deadline=None)
def test_json_keeps_a_map(head_map):
    again = HeadMap.from_dict(json.loads(json.dumps(head_map.to_dict())))
    assert again == head_map and again.made_by == head_map.made_by
    assert again.num_fa == sum(len(layer["fa"]) for layer in head_map.layers) == head_map.to_dict()["budget"]
    assert again.model == again.counts == head_map.counts, "a map without facts of a model names the counts alone"
    jsonschema.Draft202012Validator(SCHEMA).validate(again.to_dict())


def test_file_keeps_a_map(tmp_path):
    path = tmp_path / "new" / "map.json"
    some_map().save(path)
    again = HeadMap.load(path)
    assert again == some_map() and again.made_by == {"seed": 7} and again.model == MODEL
    assert list(path.parent.iterdir()) == [path], "nothing half-written stays"


def test_layers_hold_what_was_kept():
    head_map = some_map()
    assert head_map.layers == (
        HeadsByKind(fa=(1,), gdn=(0, 2, 3)),
        HeadsByKind(gdn=(0, 1, 2, 3)),
        HeadsByKind(fa=(0, 3), gdn=(1, 2)),
    )
    assert [list(layer) for layer in head_map.layers] == [["fa", "gdn"], ["gdn"], ["fa", "gdn"]]
    assert (head_map.num_layers, head_map.num_fa) == (3, 3)
    teacher = HeadMap.all_fa(LAYERS, HEADS, GROUPS)
    assert teacher.num_fa == LAYERS * HEADS and all(layer["gdn"] == () for layer in teacher.layers)


@pytest.mark.parametrize("pair", [(3, 0), (-1, 0), (0, 4), (0, -1)])
def test_heads_that_do_not_exist_are_refused(pair):
    with pytest.raises(HeadMapError, match=f"no head {pair[1]} in layer {pair[0]} of a 3 x 4 model"):
        HeadMap.from_fa([pair], LAYERS, HEADS, GROUPS)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != FA])
def test_other_heads_may_be_of_another_kind_in_each_layer(kind):
    counts, pairs = (LAYERS, HEADS, GROUPS), [(0, 1), (2, 3), (2, 0)]
    everywhere = HeadMap.from_fa(pairs, *counts, kind)
    assert everywhere == HeadMap.from_fa(pairs, *counts, [kind] * LAYERS)
    assert everywhere.layers[1] == HeadsByKind(**{kind: range(HEADS)})
    mixed = HeadMap.from_fa(pairs, *counts, [DEFAULT_LINEAR, kind, kind])
    assert mixed.layers == (some_map().layers[0], *everywhere.layers[1:])


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (FA, "3 kinds (fa) for the other heads of 3 layers; give one a layer, none of them fa"),
        ([DEFAULT_LINEAR, FA, DEFAULT_LINEAR], "3 kinds (fa, gdn) for the other heads of 3 layers; give one a layer"),
        ([DEFAULT_LINEAR] * 2, "2 kinds (gdn) for the other heads of 3 layers; give one a layer"),
        ([], "0 kinds () for the other heads of 3 layers"),
        ("soft", "no kind of heads is called 'soft'"),
    ],
)
def test_kinds_of_other_heads_that_cannot_be(others, message):
    with pytest.raises(HeadMapError, match=re.escape(message)):
        HeadMap.from_fa([(0, 1)], LAYERS, HEADS, GROUPS, others)


def broken(path: tuple, value) -> dict:
    """A map's JSON with one entry changed, or removed where the value is None."""
    raw = copy.deepcopy(some_map().to_dict())
    at = raw
    for step in path[:-1]:
        at = at[step]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), 1, "format 1, this version reads formats 2 and 3"),
        (("format",), None, "format None, this version reads formats 2 and 3"),
        (("layers", 1, "gdn"), [0, 1, 2, 4], "layer 1 lists head 4; heads are 0 to 3"),
        (("layers", 1, "gdn"), [0, 1, 2, -1], "layer 1 lists head -1; heads are 0 to 3"),
        (("layers", 1, "gdn"), [0, 1, 2, 3.5], r"layers\[1\]\['gdn'\]\[3\] is 3.5, which is no whole number"),
        (("layers", 1, "gdn"), [0, 1, 2, [3]], r"layers\[1\]\['gdn'\]\[3\] is \[3\]; expected a whole number"),
        (("layers", 1, "gdn"), [0, True, 2, 3], r"layers\[1\]\['gdn'\]\[1\] is True; expected a whole number"),
        (("layers", 1, "gdn"), ["0", 1, 2, 3], r"layers\[1\]\['gdn'\]\[0\] is '0'; expected a whole number"),
        (("layers", 1, "fa"), [2], "layer 1 lists head 2 twice; give it one kind"),
        (("layers", 1, "gdn"), [0, 1, 2, 3, 3], "layer 1 lists head 3 twice; give it one kind"),
        (("layers", 0, "fa"), [], f"layer 0 lacks head 1; give it a kind [(]of {NAMES}[)]"),
        (("layers",), [], "no layers"),
        (("layers", 1), None, "lists 2 layers but says num_layers 3"),
        (("budget",), 4, "lists 3 FA heads but says budget 4"),
        (("budget",), "3", "budget is '3'; expected a whole number"),
        (("budget",), None, "key 'budget' is missing"),
        (("model",), [3], r"model is \[3\]; expected keys and values"),
        (("layers",), 3, "layers is 3; expected a list"),
        (("layers",), None, "key 'layers' is missing"),
        (("made_by",), [], r"made_by is \[\]; expected keys and values"),
        (("colour",), 1, "unknown key 'colour'"),
        (("model", "num_kv_groups"), 3, "4 heads do not divide into 3 kv groups"),
        (("model", "num_kv_groups"), 0, "4 heads do not divide into 0 kv groups"),
        (("model", "num_heads"), 0, "0 heads do not divide"),
        (("model", "num_heads"), "4", "num_heads is '4'; expected a whole number"),
        (("model", "num_heads"), True, "num_heads is True; expected a whole number"),
        (("model", "num_heads"), 1e19, "num_heads is 1e[+]19, which is no whole number"),
        (("model", "num_heads"), 10**15, "layer 0 lacks head 4"),
        (("model", "num_layers"), 1e19, "num_layers is 1e[+]19, which is no whole number"),
        (("model", "num_kv_groups"), 10**15, "4 heads do not divide into 1000000000000000 kv groups"),
        (("strategy",), "a\nb", "one short line"),
        (("strategy",), "a" * 201, "one short line"),
        (("layers", 1, "gdn"), 3, r"layers\[1\]\['gdn'\] is 3; expected a list"),
        (("layers", 1), 3, r"layers\[1\] is 3; expected keys and values"),
        (("fingerprint",), 12, "fingerprint is 12; expected text"),
        (("layers", 0, "gdn"), None, f"layer 0 lacks head 0; give it a kind [(]of {NAMES}[)]"),
        (("layers", 0, "soft"), [0], f"layer 0: no kind of heads is called 'soft'; the kinds are {NAMES}$"),
        (("layers", 0, "self"), [0], f"layer 0: no kind of heads is called 'self'; the kinds are {NAMES}$"),
        (("layers", 0, "a\nb"), [], rf"layer 0: no kind of heads is called 'a\\nb'; the kinds are {NAMES}$"),
        (("model",), None, "key 'model' is missing"),
        (("model", "num_layers"), None, "key 'num_layers' is missing"),
        (("fingerprint",), None, "key 'fingerprint' is missing"),
        (("strategy",), None, "key 'strategy' is missing"),
    ],
)
def test_broken_maps_are_refused_by_name(path, value, message):
    with pytest.raises(HeadMapError, match=f"^head map: .*{message}"):
        HeadMap.from_dict(broken(path, value))


@pytest.mark.parametrize("raw", [[], "map", None, 3])
def test_json_that_is_no_map(raw):
    with pytest.raises(HeadMapError, match=f"format {type(raw).__name__!r}"):
        HeadMap.from_dict(raw)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"format": 3,', "not JSON"), (b"\xff\xfe\x00", "not JSON"), (None, "No such file")],
    ids=["cut", "binary", "missing"],
)
def test_files_that_are_no_map(tmp_path, content, message):
    if content is not None:
        (tmp_path / "map.json").write_bytes(content)
    with pytest.raises(HeadMapError, match=f"head map .*map.json: {message}") as refused:
        HeadMap.load(tmp_path / "map.json")
    assert isinstance(refused.value, InputError) and "\n" not in str(refused.value)


def test_a_map_of_format_2_is_read(tmp_path):
    """What the versions before head kinds wrote: fa and gdn of every layer, be they empty."""
    layers = [{"fa": [1], "gdn": [0, 2, 3]}, {"fa": [], "gdn": [0, 1, 2, 3]}, {"fa": [0, 3], "gdn": [1, 2]}]
    write_json(tmp_path / "map.json", some_map().to_dict() | {"format": 2, "layers": layers})
    again = HeadMap.load(tmp_path / "map.json")
    assert again == some_map() and again.model == MODEL and again.made_by == {"seed": 7}
    assert again.to_dict() == some_map().to_dict(), "written anew it is of the format of today"


def test_kinds_without_heads_may_be_left_out_or_be_empty():
    raw = some_map().to_dict()
    assert raw["format"] == 3 and raw["layers"][1] == {"gdn": [0, 1, 2, 3]}
    assert HeadMap.from_dict(broken(("layers", 1, "fa"), [])) == some_map()
    jsonschema.Draft202012Validator(SCHEMA).validate(broken(("layers", 1, "fa"), []))


def test_heads_by_kind_are_what_was_given_in_the_order_of_the_kinds():
    heads = HeadsByKind(gdn=(1, 2), fa=(0, 3))
    assert list(heads) == ["fa", "gdn"] and heads.heads == (0, 3, 1, 2) and heads["fa"] == (0, 3)
    assert heads == HeadsByKind(fa=[0, 3], gdn=[1, 2]) and hash(heads) == hash(HeadsByKind(fa=[0, 3], gdn=[1, 2]))
    assert heads != HeadsByKind(fa=[0, 3], gdn=[2, 1])
    alone = HeadsByKind(fa=(), gdn=(0,))
    assert alone["fa"] == () and "fa" not in alone and "gdn" in alone and len(alone) == 1
    assert alone == HeadsByKind(gdn=(0,)) == pickle.loads(pickle.dumps(alone))
    with pytest.raises(HeadMapError, match=f"^no kind of heads is called 'soft'; the kinds are {NAMES}$"):
        HeadsByKind(fa=(0,), soft=(1,))


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ({"fa": (0, 2), "gdn": (1, 3)}, {"gdn": (0, 1, 2, 3)}, ("FA", "0, 2", "none")),
        ({"fa": (0, 2), "gdn": (1, 3)}, {"fa": (0, 2), "gdn": (3, 1)}, ("GDN", "1, 3", "3, 1")),
    ],
)
def test_layers_that_differ_are_told_apart_by_their_first_kind_that_does(theirs, ours, said):
    assert first_difference(HeadsByKind(**theirs), HeadsByKind(**ours)) == said


def test_made_by_may_be_left_out():
    assert HeadMap.from_dict(broken(("made_by",), None)).made_by == {}


def test_a_saved_map_matches_the_schema(tmp_path):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for name, head_map in (("chosen", some_map()), ("teacher", HeadMap.all_fa(LAYERS, HEADS, GROUPS))):
        head_map.save(tmp_path / name)
        jsonschema.Draft202012Validator(SCHEMA).validate(json.loads((tmp_path / name).read_text()))


def test_the_schema_describes_all_that_a_map_holds():
    """Every property has words; every fact of a model, every key of a map and every strategy is named, and nothing
    else.
    """
    raw, known = some_map().to_dict(), SCHEMA["properties"]
    heads = known["layers"]["items"]["properties"]
    assert set(known) == set(raw) and set(known["model"]["properties"]) == set(MODEL) and list(heads) == list(KINDS)
    parts = [SCHEMA, *known.values(), *known["model"]["properties"].values(), known["layers"]["items"], *heads.values()]
    assert all(part["description"].endswith(".") for part in parts)
    assert known["format"]["const"] == HEAD_MAP_FORMAT
    assert known["strategy"]["examples"] == [*STRATEGIES, "teacher"]
    assert set(SCHEMA["required"]) == set(raw) - {"made_by"} and set(known["model"]["required"]) == set(
        some_map().counts
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 1),
        *(((key,), None) for key in ("format", "model", "fingerprint", "strategy", "budget", "layers")),
        (("surprise",), 1),
        (("model", "num_heads"), "4"),
        (("model", "num_kv_groups"), 0),
        (("model", "num_layers"), None),
        (("model", "rope_theta"), "large"),
        (("model", "colour"), 1),
        (("fingerprint",), 12),
        (("budget",), "3"),
        (("layers",), []),
        (("layers", 1), 3),
        (("layers", 1, "gdn"), None),
        (("layers", 0, "heads"), [1]),
        (("layers", 1, "gdn"), [0, 1, 2, -1]),
        (("layers", 1, "gdn"), [0, 1, 2, 3, 3]),
        (("layers", 1, "gdn"), [0, 1, 2, "3"]),
        (("layers", 1, "gdn"), 3),
        (("made_by",), []),
    ],
)
def test_the_schema_refuses_broken_maps(path, value):
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(broken(path, value))


def test_write_json_replaces_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}, "what was there survives a failed write"
