"""Requests from the delta-coded .npz traces that the benchmarks and some tests run on.

Per request in time order: ``ts`` (s), ``sess``, ``in_len``, ``out_len``, ``nid`` (number of ids) and the ids
delta-coded: request i starts with the first ``keep[i]`` ids of request ``ref[i]`` (-1: none), then ``tail[toff[i] :
toff[i] + nid[i] - keep[i]]``. ``unit`` is tokens per id: 1 for real token ids that cover input and then output, more
for prefix-chained hashes of the full input blocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from radixkv.traces.request import Blocks, Tokens, TraceRequest

_FIRST_TAIL = 3 * 2**29  # above every id: the partly filled last block of request i consists of this value + i


def traces_folder() -> Path | None:
    """The folder of the traces: RADIXKV_TRACES, or shared/traces beside the repository; None where there is none."""
    given = os.environ.get("RADIXKV_TRACES")
    folder = Path(given) if given else Path(__file__).resolve().parents[3] / "shared" / "traces"
    return folder if folder.is_dir() else None


def read_npz(path: Path, limit: int | None = None) -> Iterator[TraceRequest]:
    """Yield the first ``limit`` requests (all by default) of a .npz trace."""
    with np.load(path) as archive:
        trace = {name: archive[name] for name in archive.files}
    unit = int(trace["unit"])
    ids_of: list[Tokens] = []
    for i in range(len(trace["ts"]))[:limit]:
        keep, first = int(trace["keep"][i]), int(trace["toff"][i])
        ids: Tokens = trace["tail"][first : first + int(trace["nid"][i]) - keep].astype(np.int32)
        if trace["ref"][i] >= 0:
            ids = np.concatenate([ids_of[trace["ref"][i]][:keep], ids])
        ids_of.append(ids)
        session, timestamp, num_in = str(int(trace["sess"][i])), float(trace["ts"][i]), int(trace["in_len"][i])
        if unit == 1:
            yield TraceRequest(ids[:num_in], ids[num_in:], session=session, timestamp=timestamp)
        else:
            blocks = Blocks(ids, unit, num_in, _FIRST_TAIL + i)
            yield TraceRequest(blocks=blocks, session=session, timestamp=timestamp)
