# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""One model in two formats is one model to evaluation; YaRN is transformers' own; folders that cannot be used
say why.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from hydra_mcore.config import HydraOptions, ModelCard
from hydra_mcore.convert.hf_export import export_hf
from hydra_mcore.convert.hf_import import import_hf
from hydra_mcore.convert.inherit import hybridize
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation import hugging_face, parallel
from hydra_mcore.evaluation.loading import describe, open_model
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.runtime import process_groups
from tests.support.paths import TINY_TEACHER
from tests.support.tiny_hf import ODD, random_tokens, tiny_model

HEAD_MAP = HeadMap.from_fa([(0, 1), (0, 5), *((2, h) for h in range(6))], 3, 6, 2, strategy="by hand")
YARN = 4.0


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with process_groups():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher as a Hugging Face directory and as our checkpoint, and a student as our checkpoint and exported."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: root / name for name in ("hf", "teacher", "student", "exported")}
    tiny_model("qwen3", folders["hf"])
    (folders["hf"] / "tokenizer_config.json").write_text("{}")
    (folders["hf"] / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "repetition_penalty": 9.0, "eos_token_id": 3})
    )
    import_hf(folders["hf"], folders["teacher"])
    hybridize(folders["teacher"], HEAD_MAP, HydraOptions(), folders["student"])
    export_hf(folders["student"], folders["exported"])
    return folders


@pytest.fixture(autouse=True)
def few_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hugging_face, parallel):
        monkeypatch.setattr(module, "LOGITS_AT_ONCE", 5 * 3 * ODD["vocab_size"])  # of three rows five positions


@pytest.mark.parametrize(
    ("ours", "theirs", "yarn"), [("teacher", "hf", None), ("teacher", "hf", YARN), ("student", "exported", None)]
)
def test_a_directory_is_the_checkpoint_of_the_same_weights(
    folders: dict[str, Path], ours: str, theirs: str, yarn: float | None
) -> None:
    ids_bs = random_tokens(3, 48)
    models = [open_model(describe(folders[name], yarn), torch.float64) for name in (ours, theirs)]
    (loss_bp, found_bp), (their_loss_bp, their_found_bp) = (model.token_losses(ids_bs) for model in models)
    torch.testing.assert_close(loss_bp, their_loss_bp, rtol=1e-6, atol=1e-6)
    assert torch.equal(found_bp, their_found_bp)
    for model in models:
        assert torch.equal(model.predicted(ids_bs, 30), found_bp[:, 29:])
        assert (model.replica, model.replicas, model.collect([1])) == (0, 1, [[1]])


@pytest.mark.parametrize("yarn", [None, YARN])
def test_a_directory_gives_what_transformers_gives(folders: dict[str, Path], yarn: float | None) -> None:
    """YaRN as the documentation of such models says to switch it on: in config.json."""
    ids_bs, hf_dir = random_tokens(3, 48), folders["hf"]
    scaling = {"rope_type": "yarn", "factor": YARN, "original_max_position_embeddings": ODD["max_position_embeddings"]}
    changes = {} if yarn is None else {"rope_parameters": {**ODD["rope_parameters"], **scaling}}
    plain = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float64, **changes)
    with torch.no_grad():
        logits_bsw = plain(ids_bs).logits
    loss_bp, found_bp = open_model(describe(hf_dir, yarn), torch.float64).token_losses(ids_bs)
    expected_bp = F.cross_entropy(logits_bsw[:, :-1].transpose(1, 2), ids_bs[:, 1:], reduction="none")
    torch.testing.assert_close(loss_bp.double(), expected_bp, rtol=1e-6, atol=1e-6)
    assert torch.equal(found_bp, logits_bsw[:, :-1].argmax(-1))


def test_yarn_changes_the_model(folders: dict[str, Path]) -> None:
    ids_bs = random_tokens(3, 48)
    with_and_without = [
        open_model(describe(folders["teacher"], yarn), torch.float64).token_losses(ids_bs)[0] for yarn in (None, YARN)
    ]
    assert (with_and_without[0] - with_and_without[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["hf", "exported"])
def test_greedy_decoding_takes_the_likeliest_token_again_and_again(folders: dict[str, Path], name: str) -> None:
    model, ids_bs = open_model(describe(folders[name]), torch.float64), random_tokens(3, 20)
    expected_bs = ids_bs
    for _ in range(9):
        expected_bs = torch.cat([expected_bs, model.predicted(F.pad(expected_bs, (0, 1)), expected_bs.shape[1])], dim=1)
    expected_br = expected_bs[:, 20:]
    assert torch.equal(model.generated(ids_bs, 9, frozenset()), expected_br)
    stop = int(expected_br[0, 3])
    for row, found in zip(
        expected_br.tolist(), model.generated(ids_bs, 9, frozenset({stop, 60})).tolist(), strict=True
    ):
        end = next((at for at, token in enumerate(row) if token in (stop, 60)), len(row))
        assert found == (row[: end + 1] + [row[end]] * 9)[:9] if end < 9 else found == row


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_models_whose_logits_are_scaled_or_capped(tmp_path: Path, family: str) -> None:
    """The output layer's product alone would give other losses."""
    changes = {
        "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
        "cohere": {"logit_scale": 0.25, "head_dim": None},
    }
    settings = {"hidden_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    plain = tiny_model(family, tmp_path, **settings, **changes[family]).double()
    (tmp_path / "tokenizer.json").write_text("{}")
    ids_bs = random_tokens(3, 48)
    with torch.no_grad():
        expected_bp = F.cross_entropy(plain(ids_bs).logits[:, :-1].transpose(1, 2), ids_bs[:, 1:], reduction="none")
    loss_bp, _ = open_model(describe(tmp_path), torch.float64).token_losses(ids_bs)
    torch.testing.assert_close(loss_bp.double(), expected_bp, rtol=1e-6, atol=1e-6)


def test_facts(folders: dict[str, Path]) -> None:
    heads, card = 3 * 6, ModelCard.load(folders["teacher"])
    teacher, hf, student, exported = (describe(folders[name]) for name in ("teacher", "hf", "student", "exported"))
    assert (teacher.stage, teacher.num_fa, teacher.lineage, teacher.strategy) == (
        "teacher",
        heads,
        card.fingerprint,
        "teacher",
    )
    assert (hf.stage, hf.num_fa, hf.lineage, hf.strategy) == ("qwen3", None, "", "")
    for facts in (student, exported):
        assert (facts.stage, facts.num_fa, facts.lineage, facts.strategy) == (
            "student",
            HEAD_MAP.num_fa,
            card.fingerprint,
            "by hand",
        )
    for facts in (teacher, hf, student, exported):
        assert (facts.num_heads, facts.native_length, facts.vocab_size, facts.yarn) == (
            heads,
            64,
            ODD["vocab_size"],
            None,
        )
        assert (facts.tokenizer_dir / "tokenizer_config.json").is_file()


def test_fingerprints(folders: dict[str, Path], tmp_path: Path) -> None:
    facts = {name: describe(folder) for name, folder in folders.items()} | {"yarn": describe(folders["teacher"], YARN)}
    assert len({fact.fingerprint for fact in facts.values()}) == len(facts)
    for name in ("hf", "teacher"):
        copy = shutil.copytree(folders[name], tmp_path / name)
        assert describe(copy).fingerprint == facts[name].fingerprint
        largest = max((path for path in copy.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1  # a weight
        largest.write_bytes(content)
        assert describe(copy).fingerprint != facts[name].fingerprint
    assert describe(folders["teacher"], 2.0).fingerprint != facts["yarn"].fingerprint


def test_no_code_of_a_folder_is_run(folders: dict[str, Path], tmp_path: Path) -> None:
    """Neither of a folder that calls itself an export of ours, nor of one that brings its own model."""
    ours = shutil.copytree(folders["exported"], tmp_path / "ours")
    for code in ours.glob("*.py"):
        code.write_text("raise SystemExit('run')")
    model, ids_bs = open_model(describe(ours), torch.float64), random_tokens(3, 48)
    untouched = open_model(describe(folders["exported"]), torch.float64)
    assert torch.equal(model.token_losses(ids_bs)[0], untouched.token_losses(ids_bs)[0])

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "own.py").write_text("raise SystemExit('run')")
    (foreign / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}))
    assert "transformers cannot read its config.json" in refusal(foreign)


def refusal(folder: Path, yarn: float | None = None) -> str:
    """The one line with which a folder is refused, when described or at the latest when opened."""
    with pytest.raises(InputError) as refused:
        open_model(describe(folder, yarn), torch.float32)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)
    return str(refused.value)


def test_folders_that_cannot_be_used(folders: dict[str, Path], tmp_path: Path) -> None:
    assert "neither a checkpoint of hydra_mcore (model.json) nor a Hugging Face directory (config.json)" in refusal(
        tmp_path / "none"
    )
    for name, tokenizer in (("teacher", "tokenizer"), ("hf", "tokenizer_config.json")):
        copy = shutil.copytree(folders[name], tmp_path / f"{name}-wordless", ignore=shutil.ignore_patterns(tokenizer))
        assert "no tokenizer there" in refusal(copy)
    assert "no weights" in refusal(
        shutil.copytree(folders["hf"], tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    )
    changed = shutil.copytree(folders["hf"], tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    for change in ({"num_hidden_layers": 4, "layer_types": None}, {"intermediate_size": 57}):
        (changed / "config.json").write_text(json.dumps(config | change))
        assert "its weights do not fit its config.json" in refusal(changed)
    weights = changed / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "its weights do not fit its config.json" in refusal(changed)


def test_models_that_yarn_cannot_stretch(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("student", "exported"):
        assert "leave YaRN out" in refusal(folders[name], YARN)
    for factor in (1.0, 0.5, float("nan"), float("inf")):
        for name in ("teacher", "hf"):
            assert "it must exceed 1" in refusal(folders[name], factor)
    scaled = {"rope_parameters": {**ODD["rope_parameters"], "rope_type": "linear", "factor": 2.0}}
    tiny_model("llama", tmp_path / "scaled", **scaled)
    shutil.copy(TINY_TEACHER / "tokenizer.json", tmp_path / "scaled")
    import_hf(tmp_path / "scaled", tmp_path / "checkpoint")
    for folder in (tmp_path / "scaled", tmp_path / "checkpoint"):
        assert "scaled already ('linear')" in refusal(folder, YARN)
