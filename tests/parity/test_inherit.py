# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Students start from their teacher: every head keeps its own rows, everything else is the teacher's."""

import dataclasses
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from hydra_mcore.config import HydraOptions, ModelCard
from hydra_mcore.convert.calibration import calibration_tokens
from hydra_mcore.convert.hf_import import import_hf
from hydra_mcore.convert.inherit import head_output_rms, hybridize, inherit
from hydra_mcore.errors import InputError
from hydra_mcore.heads import HeadMap, HeadsByKind
from hydra_mcore.kinds import KINDS
from hydra_mcore.model.build import build_model, load_model
from hydra_mcore.model.checkpoints import TRACKER
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.selection.score import HeadScores, ProbeEffects, Replaceability
from tests.support import teachers
from tests.support.paths import ROOT
from tests.support.tiny_hf import ODD, random_tokens, tiny_qwen3
from tools.commands.convert import hybridize_from
from tools.convert import parse_args

COMMAND = ROOT / "tools" / "convert.py"
D, HEADS, GROUPS = ODD["head_dim"], ODD["num_attention_heads"], ODD["num_key_value_heads"]
# Layer 0 has heads of every kind, layer 1 no FA head, layer 2 no other.
LAYERS = (
    HeadsByKind(fa=(1, 4, 5), gdn=(0,), kda=(2,), lightning=(3,)),
    HeadsByKind(gdn=(0, 3), kda=(1, 5), lightning=(2, 4)),
    HeadsByKind(fa=range(HEADS)),
)
MIXED = HeadMap(num_heads=HEADS, num_kv_groups=GROUPS, layers=LAYERS)
PLAIN = {"fa_position": "rope", "fa_log_scale": "never", "fa_gate": "none", "lightning_gate": "none", "fusion": "none"}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    with process_groups():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple:
    """(Hugging Face model, its folder, the imported checkpoint's folder) with a tokenizer of one token a word."""
    root = tmp_path_factory.mktemp("teacher")
    truth = tiny_qwen3(root / "hf", tie_word_embeddings=False)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(ODD["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(root / "hf")
    import_hf(root / "hf", root / "checkpoint")
    return truth, root / "hf", root / "checkpoint"


@pytest.fixture(scope="module")
def teacher(source):
    return load_model(source[2])[1]


def student_of(source, teacher, head_map: HeadMap = MIXED, scale: Tensor | None = None, **options: object):
    shape = ModelCard.load(source[2]).shape
    student = build_model(ModelCard(shape=shape, head_map=head_map, options=HydraOptions(**options), fingerprint=""))
    inherit(teacher, student, shape, scale)
    return student


def logits(model, tokens_bs: Tensor) -> Tensor:
    return model(tokens_bs, torch.arange(tokens_bs.shape[1])[None], None)


def rows(weight: Tensor, head_idx: int, size: int = D) -> Tensor:
    return weight[head_idx * size : (head_idx + 1) * size]


@pytest.mark.parametrize("qkv", [{}, {"qkv": "shared"}], ids=["separate", "shared"])
def test_all_fa_student_is_the_teacher(source, teacher, qkv):
    student = student_of(source, teacher, HeadMap.all_fa(3, HEADS, GROUPS), **PLAIN, **qkv)
    tokens_bs = random_tokens()
    with torch.no_grad():
        difference = (logits(student, tokens_bs) - logits(teacher, tokens_bs)).abs().max()
    assert difference < 1e-5


def test_rows_go_to_their_heads(source, teacher):
    """Against the Hugging Face tensors, written out head by head."""
    student = student_of(source, teacher)
    for layer_idx, layer in enumerate(MIXED.layers):
        hf, attention = source[0].model.layers[layer_idx].self_attn, student.decoder.layers[layer_idx].self_attention
        for kind, heads in layer.items():
            branch = getattr(attention, kind)
            assert torch.equal(branch.q_norm.weight, hf.q_norm.weight)
            assert torch.equal(branch.k_norm.weight, hf.k_norm.weight)
            for place, h in enumerate(heads):
                assert torch.equal(rows(branch.linear_q.weight, place), rows(hf.q_proj.weight, h))
            for place, h in enumerate(heads if kind != "fa" else ()):
                k_then_v = rows(branch.linear_kv.weight, place, 2 * D)
                assert torch.equal(k_then_v[:D], rows(hf.k_proj.weight, h // 3)), f"head {h} reads group {h // 3}"
                assert torch.equal(k_then_v[D:], rows(hf.v_proj.weight, h // 3))
        for place, h in enumerate(layer.heads):
            assert torch.equal(rows(attention.linear_proj.weight.T, place), rows(hf.o_proj.weight.T, h))


def test_only_living_groups_keep_their_fa_rows(source, teacher):
    lonely = HeadMap.from_fa([(0, 4), (1, 0), (2, 3)], 3, HEADS, GROUPS)
    student = student_of(source, teacher, lonely)
    for layer_idx, group in enumerate((1, 0, 1)):
        hf = source[0].model.layers[layer_idx].self_attn
        expected = torch.cat([rows(hf.k_proj.weight, group), rows(hf.v_proj.weight, group)])
        assert torch.equal(student.decoder.layers[layer_idx].self_attention.fa.linear_kv.weight, expected)


def biased_pair(head_map: HeadMap, **options: object) -> tuple:
    """A random teacher whose projections have biases, as Qwen2's, and its student."""
    shape = dataclasses.replace(teachers.SHAPE, qkv_bias=True, qk_norm=False)
    teacher = teachers.random_teacher(shape)
    student = build_model(
        ModelCard(shape=shape, head_map=head_map, options=HydraOptions(**options), fingerprint="")
    ).eval()
    inherit(teacher, student, shape)
    return teacher, student


@pytest.mark.parametrize("qkv", [{}, {"qkv": "shared"}], ids=["separate", "shared"])
def test_all_fa_student_of_a_teacher_with_biases_is_the_teacher(qkv):
    teacher, student = biased_pair(HeadMap.all_fa(4, 6, 2), **PLAIN, **qkv)
    tokens_bs = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(logits(student, tokens_bs), logits(teacher, tokens_bs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv", ["per_head", "per_group"])
def test_biases_go_where_their_rows_go(kv):
    """Layer 0 keeps heads of both groups, layer 3 of the second, layer 1 none; the teacher's own biases, block by
    block.
    """
    others = HeadsByKind(fa=(3,), gdn=(4,), kda=(0, 1, 5), lightning=(2,))
    head_map = HeadMap(num_heads=6, num_kv_groups=2, layers=(*LAYERS, others))
    teacher, student = biased_pair(head_map, gdn_kv=kv, kda_kv=kv, lightning_kv=kv)
    for layer_idx, layer in enumerate(head_map.layers):
        theirs, ours = (
            teacher.decoder.layers[layer_idx].self_attention.fa,
            student.decoder.layers[layer_idx].self_attention,
        )
        query_hd, kv_gd = theirs.linear_q.bias.view(6, 16), theirs.linear_kv.bias.view(2, 32)
        for kind, heads in layer.items():
            found, groups = getattr(ours, kind), [h // 3 for h in heads]
            if kind == "fa" or kv == "per_group":
                groups = sorted(set(groups))
            assert torch.equal(found.linear_q.bias.view(-1, 16), torch.stack([query_hd[h] for h in heads]))
            assert torch.equal(found.linear_kv.bias.view(-1, 32), torch.stack([kv_gd[g] for g in groups]))


def test_everything_but_attention_is_the_teachers(source, teacher):
    student = dict(student_of(source, teacher).named_parameters())
    theirs = {name: value for name, value in teacher.named_parameters() if ".self_attention." not in name}
    assert "output_layer.weight" in theirs and len(theirs) == 3 + 4 * 3
    for name, value in theirs.items():
        assert torch.equal(student.pop(name), value), name
    assert all(".self_attention." in name for name in student)


def test_what_the_teacher_lacks_keeps_its_start(source, teacher):
    student = student_of(source, teacher, gdn_half_life=40.0, kda_half_life=40.0)
    attention, x_sbm = student.decoder.layers[0].self_attention, torch.randn(5, 2, ODD["hidden_size"])
    for branch in (attention.gdn, attention.kda):
        decay, write_sbh = branch._gates(x_sbm)
        torch.testing.assert_close(40 * decay, torch.full_like(decay, -0.6931472))
        torch.testing.assert_close(write_sbh, torch.full_like(write_sbh, 0.5))
        taps = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand_as(branch.conv.weight)
        assert torch.equal(branch.conv.weight, taps)
    for gate in (attention.fa.gate.linear, attention.lightning.gate.linear):
        assert gate.weight.abs().max() < 0.01 and gate.bias.eq(1).all()
    assert attention.fusion.scale.weight.eq(1).all()


@pytest.mark.parametrize("size", [0.0, 0.02, 9.0])
def test_a_kda_head_starts_as_the_gdn_head_of_the_same_teacher(source, teacher, size):
    """Whatever the first projection of its decays is, which starts at random."""
    gdn, kda = (
        student_of(source, teacher, HeadMap.from_fa([(0, 1)], 3, HEADS, GROUPS, others=kind), fa_gate="none")
        for kind in ("gdn", "kda")
    )
    with torch.no_grad():
        for layer in kda.decoder.layers:
            layer.self_attention.kda.linear_decay_down.weight.normal_(std=size)
        found, expected = (logits(student, random_tokens()) for student in (kda, gdn))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_kept_heads_compute_what_they_computed(source, teacher):
    """With rotary positions, no gate and no fusion, an FA head's output is the teacher's, whatever its
    neighbours are.
    """
    student = student_of(source, teacher, **PLAIN)
    x_sbm, rotary = torch.randn(9, 2, ODD["hidden_size"]), teacher.rotary_pos_emb(9)
    seen: list[Tensor] = []
    for model in (student, teacher):
        attention = model.decoder.layers[0].self_attention
        hook = attention.linear_proj.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].unflatten(2, (6, -1)))
        )
        with torch.no_grad():
            attention(x_sbm, rotary_pos_emb=rotary)
        hook.remove()
    ours, theirs = seen
    torch.testing.assert_close(ours[:, :, :3], theirs[:, :, [1, 4, 5]], rtol=0, atol=1e-6)
    assert (ours[:, :, 3:] - theirs[:, :, [0, 2, 3]]).abs().max() > 0.01, "other heads are not attention"


def test_sharing_keys_and_values_changes_weights_not_outputs(source, teacher):
    tokens_bs = random_tokens()
    by_group = {f"{kind}_kv": "per_group" for kind in KINDS if kind != "fa"}
    kinds = [{}, by_group, {"qkv": "shared"}]
    with torch.no_grad():
        own, grouped, shared = (logits(student_of(source, teacher, **PLAIN, **kind), tokens_bs) for kind in kinds)
    torch.testing.assert_close(grouped, own, rtol=0, atol=1e-5)
    torch.testing.assert_close(shared, own, rtol=0, atol=1e-5)


def naive_rms(truth, tokens_bs: Tensor) -> Tensor:
    """RMS of each head's slice of o_proj's input in transformers' model, in float64."""
    seen: list[Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for layer in truth.model.layers
    ]
    with torch.no_grad():
        truth(tokens_bs)
    for hook in hooks:
        hook.remove()
    return torch.tensor(
        [[out[..., h * D : (h + 1) * D].double().pow(2).mean().sqrt() for h in range(HEADS)] for out in seen]
    )


def test_head_output_rms_is_that_of_transformers(source, teacher):
    tokens_bs = random_tokens()
    expected = naive_rms(source[0], tokens_bs)
    assert expected.max() > 1.2 * expected.min(), "equal heads would prove nothing"
    torch.testing.assert_close(
        head_output_rms(teacher, tokens_bs).double(), expected, rtol=1e-5, atol=0, check_dtype=False
    )
    assert not any(layer.self_attention.linear_proj._forward_pre_hooks for layer in teacher.decoder.layers)


def test_calibrated_scales_stand_in_the_students_own_order(source, teacher):
    scale = torch.arange(18.0).view(3, 6)
    student = student_of(source, teacher, scale=scale)
    found = [layer.self_attention.fusion.scale.weight.tolist() for layer in student.decoder.layers]
    assert found == [[1, 4, 5, 0, 2, 3], [6, 9, 7, 11, 8, 10], [12, 13, 14, 15, 16, 17]]


VARIANTS = [
    {},
    {"fa_position": "rope", "gdn_position": "nope", "kda_position": "nope", "lightning_position": "nope"},
    {"fa_log_scale": "always"},
    {"fa_gate": "headwise", "gdn_gate": "elementwise", "kda_gate": "elementwise", "lightning_gate": "headwise"},
    {"fa_gate": "none", "gdn_gate": "headwise", "gate_activation": "silu", "lightning_gate": "none"},
    {"gdn_gate": "elementwise", "gate_order": "after_norm", "kda_gate": "headwise", "lightning_slope": 0.5},
    {"gdn_qk_norm": "none", "gdn_conv_kernel": 0, "kda_qk_norm": "none", "lightning_qk_norm": "none"},
    {"gdn_conv_activation": "silu", "gdn_conv_kernel": 2, "gdn_write_max": 2.0, "gdn_half_life": 5.0},
    {"kda_conv_activation": "silu", "kda_conv_kernel": 2, "kda_write_max": 2.0, "kda_half_life": 5.0},
    {"gdn_kv": "per_group", "kda_conv_kernel": 0},
    {"kda_kv": "per_group", "lightning_kv": "per_group"},
    {"qkv": "shared"},
    {"fusion": "norm"},
    {"fusion": "none"},
    {"fusion": "competition"},
    {"fusion_norm_weight": "none"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: " ".join(map(str, o.values())) or "default")
def test_every_variant_inherits_and_learns(source, teacher, options):
    student = student_of(source, teacher, scale=torch.full((3, HEADS), 0.5), **options)
    loss = logits(student.train(), random_tokens()).log_softmax(-1)[..., 3].mean()
    loss.backward()
    assert loss.isfinite()
    lifeless = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not lifeless


@pytest.mark.parametrize("calibrated", [True, False])
def test_hybridize_writes_a_student_that_loads(source, teacher, tmp_path, calibrated):
    tokens_bs = random_tokens() if calibrated else None
    facts = dataclasses.asdict(ModelCard.load(source[2]).shape)
    head_map = HeadMap(num_heads=HEADS, num_kv_groups=GROUPS, layers=MIXED.layers, model=facts, made_by={"seed": 7})
    written = hybridize(source[2], head_map, HydraOptions(), tmp_path / "student", tokens_bs)
    card, student = load_model(tmp_path / "student")
    assert card == written and card.stage == "student" and card.fingerprint == ModelCard.load(source[2]).fingerprint
    kept = HeadMap.load(tmp_path / "student" / "head_map.json")
    assert (kept.model, kept.made_by, card.head_map.model) == (facts, {"seed": 7}, facts)
    assert (tmp_path / "student" / "tokenizer" / "tokenizer.json").read_bytes() == (
        source[1] / "tokenizer.json"
    ).read_bytes()
    expected = student_of(source, teacher, scale=head_output_rms(teacher, tokens_bs) if calibrated else None)
    for (name, found), truth in zip(student.named_parameters(), expected.parameters(), strict=True):
        if ".gate." not in name and ".linear_decay_down." not in name:  # random at the start
            assert torch.equal(found, truth), name


def test_calibration_tokens_are_whole_sequences_of_the_text(source, tmp_path):
    (tmp_path / "text").write_text(" ".join(f"w{i % 60}" for i in range(200)))
    tokens_bs = calibration_tokens(tmp_path / "text", source[2])
    assert tokens_bs.shape == (3, 64)  # the native length; 8 tokens are left over
    assert tokens_bs.flatten().tolist() == [i % 60 for i in range(192)]
    (tmp_path / "long").write_text("w1 " * 10_000)
    assert calibration_tokens(tmp_path / "long", source[2]).numel() == 4096


def test_bad_calibration_text(source, tmp_path):
    (tmp_path / "short").write_text("w1 w2 w3")
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 99)
    for name, words in (("short", "3 tokens; give at least 64"), ("binary", "not UTF-8"), ("absent", "No such file")):
        with pytest.raises(InputError, match=words):
            calibration_tokens(tmp_path / name, source[2])
    (tmp_path / "bare").mkdir()
    ModelCard.load(source[2]).save(tmp_path / "bare")
    with pytest.raises(InputError, match="tokenizer"):
        calibration_tokens(tmp_path / "short", tmp_path / "bare")


BAD_MAPS = {
    "other layers": (HeadMap.from_fa([(0, 0)], 2, HEADS, GROUPS), "num_layers is 2 there, 3 in the teacher"),
    "other heads": (HeadMap.from_fa([(0, 0)], 3, 8, GROUPS), "num_heads is 8 there, 6 in the teacher"),
    "other groups": (HeadMap.from_fa([(0, 0)], 3, HEADS, 3), "num_kv_groups is 3 there, 2 in the teacher"),
    "other teacher": (
        HeadMap.from_fa([(0, 0)], 3, HEADS, GROUPS, fingerprint="ab" * 32),
        "weights abababababab there, ",
    ),
}


@pytest.mark.parametrize(("head_map", "words"), BAD_MAPS.values(), ids=list(BAD_MAPS))
def test_head_map_of_another_model_is_refused(source, tmp_path, head_map, words):
    with pytest.raises(InputError, match=words):
        hybridize(source[2], head_map, HydraOptions(), tmp_path / "student")
    assert not (tmp_path / "student").exists()


def imported(folder: Path, model: Qwen3ForCausalLM, shard_size: str = "1GB") -> ModelCard:
    """The card of the model after a way through Hugging Face's files."""
    model.save_pretrained(folder / "hf", max_shard_size=shard_size)
    return import_hf(folder / "hf", folder / "checkpoint")


def map_for(card: ModelCard) -> HeadMap:
    facts = {"model": dataclasses.asdict(card.shape), "fingerprint": card.fingerprint}
    return HeadMap.from_fa([(0, 1)], 3, HEADS, GROUPS, **facts)


def test_head_map_of_a_teacher_with_equal_weights_and_another_configuration_is_refused(source, tmp_path):
    other = imported(
        tmp_path, tiny_qwen3(tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 7000.0})
    )
    assert other.fingerprint == ModelCard.load(source[2]).fingerprint
    with pytest.raises(
        InputError, match=r"for another model: rope_theta is 7000\.0 there, 5000\.0 in the teacher; select heads"
    ):
        hybridize(source[2], map_for(other), HydraOptions(), tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_head_map_fits_equal_weights_however_they_are_stored(tmp_path):
    """In one file or several, in bf16 or float32; of all this only the values matter."""
    model = tiny_qwen3().bfloat16()
    cards = [imported(tmp_path / "bf16", model), imported(tmp_path / "sharded", model, "20KB")]
    assert len(list((tmp_path / "sharded" / "hf").glob("*.safetensors"))) > 1
    cards.append(imported(tmp_path / "float32", model.float()))
    assert len({card.fingerprint for card in cards}) == 1
    for card in cards:
        card.check_head_map(map_for(cards[0]))
    assert imported(tmp_path / "unrounded", tiny_qwen3()).fingerprint != cards[0].fingerprint


@pytest.mark.parametrize(
    ("tokens_bs", "words"),
    [
        (torch.full((1, 9), 61), "token 61 is outside"),
        (torch.zeros(1, 65, dtype=torch.long), "65 tokens exceed"),
        (torch.zeros(0, 9), "no tokens"),
    ],
    ids=["vocabulary", "length", "empty"],
)
def test_calibration_tokens_that_do_not_fit_are_refused(source, tmp_path, tokens_bs, words):
    with pytest.raises(InputError, match=words):
        hybridize(source[2], MIXED, HydraOptions(), tmp_path / "student", tokens_bs)
    assert not (tmp_path / "student").exists()


def test_a_student_is_no_teacher_and_a_target_is_written_once(source, tmp_path):
    hybridize(source[2], MIXED, HydraOptions(), tmp_path / "student")
    with pytest.raises(InputError, match="a student checkpoint, not a teacher's"):
        hybridize(tmp_path / "student", MIXED, HydraOptions(), tmp_path / "other")
    before = (tmp_path / "student" / TRACKER).stat().st_mtime_ns
    with pytest.raises(InputError, match="already holds a checkpoint"):
        hybridize(source[2], MIXED, HydraOptions(), tmp_path / "student")
    assert (tmp_path / "student" / TRACKER).stat().st_mtime_ns == before and not (tmp_path / "other").exists()


def run_command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(COMMAND), *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


def test_command_hybridizes(source, tmp_path):
    MIXED.save(tmp_path / "map.json")
    (tmp_path / "text").write_text("w1 w2 w3 w4 " * 50)
    out = tmp_path / "student"
    done = run_command(
        "hybridize", "--teacher", source[2], "--head-map", tmp_path / "map.json",
        "--text", tmp_path / "text", "--out", out,
        "--gdn-conv-kernel", 0, "--kda-gate", "headwise", "--lightning-slope", 0.5,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ModelCard.load(out).options == HydraOptions(gdn_conv_kernel=0, kda_gate="headwise", lightning_slope=0.5)
    scale = load_model(out)[1].decoder.layers[1].self_attention.fusion.scale.weight
    expected = naive_rms(source[0], calibration_tokens(tmp_path / "text", source[2]))[1, list(LAYERS[1].heads)]
    torch.testing.assert_close(scale.double(), expected.double(), rtol=1e-5, atol=0)


def test_command_starts_fitted(source, tmp_path):
    MIXED.save(tmp_path / "map.json")
    words = random.Random(5).choices([f"w{i}" for i in range(60)], k=64 * 8)
    (tmp_path / "text").write_text(" ".join(words))
    (tmp_path / "short").write_text(" ".join(words[: 64 * 3]))
    given = ["hybridize", "--teacher", source[2], "--head-map", tmp_path / "map.json", "--start", "fitted"]
    done = run_command(*given, "--text", tmp_path / "text", "--out", tmp_path / "fitted")
    inherited, fitted = map(float, re.search(r"tokens: (\S+) inherited, (\S+) fitted", done.stdout).groups())
    assert done.returncode == 0 and fitted < 0.9 * inherited
    load_model(tmp_path / "fitted")
    done = run_command(*given, "--text", tmp_path / "short", "--out", tmp_path / "no")
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "convert: a fitted start needs 4 sequences of text; give a longer --text"
    ]
    assert not (tmp_path / "no").exists()


def test_command_starts_with_memories_that_selection_found(source, tmp_path):
    MIXED.save(tmp_path / "map.json")
    words = random.Random(5).choices([f"w{i}" for i in range(60)], k=64 * 8)
    (tmp_path / "text").write_text(" ".join(words))
    card = ModelCard.load(source[2])
    heads = (card.shape.num_layers, HEADS)
    probe = ProbeEffects("retrieval", np.zeros((1, *heads, 1)), (), np.ones(1), np.zeros(1), np.ones(1, dtype=bool))
    memory = (np.zeros(heads), np.zeros(heads), np.full(heads, 512.0), np.full(heads, 512.0), np.full(heads, 0.5))
    scores = HeadScores(card.shape, card.fingerprint, {"one": probe}, replaceability={"gdn": Replaceability(*memory)})
    scores.save(tmp_path / "scores.json")
    given = ["hybridize", "--teacher", source[2], "--start", "fitted", "--text", tmp_path / "text"]
    given += ["--scores", tmp_path / "scores.json", "--head-map"]
    hybridize_from(parse_args([*map(str, given), str(tmp_path / "map.json"), "--out", str(tmp_path / "fitted")]))
    bias = load_model(tmp_path / "fitted")[1].decoder.layers[1].self_attention.gdn.linear_decay.bias
    torch.testing.assert_close(F.softplus(bias), torch.full_like(bias, math.log(2) / 512))
    all_kda = HeadMap.from_fa([(0, 0)], card.shape.num_layers, HEADS, GROUPS, "kda")
    all_kda.save(tmp_path / "kda.json")
    with pytest.raises(InputError, match=r"scores.json: no imitations of this map's linear heads there; leave"):
        hybridize_from(parse_args([*map(str, given), str(tmp_path / "kda.json"), "--out", str(tmp_path / "no")]))


def test_command_refuses_a_broken_head_map_in_one_line(source, tmp_path):
    raw = MIXED.to_dict()
    raw["layers"][1]["gdn"].remove(3)
    (tmp_path / "map.json").write_text(json.dumps(raw))
    done = run_command(
        "hybridize", "--teacher", source[2], "--head-map", tmp_path / "map.json", "--out", tmp_path / "student"
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "convert: head map: layer 1 lacks head 3; give it a kind (of fa, gdn, kda, lightning)"
    ]
    assert not (tmp_path / "student").exists()


def test_what_a_recipe_gives_for_other_students_is_not_read(source, tmp_path, capsys):
    MIXED.save(tmp_path / "map.json")
    given = ["--teacher", source[2], "--head-map", tmp_path / "map.json", "--out", tmp_path / "student"]
    unused = ["--fusion", "norm", "--text", tmp_path / "none", "--scores", tmp_path / "none"]
    hybridize_from(parse_args(["hybridize", *map(str, (*given, *unused))]))
    said = capsys.readouterr().out
    assert "note: --text is not read, since no fusion" in said and "note: --scores is not read" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "need --text FILE"),
        (["--start", "fitted"], "--start fitted needs --text"),
        (["--start", "fitted", "--text", "text", "--fusion-scale", "one"], "no use with --start fitted"),
        (["--gdn-conv-kernel", "-1"], "gdn_conv_kernel is -1"),
        (["--lightning-slope", "2"], "lightning_slope is 2.0"),
    ],
    ids=[
        "no text",
        "no text to fit on",
        "two starts",
        "option",
        "another option",
    ],
)
def test_command_refuses_flags_that_do_not_go_together(source, tmp_path, flags, words):
    MIXED.save(tmp_path / "map.json")
    given = ["--teacher", source[2], "--head-map", tmp_path / "map.json", "--out", tmp_path / "student"]
    with pytest.raises(InputError, match=words):
        hybridize_from(parse_args(["hybridize", *map(str, given), *flags]))
    assert not (tmp_path / "student").exists()
