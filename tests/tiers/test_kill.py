"""kill -9 at any moment: what was committed is there, nothing else is, and every record is its key's."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from radixkv.tiers import TierOptions
from tests.tiers.pool import PAGE_BYTES, Pool, content

KILLS = int(os.environ.get("RADIXKV_KILLS", "6"))

WRITER = """
import os, sys, numpy as np
from tests.tiers.pool import Pool
from radixkv.tiers import TierOptions
from radixkv.tiers.index import Index
log = os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
change = Index.change
def logged(index, removed, added, used):
    words = ["-" + key.hex() for key in removed] + ["+" + row.key.hex() for row in added]
    os.write(log, (" ".join(["begin", *words]) + "\\n").encode())
    change(index, removed, added, used)
    os.write(log, b"committed\\n")
Index.change = logged
pool = Pool(TierOptions(disk=sys.argv[1], disk_capacity=60 * 4096, threads=0), num_pages=32)
rng = np.random.default_rng(int(sys.argv[2]))
print("ready", flush=True)
while True:
    pool.serve(rng.integers(0, 3, int(rng.integers(9, 60))).tolist())
    pool.tiers.pump()
"""


def test_kill_9_loses_nothing_committed_and_gives_nothing_wrong(tmp_path):
    rng = random.Random(0)
    committed: set[str] = set()
    rows = changes = 0
    for kill in range(KILLS):
        log = tmp_path / "log"
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "d"), str(kill), str(log)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        here, more = examine(tmp_path / "d"), replayed(committed, log.read_text().splitlines())
        assert here in more, "neither what was committed, nor that and the change that was being committed"
        committed = here
        rows += len(here)
        changes += log.read_text().count("committed")
        log.unlink()
    assert rows > 10 * KILLS
    assert changes > 10 * KILLS


def replayed(keys, lines):
    """The keys after the committed changes of a log, and after the one that was under way."""
    states = [keys]
    for line in lines:
        match line.split():
            case ["begin", *words]:
                gone, new = ({w[1:] for w in words if w[0] == sign} for sign in "-+")
                states = [states[0], (states[0] - gone) | new]
            case _:
                states = states[1:]
    return states


def examine(path):
    """After a kill: the keys of all rows, each of which has a record with its own bytes."""
    (index,) = path.rglob("index.sqlite")
    with sqlite3.connect(index) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
    pool = Pool(TierOptions(disk=path, disk_capacity=60 * 4096, threads=0))
    disk = pool.tiers.disk
    disk.check()
    rows = {row.key: row for row in disk._index.rows()}
    for row in rows.values():
        memory = pool.tiers.hub.memory[0]
        assert disk.read([row.key], [memory]) == [True]
        assert pool.tiers._layout.intact(memory, row.key, row.parent)
        tokens, at = [], row
        while at is not None:
            tokens = np.frombuffer(at.tokens, np.int32).tolist() + tokens
            if at.parent == at.tag:
                assert np.array_equal(memory[:PAGE_BYTES], content("", tokens))
            at = rows.get(at.parent)
    pool.close()
    return {key.hex() for key in rows}
