# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What stands in the files of offline W&B runs: LevelDB's log format behind a header of seven bytes, one protobuf a
record.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HEADER, BLOCK = 7, 32_768
FULL, FIRST, LAST = 1, 2, 4


class OfflineRun(NamedTuple):
    """One file: what the run is, step -> values as logged, artifacts, alerts."""

    run: Any
    history: dict[int, dict[str, Any]]
    artifacts: list[Any]
    alerts: list[Any]


def read_runs(folder: Path) -> list[OfflineRun]:
    """Every offline file below a folder, in order of time."""
    return [_read(path) for path in sorted(folder.rglob("run-*.wandb"), key=lambda path: path.parent.name)]


def _read(path: Path) -> OfflineRun:
    from wandb.proto import wandb_internal_pb2

    found = OfflineRun(wandb_internal_pb2.RunRecord(), {}, [], [])
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run.MergeFrom(record.run)
        elif kind == "history":
            values = {(item.nested_key or [item.key])[0]: json.loads(item.value_json) for item in record.history.item}
            assert found.history.keys().isdisjoint({values["_step"]}), "a step stands twice in one file"
            found.history[values["_step"]] = values
        elif kind in ("artifact", "alert"):
            getattr(found, kind + "s").append(getattr(record, kind))
    return found


def _records(content: bytes) -> Iterator[bytes]:
    at, parts = HEADER, b""
    while at + HEADER <= len(content):
        room = BLOCK - at % BLOCK
        if room < HEADER:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        piece = content[at + HEADER : at + HEADER + length]
        if kind == 0 or len(piece) < length:
            return  # preallocated, or cut off by a kill
        parts = piece if kind in (FULL, FIRST) else parts + piece
        at += HEADER + length
        if kind in (FULL, LAST):
            yield parts
