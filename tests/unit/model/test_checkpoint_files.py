# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that comes from somebody else: nothing in it runs, and what is damaged is refused in one line."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.rerun_state_machine import RerunDiagnostic
from megatron.core.safe_globals import safe_numpy_load
from torch.distributed.checkpoint.metadata import MetadataIndex

from hydra_mcore.compat.reading import check_entry
from hydra_mcore.config import ConfigError, teacher_card
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.hugging_face import HuggingFaceModel
from hydra_mcore.model.build import build_model, load_model
from hydra_mcore.model.checkpoints import TRACKER, iterations, latest_iteration, write_checkpoint
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.model.streaming import StoredTensors
from hydra_mcore.train.checkpoint_care import resumable, tidy
from tests.support.planted_code import INDEX, Program, plant, replace_entry, saved, small_checkpoint, unprotected_load
from tests.support.stages import SHAPE
from tests.support.tiny_hf import tiny_qwen3

CARD = teacher_card(SHAPE, "f" * 64)
OBJECTS = {
    "rng_state": [{"np_rng_state": np.random.get_state(), "torch_rng_state": torch.get_rng_state()}],
    "rerun_state_machine_state": {"diagnostic": RerunDiagnostic.CORRECT_RESULT},
}
TENSOR = "decoder.layers.1.mlp.linear_fc1.weight"
PLACES = [INDEX, "common.pt", "common_state", *OBJECTS, "decoder.layers.0.mlp.linear_fc1._extra_state", TENSOR]


@pytest.fixture(scope="module")
def groups() -> Iterator[None]:
    with process_groups():
        yield


@pytest.fixture(scope="module")
def whole(groups: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's checkpoint with all kinds of entries that training writes."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    objects = {name: ShardedObject(name, value, (1,), (0,)) for name, value in OBJECTS.items()}
    write_checkpoint({"model0": build_model(CARD).sharded_state_dict(), **objects}, CARD, folder)
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def small(groups: None, tmp_path: Path) -> Path:
    return small_checkpoint(tmp_path)


def read_objects(folder: Path) -> None:
    wanted = {name: ShardedObject(name, None, (1,), (0,)) for name in OBJECTS}
    dist_checkpointing.load(wanted, str(folder / "iter_0000000"))


READERS: dict[str, Callable[[Path], Any]] = {
    "check": latest_iteration,
    "model": load_model,
    "streamed": lambda folder: [tensors.read(name) for tensors in [StoredTensors(folder)] for name in tensors._tensors],
    "objects": read_objects,
    "common": lambda folder: dist_checkpointing.load_common_state_dict(folder / "iter_0000000"),
    "content": lambda folder: dist_checkpointing.load_content_metadata(folder / "iter_0000000"),
}
READ_BY = {  # a reader that does not come to a place has nothing to refuse there
    INDEX: set(READERS),
    "common.pt": {"check", "model", "streamed", "objects", "common", "content"},
    "common_state": {"model", "objects", "common", "content"},
    "rng_state": {"objects"},
    "rerun_state_machine_state": {"objects"},
    "decoder.layers.0.mlp.linear_fc1._extra_state": {"model"},
    TENSOR: {"model", "streamed"},
}


def refusal(read: Callable[[], Any]) -> str:
    """What a reader says of a file that it refuses; torch wraps it when its planner is at work."""
    try:
        read()
    except InputError as error:
        return str(error)
    except dcp.api.CheckpointException as error:
        (cause, _) = error.failures[0]
        assert isinstance(cause, InputError) or "index is damaged" in str(cause), repr(cause)
        return str(cause).splitlines()[0]
    return ""


def test_a_whole_checkpoint_is_read_by_every_reader(whole: Path) -> None:
    for read in READERS.values():
        read(whole)


def test_the_planted_program_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Program(tmp_path / "a")))
    unprotected_load(saved(Program(tmp_path / "b")))
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()


@pytest.mark.parametrize("place", PLACES)
def test_planted_code_does_not_run(model: Path, tmp_path: Path, place: str) -> None:
    marker = tmp_path / "ran"
    plant(model / "iter_0000000", place, marker)
    for name, read in READERS.items():
        said = refusal(lambda read=read: read(model))
        assert bool(said) == (name in READ_BY[place]), (name, said)
        assert "\n" not in said and (not said or "could run code" in said)
    assert not marker.exists()


def test_an_environment_variable_does_not_open_the_gate(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    plant(model / "iter_0000000", "common_state", tmp_path / "ran")
    (model / "iter_0000000" / "common.pt").write_bytes(saved({"iteration": Program(tmp_path / "ran")}))
    assert refusal(lambda: read_objects(model)) and not (tmp_path / "ran").exists()


def test_tensors_of_all_kinds_are_read(tmp_path: Path) -> None:
    kinds = [
        torch.bool,
        torch.uint8,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.complex64,
        torch.float8_e4m3fn,
    ]
    state = {str(kind): torch.ones(3, 2).to(kind) for kind in kinds} | {
        "none": torch.empty(0, 4),
        "one": torch.tensor(7.0),
    }
    state |= {
        "part": torch.arange(100.0)[10:20],
        "turned": torch.arange(6.0).view(2, 3).T,
        "large": torch.rand(600_000),
    }
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "iter_0000001"), no_dist=True)
    found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path / "iter_0000001"), no_dist=True)
    assert all(torch.equal(found[name].to(torch.complex128), true.to(torch.complex128)) for name, true in state.items())


def zipped(changes: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> bytes:
    """torch.save's file of a tensor, copied record by record by ``changes``."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(torch.zeros(1 << 16)))) as old, zipfile.ZipFile(buffer, "w") as new:
        for record in old.infolist():
            changes(new, record, old.read(record))
    return buffer.getvalue()


def with_pickle(data: bytes) -> bytes:
    return zipped(lambda new, record, old: new.writestr(record, data if record.filename.endswith("/data.pkl") else old))


ENTRIES = {
    "zeros": bytes(2000),
    "empty": b"",
    "a-plain-pickle": pickle.dumps([1, 2]),
    "the-old-format": (
        lambda buffer: (torch.save([1], buffer, _use_new_zipfile_serialization=False), buffer.getvalue())[1]
    )(io.BytesIO()),
    "compressed": zipped(lambda new, record, old: new.writestr(record.filename, old, zipfile.ZIP_DEFLATED)),
    "two-pickles": zipped(lambda new, record, old: [new.writestr(name + record.filename, old) for name in ("", "b/")]),
    "no-pickle": zipped(lambda new, record, old: record.filename.endswith("/data.pkl") or new.writestr(record, old)),
    "a-bytearray-of-100-GB": with_pickle(
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + struct.pack("<q", 10**11)[:5] + b"\x85R."
    ),
    "a-tensor-by-its-class": with_pickle(b"\x80\x02ctorch\nTensor\nK\x01\x85R."),
    "old-names": with_pickle(b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R."),
    "unpickles-again": with_pickle(b"\x80\x02ctorch.storage\n_load_from_bytes\nX\x01\x00\x00\x001\x85R."),
    "os": with_pickle(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00echo\x85R."),
    "instances": with_pickle(b"\x80\x02(X\x04\x00\x00\x00echoios\nsystem\n."),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_that_torch_did_not_write(model: Path, entry: str) -> None:
    replace_entry(model / "iter_0000000", "common_state", ENTRIES[entry])
    with pytest.raises(ConfigError, match=r"__0_0.distcp: damaged at byte") as error:
        load_model(model)
    assert "\n" not in str(error.value)


def test_what_settings_may_hold(tmp_path: Path) -> None:
    """Megatron writes its arguments into each checkpoint: what they can be must be read again."""
    from argparse import Namespace

    from megatron.core.transformer.enums import AttnBackend, CudaGraphModule
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    layout = PipelineParallelLayerLayout("E|tt|tt|L", pipeline_model_parallel_size=4)
    args = Namespace(
        a=AttnBackend.auto, b=[CudaGraphModule.attn], c=layout, d=Path("x"), e=torch.bfloat16, f={1, 2}, g=None, h=2**40
    )
    data = saved([{"args": args}])
    check_entry(io.BytesIO(data), len(data))
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict = {}
    request = type("Request", (), {"dest_index": MetadataIndex("x")})()
    planner.load_bytes(request, io.BytesIO(data))
    found = planner.state_dict["x"][0]["args"]
    assert found.c.layout == layout.layout
    assert {**vars(found), "c": None} == {**vars(args), "c": None}


def values(folder: Path) -> dict[str, torch.Tensor]:
    stored = StoredTensors(folder)
    return {name: stored.read(name) for name in ("w", "v")}


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("how_many", [100, pytest.param(5_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [INDEX, "__0_0.distcp"])
def test_flipped_bits_are_noticed_or_harmless(small: Path, name: str, how_many: int) -> None:
    true, data = values(small.parent), (small / name).read_bytes()
    bits = random.Random(17).sample(range(8 * len(data)), min(how_many, 8 * len(data)))
    said = []
    for moment, bit in enumerate(bits):
        (small / name).write_bytes(flipped(data, bit))
        os.utime(small / name, ns=(moment, moment))  # the clock of a file system is coarse
        try:
            found = values(small.parent)
        except ConfigError as error:
            said.append(str(error))
        else:
            assert name == INDEX or all(torch.equal(found[key], true[key]) for key in true), bit
    assert len(said) > len(bits) / 4 and not any("\n" in line for line in said)  # headers and padding hold no weights


def test_every_flipped_bit_of_an_index_is_noticed_where_its_checksum_is_known(whole: Path, model: Path) -> None:
    index = model / "iter_0000000" / INDEX
    data = index.read_bytes()
    for moment, bit in enumerate(random.Random(18).sample(range(8 * len(data)), 100)):
        index.write_bytes(flipped(data, bit))
        os.utime(index, ns=(moment, moment))
        with pytest.raises(ConfigError, match="its checksum is another"):
            latest_iteration(model)


def test_a_flipped_byte_of_a_weight_is_noticed(small: Path) -> None:
    file = small / "__0_0.distcp"
    data = file.read_bytes()
    start = data.index(torch.arange(24.0).numpy().tobytes())
    for position in range(start, start + 24 * 4, 3):
        file.write_bytes(flipped(data, 8 * position))
        with pytest.raises(ConfigError, match=r"__0_0.distcp: damaged at byte \d+ \(the checksum"):
            values(small.parent)


@pytest.mark.parametrize("kind", ["zeros", "shorter", "gone"])
def test_a_file_of_zeros_or_none(model: Path, kind: str) -> None:
    file = model / "iter_0000000" / "__0_0.distcp"
    if kind == "gone":
        file.unlink()
    else:
        file.write_bytes(bytes(file.stat().st_size - (kind == "shorter")))
    for read in (load_model, READERS["streamed"]):
        with pytest.raises(ConfigError, match="damaged at byte" if kind == "zeros" else "cut short") as error:
            read(model)
        assert "\n" not in str(error.value)


def test_a_rank_that_alone_finds_damage_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = model / "iter_0000000" / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError):
        load_model(model)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("rank 1: "))
    assert "__0_0.distcp: damaged at byte" in line


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xc2\xb2",
        b"9" * 5000,
        b"9" * 19,
        b"-5",
        b"1e3",
        b"0x2",
        b"\xff\xfe",
        b"\0" * 100,
        b"2\n4",
        "٢".encode(),
        b"[" * 10**6,
    ],
)
def test_trackers_that_name_no_step(small: Path, text: bytes) -> None:
    (small.parent / TRACKER).write_bytes(text)
    with pytest.raises(ConfigError, match=r"no iteration|cut short") as error:
        latest_iteration(small.parent)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert resumable(small.parent) == small  # a training takes the newest complete one, and names it
    tidy(small.parent)
    assert (small.parent / TRACKER).read_text() == "2"


def test_other_folders_are_no_checkpoints(small: Path) -> None:
    for name in ("iter_²", "iter_٢", "iter_" + "9" * 200, "iter_-1", "iter_x"):
        (small.parent / name).mkdir()
    (small.parent / "iter_0000007").write_text("a file")
    assert list(iterations(small.parent)) == [2]


def test_a_damaged_checkpoint_is_not_removed(small: Path, capsys: pytest.CaptureFixture) -> None:
    """Only what a killed save left is: somebody may still want to look at the other."""
    shutil.copytree(small, small.parent / "iter_0000004")
    (small.parent / "iter_0000004" / INDEX).write_bytes(b"x")
    (small.parent / TRACKER).write_text("4")
    tidy(small.parent)
    assert list(iterations(small.parent)) == [2, 4] and (small.parent / TRACKER).read_text() == "2"
    assert "left where it is" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"sharded_backend": 3}', "[" * 10**5, "\udc80"])
def test_the_other_index(model: Path, text: str) -> None:
    (model / "iter_0000000" / "metadata.json").write_text(text, "utf-8", "surrogateescape")
    said = refusal(lambda: load_model(model))
    assert "\n" not in said and (said or text == '{"sharded_backend": 3}')


def test_a_pickle_of_weights_in_a_hugging_face_directory(groups: None, tmp_path: Path) -> None:
    tiny_qwen3(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(saved({"lm_head.weight": Program(tmp_path / "ran")}))
    with pytest.raises(InputError, match="could run code; get them as safetensors"):
        HuggingFaceModel(tmp_path, torch.float32)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_the_folder_of_data_indices(tmp_path: Path) -> None:
    """Megatron allows pickles where it reads its indices, by an unpickler of its own."""
    (tmp_path / "index.npy").write_bytes(pickle.dumps(Program(tmp_path / "ran")))
    np.save(tmp_path / "objects.npy", np.array([Program(tmp_path / "ran")], dtype=object), allow_pickle=True)
    for name in ("index.npy", "objects.npy"):
        with pytest.raises((pickle.UnpicklingError, ValueError)):
            safe_numpy_load(tmp_path / name, allow_pickle=True, mmap_mode="r")
    assert not (tmp_path / "ran").exists()
