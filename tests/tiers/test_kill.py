"""kill -9 at any moment: what was committed is there, and every record is its key's."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from radixkv.tiers import TierOptions
from tests.tiers.pool import Pool

KILLS = int(os.environ.get("RADIXKV_KILLS", "6"))

WRITER = """
import sys, numpy as np
from tests.tiers.pool import Pool
from radixkv.tiers import TierOptions
pool = Pool(TierOptions(disk=sys.argv[1], disk_capacity=60 * 4096, threads=0), num_pages=32)
rng = np.random.default_rng(int(sys.argv[2]))
print("ready", flush=True)
while True:
    pool.serve(rng.integers(0, 3, int(rng.integers(9, 60))).tolist())
    pool.tiers.pump()
    print(len(pool.tiers.disk), flush=True)
"""


def test_kill_9_loses_nothing_committed_and_gives_nothing_wrong(tmp_path):
    rng = random.Random(0)
    rows = 0
    for kill in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(kill)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.stdout.readline()
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        rows += examine(tmp_path)
    assert rows > 10 * KILLS


def examine(path):
    """After a kill; returns the number of rows."""
    (index,) = path.rglob("index.sqlite")
    with sqlite3.connect(index) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
    pool = Pool(TierOptions(disk=path, disk_capacity=60 * 4096, threads=0))
    disk = pool.tiers.disk
    disk.check()
    found = list(disk._index.rows())
    for row in found:
        memory = pool.tiers.hub.memory[0]
        assert disk.read([row.key], [memory]) == [True]
        assert pool.tiers._layout.intact(memory, row.key, row.parent)
    pool.close()
    return len(found)
