# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Whatever stands in a model directory's small files: a card, or one line that names the file; never a traceback, never
the memory.
"""

import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from hydra_mcore.config import HydraOptions, ModelCard
from hydra_mcore.convert.families import CONFIG_KEYS, FAMILIES, ROPE_KEYS
from hydra_mcore.convert.hf_config import read_config
from hydra_mcore.convert.hf_weights import HfWeights
from hydra_mcore.convert.hydra_family import MODEL_TYPE, to_config
from hydra_mcore.errors import InputError
from hydra_mcore.heads import HeadMap
from tests.support.tiny_hf import tiny_qwen3

DEEP, HUGE = "[" * 900 + "]" * 900, "1" + "0" * 400
VALUES = (
    *(
        "null",
        "true",
        "false",
        '"x"',
        '"1e-6"',
        '""',
        "[]",
        "[1]",
        "[null]",
        "{}",
        '{"a": 1}',
        "[[[0]]]",
        '"\\ud800"',
        '"\\u0000"',
    ),
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "-1",
        "0",
        "-0.0",
        "1",
        "3",
        "2.5",
        "1e-300",
        "1e19",
        "10000000000000000000",
        "1e308",
        HUGE,
        DEEP,
    ),
)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 1.0,
}


def family_config(family: str, tmp_path: Path) -> dict[str, Any]:
    """A config.json of the odd tiny shape, of every family."""
    tiny_qwen3(tmp_path / "made")
    raw = json.loads((tmp_path / "made" / "config.json").read_text()) | {"hidden_size": 48}
    if family != MODEL_TYPE:
        return raw | {"model_type": family}
    (tmp_path / "made" / "config.json").write_text(json.dumps(raw))
    card = read_config(tmp_path / "made")
    heads = HeadMap.from_fa([(0, 1), (2, 3)], 3, 6, 2)
    stages = [{"stage": "align", "sequence_length": 32, "batch_size": 4, "iterations": 10}]
    options = {"head_map": heads, "options": HydraOptions(), "fingerprint": "ab", "stage": "align", "stages": stages}
    return to_config(ModelCard(shape=card.shape, **options), "float32")


def spoilt(raw: dict[str, Any], rng: random.Random, share: float) -> Iterator[tuple[str, str]]:
    """What was changed, and the text: each key dropped, and given each value (or a share of them, drawn)."""
    keys = {
        **dict.fromkeys(raw),
        **CONFIG_KEYS,
        "hidden_act": 0,
        "attention_bias": 0,
        "num_experts": 0,
        "quantization_config": 0,
    }
    for key in keys:
        if key in raw:
            yield f"{key} dropped", json.dumps({name: value for name, value in raw.items() if name != key})
        for value in VALUES:
            if rng.random() < share:
                text = json.dumps(raw | {key: "HERE"})
                yield f"{key} {value[:20]}", text.replace('"HERE"', value)
    for key in ROPE_KEYS:
        for value in VALUES:
            if rng.random() < share:
                for name in ("rope_parameters", "rope_scaling"):
                    yield (
                        f"{name} {key} {value[:20]}",
                        json.dumps(raw | {name: YARN | {key: "HERE"}}).replace('"HERE"', value),
                    )


def check(folder: Path, family: str, share: float) -> int:
    """Read every spoilt config.json; returns how many were accepted."""
    raw, accepted = family_config(family, folder), 0
    path = folder / "config.json"
    for what, text in spoilt(raw, random.Random(17), share):
        path.write_text(text)
        if share == 1:
            tracemalloc.start()
        try:
            card = read_config(folder)
            json.dumps(card.source, indent=1)
            accepted += 1
            if (
                family in FAMILIES and "-0.0" not in text
            ):  # which we take for 0, where transformers wants whole numbers written so
                kind = CONFIG_MAPPING[family](
                    **{key: value for key, value in json.loads(text).items() if key in CONFIG_KEYS}
                )
                assert (kind.rms_norm_eps, kind.num_key_value_heads) == (
                    card.shape.norm_epsilon,
                    card.shape.num_kv_groups,
                ), what
                assert kind.rope_parameters["rope_theta"] == card.shape.rope_theta, what
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 2000, (what, str(error))
        except Exception as error:
            raise AssertionError(f"{family}: {what}: {type(error).__name__} {error}") from error
        finally:
            assert tracemalloc.get_traced_memory()[1] < 100e6, what
            tracemalloc.stop()
    return accepted


FAMILY_NAMES = [*FAMILIES, MODEL_TYPE]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_configs_of_other_values(tmp_path, family):
    assert check(tmp_path, family, 0.05) > 10


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_configs_of_other_values_all(tmp_path, family):
    assert check(tmp_path, family, 1.0) > 10


NAMED = [
    *(("rms_norm_eps", value) for value in (float("nan"), -1, "x", [], {}, "1e-6", 0, 1e19)),
    *(("tie_word_embeddings", value) for value in ("x", 1, None)),
    *(("rope_theta", value) for value in (float("nan"), float("inf"), True, -1, 0)),
    *(
        (key, 1e19)
        for key in ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "max_position_embeddings")
    ),
    *((key, 10**9) for key in ("num_hidden_layers", "num_attention_heads", "head_dim")),
    *(("model_type", value) for value in (3, [], {}, None, True)),
    *(("layer_types", value) for value in (3, "x", [3], {}, [None] * 3)),
    *(
        ("rope_scaling", value)
        for value in (3, "x", [3], {"rope_type": []}, {"type": None}, {"rope_type": "yarn", "factor": "x"})
    ),
    ("rope_scaling", YARN | {"attention_factor": []}),
    ("eos_token_id", "x"),
]


@pytest.mark.parametrize(("key", "value"), NAMED, ids=lambda value: str(value)[:30])
def test_the_line_names_the_key(tmp_path, key, value):
    raw = {
        name: item
        for name, item in family_config("llama", tmp_path).items()
        if key != "rope_theta" or name != "rope_parameters"
    }
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
    tracemalloc.start()
    with pytest.raises(InputError) as caught:
        read_config(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert key.removeprefix("rope_scaling") in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)


NAMES = (
    "../x.safetensors",
    "/dev/zero",
    "/etc/passwd",
    "x\0.safetensors",
    "",
    ".",
    "a/b.safetensors",
    "none.safetensors",
)
INDICES = (
    *(
        "[]",
        "{",
        '{"weight_map": []}',
        '{"weight_map": {"a": 3}}',
        DEEP,
        '{"weight_map": {"\\ud800": "x.safetensors"}}',
    ),
    *(json.dumps({"weight_map": {"a": name}}) for name in (*NAMES, "x" * 5000 + ".safetensors")),
)


@pytest.mark.parametrize("text", INDICES, ids=lambda text: text[:40])
def test_indices_of_other_values(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError) as caught:
        HfWeights(tmp_path, tied=False)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_garbled_safetensors(tmp_path):
    """Every prefix of a header, lengths that lie, and bits turned over: tensors as they were, or one line."""
    tiny_qwen3(tmp_path)
    path, rng = tmp_path / "model.safetensors", random.Random(5)
    whole = path.read_bytes()
    shapes = {name: HfWeights(tmp_path, False).shape(name) for name in HfWeights(tmp_path, False).names()}
    lengths = [number.to_bytes(8, "little") + whole[8:] for number in (0, 1, 2**31, 2**62, 2**64 - 1)]
    flipped = []
    for place in (rng.randrange(3000) for _ in range(150)):
        flipped.append(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
    refused = 0
    for data in (*(whole[:size] for size in (0, 1, 7, 8, 9, 100, 1000, len(whole) - 1)), *lengths, *flipped):
        path.write_bytes(data)
        try:
            weights = HfWeights(tmp_path, tied=False)
            for name in weights.names():
                weights.read(name)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and str(tmp_path) in str(error)
    assert refused > 50 and len(shapes) > 30
