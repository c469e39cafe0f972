# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that travel: out to Hugging Face and back, bit for bit; what cannot be written is refused in one line."""

import json
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hydra_mcore.config import ConfigError, HydraOptions, ModelCard
from hydra_mcore.convert.hf_config import HuggingFaceError
from hydra_mcore.convert.hf_export import export_hf
from hydra_mcore.convert.hf_import import import_hf
from hydra_mcore.convert.inherit import hybridize
from hydra_mcore.convert.origin import origin
from hydra_mcore.convert.tensor_table import tensor_rules
from hydra_mcore.corpus.hub import model_folder
from hydra_mcore.errors import InputError
from hydra_mcore.heads import HeadMap, HeadsByKind
from hydra_mcore.model.build import load_model
from hydra_mcore.model.checkpoints import load_weights, save_weights
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.model.streaming import StoredTensors
from tests.support.paths import ROOT
from tests.support.tiny_hf import random_tokens, tiny_model

COMMAND = ROOT / "tools" / "convert.py"
# A layer with heads of every kind, one without FA heads, one of these alone; 6 heads in 2 kv groups.
LAYERS = (
    HeadsByKind(fa=(1, 5), gdn=(0,), kda=(2, 3), lightning=(4,)),
    HeadsByKind(gdn=(0, 4), kda=(5,), lightning=(1, 2, 3)),
    HeadsByKind(fa=range(6)),
)
HEAD_MAP = HeadMap(num_heads=6, num_kv_groups=2, layers=LAYERS, strategy="by hand", made_by={"seed": 3})
OPTIONS = [
    {},
    {
        "fa_gate": "headwise",
        "gdn_gate": "elementwise",
        "fusion": "competition",
        "gate_order": "after_norm",
        "gdn_conv_activation": "silu",
        "kda_conv_kernel": 2,
        "kda_gate": "headwise",
        "kda_qk_norm": "none",
        "lightning_gate": "headwise",
        "lightning_slope": 0.5,
    },
    {
        "fa_gate": "none",
        "gdn_gate": "headwise",
        "gdn_conv_kernel": 0,
        "gdn_qk_norm": "none",
        "fusion": "norm",
        "gate_activation": "silu",
        "kda_conv_activation": "silu",
        "kda_gate": "elementwise",
        "kda_write_max": 2.0,
        "lightning_qk_norm": "none",
    },
    {
        "gdn_kv": "per_group",
        "fusion_norm_weight": "none",
        "fa_position": "rope",
        "gdn_position": "nope",
        "fa_log_scale": "never",
        "kda_kv": "per_group",
        "kda_position": "nope",
        "kda_conv_kernel": 0,
        "lightning_kv": "per_group",
        "lightning_position": "nope",
        "lightning_gate": "none",
    },
    {"qkv": "shared", "fusion": "none", "gdn_write_max": 2.0},
]


@pytest.fixture(scope="module", autouse=True)
def one_process():
    with process_groups():
        yield


def tensors_of(hf_dir: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(hf_dir.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert {name: tensor.dtype for name, tensor in left.items()} == {
        name: tensor.dtype for name, tensor in right.items()
    }
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def stored_tensors(checkpoint_dir: Path) -> dict[str, torch.Tensor]:
    stored = StoredTensors(checkpoint_dir)
    return {rule.stored: stored.read(rule.stored) for rule in tensor_rules(ModelCard.load(checkpoint_dir)).values()}


def logits_of(checkpoint_dir: Path, tokens_bs: torch.Tensor) -> torch.Tensor:
    _, model = load_model(checkpoint_dir)
    with torch.no_grad():
        return model(tokens_bs, torch.arange(tokens_bs.shape[1])[None], None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("family", "changes", "shard_size"),
    [
        ("qwen3", {"tie_word_embeddings": True}, "1GB"),
        ("qwen2", {"tie_word_embeddings": False, "vocab_size": 97}, "20KB"),
        ("llama", {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}}, "1GB"),
    ],
    ids=["qwen3", "qwen2", "llama"],
)
def test_a_teacher_comes_back_bit_for_bit(tmp_path, family, changes, shard_size, dtype):
    tiny_model(family, **changes).to(getattr(torch, dtype)).save_pretrained(tmp_path / "hf", max_shard_size=shard_size)
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"96": "<think>"}}')
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back", max_shard_bytes=20_000)
    assert_same_tensors(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back"))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((tmp_path / "hf" / name).read_text()), (
            name
        )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert_same_tensors(
        dict(again.named_parameters()), dict(AutoModelForCausalLM.from_pretrained(tmp_path / "hf").named_parameters())
    )


def test_mixed_dtypes_and_a_stored_copy_of_a_tied_output_layer_come_back_too(tmp_path):
    tiny_model("qwen3", tmp_path / "hf", tie_word_embeddings=True)
    path = tmp_path / "hf" / "model.safetensors"
    tensors = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, metadata={"format": "pt"}
    )
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_same_tensors(load_file(path), tensors_of(tmp_path / "back"))
    export_hf(tmp_path / "checkpoint", tmp_path / "rounded", torch.bfloat16)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "rounded").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "rounded", dtype="auto").dtype == torch.bfloat16


def student(tmp_path: Path, family: str, options: dict, **changes: object) -> Path:
    """A student whose every weight is random, so that no start value hides a mix-up."""
    tiny_model(family, tmp_path / "hf", **changes)
    (tmp_path / "hf" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A tiny model\n")
    import_hf(tmp_path / "hf", tmp_path / "teacher")
    hybridize(tmp_path / "teacher", HEAD_MAP, HydraOptions(**options), tmp_path / "start")
    card, model = load_model(tmp_path / "start")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(
                part in name
                for part in ("norm", "scale", "conv", "A_log", "gate", "decay", "write", "bias", "competition")
            ):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    stages = [{"stage": "align", "sequence_length": 32, "batch_size": 4, "iterations": 10}]
    save_weights([model], replace(card, stage="align", stages=stages), tmp_path / "student")
    return tmp_path / "student"


@pytest.mark.parametrize(
    ("family", "options"),
    [("qwen3", OPTIONS[0]), ("qwen3", OPTIONS[4]), *zip(["qwen2", "llama", "qwen2"], OPTIONS[1:4], strict=True)],
)
def test_a_student_computes_the_same_in_hugging_face_and_comes_back_bit_for_bit(tmp_path, family, options):
    checkpoint = student(tmp_path, family, options)
    export_hf(checkpoint, tmp_path / "hydra", max_shard_bytes=30_000)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hydra", trust_remote_code=True)
    tokens_bs = random_tokens(length=150)
    with torch.no_grad():
        expected, found = logits_of(checkpoint, tokens_bs), exported(tokens_bs).logits
    assert expected.std() > 0.5, "flat logits would prove nothing"
    assert (found - expected).abs().max() < 1e-4
    kl = torch.nn.functional.kl_div(
        found.double().log_softmax(-1), expected.double().log_softmax(-1), log_target=True, reduction="none"
    )
    assert kl.sum(-1).mean() < 1e-9

    back = import_hf(tmp_path / "hydra", tmp_path / "back")
    card = ModelCard.load(checkpoint)
    assert back == ModelCard.load(tmp_path / "back") == card
    assert back.stages == card.stages
    assert (back.head_map.strategy, back.head_map.made_by) == ("by hand", {"seed": 3})
    assert_same_tensors(stored_tensors(checkpoint), stored_tensors(tmp_path / "back"))
    assert torch.equal(logits_of(tmp_path / "back", tokens_bs), expected)
    export_hf(tmp_path / "back", tmp_path / "again", max_shard_bytes=30_000)
    for path in (tmp_path / "hydra").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def trained(checkpoint: Path, **facts: object) -> Path:
    """The checkpoint as if its last stage had been another."""
    card = ModelCard.load(checkpoint)
    replace(card, stages=[card.stages[0] | facts]).save(checkpoint)
    return checkpoint


def test_the_model_card_tells_where_the_model_comes_from(tmp_path):
    checkpoint = student(tmp_path, "qwen3", {"fusion": "norm"})
    trained(checkpoint, datasets=["HuggingFaceFW/fineweb-edu", "mine"])
    (tmp_path / "report.md").write_text(
        "# Evaluation\n\n| needles | 93% |\n\n![curve](accuracy.png)\n\n![loss](loss.png)\n"
    )
    (tmp_path / "accuracy.png").write_bytes(b"a picture")
    export_hf(checkpoint, tmp_path / "hydra", evaluation=tmp_path / "report.md", base_model="Qwen/Tiny")
    text = (tmp_path / "hydra" / "README.md").read_text()
    fingerprint = ModelCard.load(checkpoint).fingerprint[:16]
    for fact in (
        f"qwen3, weights `{fingerprint}`",
        "8 of 18 heads",
        "`by hand`",
        "fusion = norm",
        "| align | 1,280 | 32 | HuggingFaceFW/fineweb-edu, mine |",
        "| licence | apache-2.0 |",
        "hf upload ",
        "\n## Evaluation\n\n| needles | 93% |\n",
    ):
        assert fact in text, fact
    assert "| 0 | 1, 5 | 1 | 2 | 1 |" in text and "| 1 | - | 2 | 1 | 3 |" in text
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Tiny",
        "license": "apache-2.0",
        "datasets": ["HuggingFaceFW/fineweb-edu"],
        "tags": ["hydra_head"],
    }
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert pictures == ["heads.png", "accuracy.png"], "a picture that is not there must not be shown"
    assert (tmp_path / "hydra" / "heads.png").read_bytes()[1:4] == b"PNG"
    assert (tmp_path / "hydra" / "accuracy.png").read_bytes() == b"a picture"


@pytest.mark.parametrize(
    ("folder", "name", "revision"),
    [("Tiny-1B", "Tiny-1B", ""), ("models--Qwen--Tiny-1B/snapshots/0a1b", "Qwen/Tiny-1B", "0a1b")],
)
@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: mit\n---\n# Tiny\n", "mit"),
        ("# Tiny\n", ""),
        ("---\nlicense: [a, b]\n---\n", ""),
        ("---\n{\n---\n", ""),
        (None, ""),
    ],
)
def test_the_name_and_the_license_of_a_folder(tmp_path, folder, name, revision, readme, licence):
    path = tmp_path / folder
    path.mkdir(parents=True)
    if readme is not None:
        (path / "README.md").write_text(readme)
    assert origin(path) == {"name": name, "revision": revision, "license": licence}


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_model_of_the_hub_is_named_by_its_commit(tmp_path, monkeypatch):
    """From the import through a student, its export and its import to the card of what is exported again."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "cache" / "models--nobody--tiny"
    tiny_model("qwen3", model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    import_hf(model_folder("nobody/tiny"), tmp_path / "teacher")
    source = json.loads((tmp_path / "teacher" / "model.json").read_text())["source"]
    assert (source["name"], source["revision"]) == ("nobody/tiny", COMMIT)
    hybridize(tmp_path / "teacher", HEAD_MAP, HydraOptions(), tmp_path / "student")
    export_hf(tmp_path / "student", tmp_path / "hydra")
    import_hf(tmp_path / "hydra", tmp_path / "back")
    for checkpoint, base_model, said in (
        ("teacher", "", f" of nobody/tiny, commit `{COMMIT}`, stage teacher"),
        ("student", "", f"| base model | nobody/tiny, commit `{COMMIT}` |"),
        ("back", "nobody/tiny", f"| base model | nobody/tiny, commit `{COMMIT}` |"),
        ("back", "other/tiny", "| base model | other/tiny |"),
    ):
        out = tmp_path / f"{checkpoint} {base_model.replace('/', ' ')}"
        export_hf(tmp_path / checkpoint, out, base_model=base_model)
        assert said in (out / "README.md").read_text()


@pytest.mark.parametrize("changes", [{}, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}])
@pytest.mark.parametrize(("longest", "exported"), [(32, 64), (256, 256)])
def test_an_export_takes_texts_as_long_as_it_was_trained_on(tmp_path, changes, longest, exported):
    """A longer text than that of any stage or of the teacher is for its user to ask for; nothing else changes."""
    checkpoint = trained(student(tmp_path, "qwen3", {"fa_position": "rope"}, **changes), sequence_length=longest)
    export_hf(checkpoint, tmp_path / "hydra")
    config = json.loads((tmp_path / "hydra" / "config.json").read_text())
    assert config["max_position_embeddings"] == exported
    assert import_hf(tmp_path / "hydra", tmp_path / "back") == ModelCard.load(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hydra", trust_remote_code=True)
    tokens_bs = random_tokens(length=100)
    with torch.no_grad():
        assert (model(tokens_bs).logits - logits_of(checkpoint, tokens_bs)).abs().max() < 1e-4


def test_an_all_fa_student_leaves_as_a_model_of_its_teachers_family(tmp_path):
    tiny_model("llama", tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "teacher")
    hybridize(tmp_path / "teacher", HeadMap.all_fa(3, 6, 2), HydraOptions.teacher(), tmp_path / "student")
    export_hf(tmp_path / "student", tmp_path / "back")
    assert_same_tensors(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "llama"


def poison(checkpoint: Path) -> None:
    card, model = load_model(checkpoint)
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc2.weight[0, 0] = float("nan")
    for path in checkpoint.iterdir():
        if path.name == "latest_checkpointed_iteration.txt":
            path.unlink()
    save_weights([model], card, checkpoint)


def claim_more_heads(checkpoint: Path, layer_idx: int) -> None:
    raw = json.loads((checkpoint / "model.json").read_text())
    layer = raw["head_map"]["layers"][layer_idx]
    layer["fa"], layer["gdn"] = [*layer.get("fa", []), layer["gdn"][0]], layer["gdn"][1:]
    raw["head_map"]["budget"] += 1
    (checkpoint / "model.json").write_text(json.dumps(raw))


def forget_the_source(checkpoint: Path) -> None:
    raw = json.loads((checkpoint / "model.json").read_text())
    (checkpoint / "model.json").write_text(json.dumps(raw | {"source": {}}))


BAD_CHECKPOINTS = {
    "no checkpoint": ("student", lambda d: (d / "model.json").unlink(), ["not a hydra_mcore checkpoint"]),
    "incomplete": ("student", lambda d: (d / "latest_checkpointed_iteration.txt").unlink(), ["no complete checkpoint"]),
    "cut short": (
        "teacher",
        lambda d: next(d.glob("iter_*/__0_3_0.distcp")).write_bytes(b""),
        ["__0_3_0.distcp", "cut short"],
    ),
    "nan": ("student", poison, ["layers.1.mlp.linear_fc2.weight", "NaN"]),
    "card of another map": (
        "student",
        lambda d: claim_more_heads(d, 0),
        ["layers.0.self_attention.fa.linear_q.weight", "[2, 16, 40]", "card"],
    ),
    "card with another branch": (
        "student",
        lambda d: claim_more_heads(d, 1),
        ["layers.1.self_attention.fa.linear_q.weight", "card"],
    ),
    "teacher without source": ("teacher", forget_the_source, ["config.json", "import the teacher again"]),
}


@pytest.mark.parametrize(("which", "spoil", "words"), BAD_CHECKPOINTS.values(), ids=list(BAD_CHECKPOINTS))
def test_an_unusable_checkpoint_is_named_and_nothing_is_written(tmp_path, which, spoil, words):
    student(tmp_path, "qwen3", {})
    spoil(tmp_path / which)
    with pytest.raises(InputError) as caught:
        export_hf(tmp_path / which, tmp_path / "out")
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value
    assert not list(tmp_path.glob("out*"))


def edit_config(hf_dir: Path, **changes: object) -> None:
    raw = json.loads((hf_dir / "config.json").read_text())
    (hf_dir / "config.json").write_text(
        json.dumps({key: value for key, value in (raw | changes).items() if value is not ...})
    )


BAD_EXPORTS = {
    "no heads": ({"heads": ...}, ["'heads'", "missing"]),
    "heads that are not there": ({"heads": [{"fa": [9]}, {}, {}]}, ["config.json", "layer 0 lists head 9"]),
    "a layer too few": ({"heads": [{"fa": [1]}, {}]}, ["heads lists 2 layers"]),
    "other heads": ({"heads": ..., "fa_heads": [[1], [], [0]]}, ["head_map.json", "config.json"]),
    "unknown option": ({"fusion": "sum"}, ["fusion is 'sum'"]),
    "other conv": ({"gdn_conv_kernel": 2}, ["gdn.conv.weight", "config.json asks for"]),
    "other gate": ({"fa_gate": "none"}, ["fa.gate_proj", "not part of this model"]),
    "other keys": ({"lightning_kv": "per_group"}, ["lightning.k_proj", "config.json asks for"]),
    "no slope": ({"lightning_slope": 0.0}, ["lightning_slope is 0.0"]),
}


@pytest.mark.parametrize(("changes", "words"), BAD_EXPORTS.values(), ids=list(BAD_EXPORTS))
def test_an_edited_hydra_head_directory_is_refused(tmp_path, changes, words):
    export_hf(student(tmp_path, "qwen3", {}), tmp_path / "hydra")
    edit_config(tmp_path / "hydra", **changes)
    with pytest.raises(HuggingFaceError) as caught:
        import_hf(tmp_path / "hydra", tmp_path / "out")
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value
    assert not list(tmp_path.glob("out*"))


def test_targets_that_hold_something_are_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        export_hf(tmp_path / "nowhere", tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def run_command(*arguments: object, largest_file: int | None = None) -> subprocess.CompletedProcess:
    def limit() -> None:
        if largest_file is not None:  # the kernel refuses to write on, as a full disk does
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    command = [sys.executable, str(COMMAND), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit)


def last_line(done: subprocess.CompletedProcess) -> str:
    return done.stderr.replace("\r", "\n").strip().splitlines()[-1]


@pytest.mark.slow
def test_a_disk_that_fills_up_half_way_leaves_nothing(tmp_path):
    tiny_model("qwen3", tmp_path / "hf", intermediate_size=4096)
    done = run_command("import", "--hf", tmp_path / "hf", "--out", tmp_path / "out", largest_file=400_000)
    assert done.returncode == 2
    assert last_line(done) == f"convert: {tmp_path / 'out'}: cannot be written, File too large; nothing is left of it"
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    done = run_command(
        "export", "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "out", largest_file=400_000
    )
    assert done.returncode == 2
    assert str(tmp_path / "out") in last_line(done) and "cannot be written" in last_line(done)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf"]


def test_a_killed_export_leaves_no_folder_of_the_targets_name(tmp_path):
    tiny_model("qwen3", tmp_path / "hf", num_hidden_layers=40, intermediate_size=4096)
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    command = [
        sys.executable,
        str(COMMAND),
        "export",
        "--checkpoint",
        str(tmp_path / "checkpoint"),
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen([*command, "--max-shard-size", "0.0001"], stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("out.partial/*.safetensors")):
        assert process.poll() is None, "the export ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf", "out"]


def test_weights_of_a_checkpoint_load_into_the_model_of_its_card(tmp_path):
    """What the streaming writer wrote is what Megatron's own writer would have."""
    checkpoint = student(tmp_path, "qwen2", {})
    export_hf(checkpoint, tmp_path / "hydra")
    import_hf(tmp_path / "hydra", tmp_path / "back")
    _, model = load_model(checkpoint)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    load_weights([model], tmp_path / "back")
    assert_same_tensors(before, dict(model.named_parameters()))


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    checkpoint = student(tmp_path, "qwen3", {})
    with pytest.raises(ConfigError, match=r"has no tensor decoder\.nothing"):
        StoredTensors(checkpoint).read("decoder.nothing")
