"""When things fail below an engine: its answers are those without tiers, and nothing is raised or lost."""

from __future__ import annotations

import itertools
import shutil
import sqlite3

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import radixkv  # noqa: E402 (after the skip)
from radixkv.tiers.disk import Disk  # noqa: E402
from radixkv.tiers.slabs import Slabs  # noqa: E402
from tests.engine.test_engine import forward, make_engine, random_tokens  # noqa: E402
from tests.tiers.pool import Pool  # noqa: E402
from tests.tiers.test_engine_tiers import options, serve  # noqa: E402
from tests.tiers.test_tiers import PROMPT as TOKENS  # noqa: E402
from tests.tiers.test_tiers import options as pool_options  # noqa: E402

PROMPT = random_tokens(np.random.default_rng(0), 50)


@pytest.fixture(scope="module")
def answer():
    engine = make_engine()
    with engine.acquire(PROMPT) as lease, engine.step([lease]) as step:
        return forward(step)[-1].clone()


@pytest.mark.parametrize(
    "error", [OSError("as told"), sqlite3.OperationalError("as told"), ValueError("a bug")], ids=str
)
@pytest.mark.parametrize("method", ["leading", "read", "touch", "write", "drop", "__contains__"])
@pytest.mark.parametrize("threads", [0, 1])
def test_no_failure_of_the_disk_is_raised(tmp_path, monkeypatch, answer, method, error, threads):
    with make_engine(tiers=options(tmp_path)) as engine:
        serve(engine, PROMPT)

    def fail(*args):
        raise error

    monkeypatch.setattr(Disk, method, fail)
    with make_engine(tiers=options(tmp_path, threads=threads)) as engine:
        for _ in range(3):
            out, _ = serve(engine, PROMPT)
            assert torch.equal(out, answer)
            engine.cache.evict(64)
        if method in ("leading", "read", "touch"):
            assert engine.tiers.stats()["stores"]["disk"]["failed"] > 0
    assert engine.tiers.stats()["hub"]["used"] == 0


def test_a_directory_that_is_none_turns_the_disk_off(tmp_path, answer):
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="the disk tier in .* is off"):
        engine = make_engine(tiers=options(tmp_path / "file"))
    with engine:
        assert torch.equal(serve(engine, PROMPT)[0], answer)
        engine.cache.evict(64)
        assert serve(engine, PROMPT)[1] == 48  # from RAM
        assert engine.tiers.disk is None


def test_a_directory_of_another_identity_turns_the_disk_off(tmp_path):
    with make_engine(tiers=options(tmp_path)):
        pass
    (meta,) = tmp_path.rglob("meta.json")
    meta.write_text("{}")
    with pytest.warns(RuntimeWarning, match="another identity"):
        engine = make_engine(tiers=options(tmp_path))
    assert engine.tiers.disk is None
    engine.close()


def test_a_directory_that_goes_away_while_it_is_used(tmp_path, answer):
    with make_engine(tiers=options(tmp_path / "d")) as engine:
        serve(engine, PROMPT)
        shutil.rmtree(tmp_path / "d")
        for _ in range(3):
            engine.cache.evict(64)
            assert torch.equal(serve(engine, PROMPT)[0], answer)
            serve(engine, PROMPT[::-1])
    with make_engine(tiers=options(tmp_path / "d")) as engine:
        assert serve(engine, PROMPT)[1] == 0


def test_no_room_for_a_request_leaves_its_fetch_as_it_is(tmp_path):
    with make_engine(tiers=options(tmp_path)) as engine:
        serve(engine, PROMPT)
    with make_engine(tiers=options(tmp_path)) as engine:
        fetch = engine.fetch(PROMPT)
        engine.tiers.pump()
        with engine.acquire([1] * 240), pytest.raises(radixkv.PoolExhausted):
            engine.acquire(PROMPT, fetched=fetch)
        assert fetch.ready
        with engine.acquire(PROMPT, fetched=fetch) as lease:
            assert lease.num_written == 48
            lease.release(False)


def test_a_hub_full_of_busy_slots_writes_later(tmp_path):
    with make_engine(tiers=options(tmp_path)) as engine:
        serve(engine, PROMPT)
        stride = engine.tiers.hub.memory.shape[1]
    with make_engine(tiers=options(tmp_path, ram=12 * stride)) as engine:
        fetch = engine.fetch(PROMPT)
        engine.tiers.pump()
        assert engine.tiers.hub.num_used == 12
        other = PROMPT[::-1]
        with engine.acquire(other) as lease, engine.step([lease]) as step:
            forward(step)
        engine.tiers.pump()
        assert len(engine.tiers.disk) == 12
        fetch.cancel()
        engine.tiers.pump()
        assert len(engine.tiers.disk) == 24


def test_a_clear_while_pages_are_written_and_fetched(tmp_path):
    with make_engine(tiers=options(tmp_path)) as engine:
        serve(engine, PROMPT)
        engine.cache.evict(64)
        engine.tiers.hub.__init__(engine.tiers.hub.num_slots, engine.tiers.hub.memory.shape[1])  # nothing in RAM
        late = engine.fetch(PROMPT)  # asked, nothing read yet
        with engine.acquire(PROMPT[::-1]) as lease, engine.step([lease]) as step:
            forward(step)
        engine.cache.clear()
        engine.tiers.pump()
        assert late.ready
        with engine.acquire(PROMPT, fetched=late) as lease:
            assert lease.num_written == 0
            lease.release(False)
        for prompt in (PROMPT, PROMPT[::-1]):
            assert serve(engine, prompt)[1] == 0


class Recorder:
    """What the disk held after each fdatasync of pages and after each commit of rows."""

    def __init__(self, path, monkeypatch):
        self.path, self.rows, self.slabs = path, [], [b""]
        write = Slabs.write

        def written(slabs, slots, records):
            write(slabs, slots, records)
            self.slabs.append(self.file("pages-0000.bin").read_bytes())

        monkeypatch.setattr(Slabs, "write", written)

    def file(self, name):
        (found,) = self.path.rglob(name)
        return found

    def commit(self):
        """The index as it is now, and how much of the pages the disk has for sure."""
        source, copy = sqlite3.connect(self.file("index.sqlite")), sqlite3.connect(self.path / "copy")
        source.backup(copy)
        source.close()
        copy.close()
        self.rows.append(((self.path / "copy").read_bytes(), len(self.slabs) - 1))


def test_loss_of_power_in_any_legal_order(tmp_path, monkeypatch):
    """WAL may lose any of the last commits; of what was written after the last fdatasync any sectors may be there."""
    capacity = 12 * 4096
    pool = Pool(pool_options(tmp_path / "d", capacity=capacity))
    recorder = Recorder(tmp_path / "d", monkeypatch)
    rng = np.random.default_rng(0)
    for _ in range(8):
        pool.serve([*TOKENS[: int(rng.integers(0, 5)) * 4], *rng.integers(0, 2, 12).tolist()])
        pool.tiers.pump()
        recorder.commit()
    pool.close()
    monkeypatch.undo()
    secret = (tmp_path / "d" / "secret").read_bytes()
    folder = recorder.file("meta.json").parent
    damaged = 0
    for (rows, synced), (at, slabs) in itertools.product(recorder.rows, enumerate(recorder.slabs)):
        if at < synced:
            continue  # the rows were committed after these pages were there
        for written in _partly(slabs, recorder.slabs[at + 1], rng) if at + 1 < len(recorder.slabs) else [slabs]:
            damaged += _after_power_loss(tmp_path / "e", folder, rows, written, secret, capacity)
    assert damaged > 0, "slots that were recycled under rolled-back rows are among these"


def _partly(before, after, rng):
    """What the disk may have of a write: nothing, sectors from its first or last one on, any sectors."""
    before = before.ljust(len(after), b"\0")  # a file is allocated before it is written
    sectors = [i for i in range(0, len(after), 512) if before[i : i + 512] != after[i : i + 512]]
    cut = int(rng.integers(len(sectors) + 1))
    for there in ([], sectors[:cut], sectors[cut:], [s for s in sectors if rng.random() < 0.5]):
        data = bytearray(before)
        for s in there:
            data[s : s + 512] = after[s : s + 512]
        yield bytes(data)


def _after_power_loss(path, folder, rows, slabs, secret, capacity):
    """Serve over such a disk: every page that is filled is verified; returns how many were found damaged."""
    shutil.rmtree(path, ignore_errors=True)
    (path / folder.name).mkdir(parents=True)
    (path / "secret").write_bytes(secret)
    (path / folder.name / "meta.json").write_bytes((folder / "meta.json").read_bytes())
    (path / folder.name / "pages-0000.bin").write_bytes(slabs)
    (path / folder.name / "index.sqlite").write_bytes(rows)
    pool = Pool(pool_options(path, capacity=capacity))
    pool.tiers.disk.check()
    for row in list(pool.tiers.disk._index.rows()):
        tokens = []
        while row is not None:
            tokens = np.frombuffer(row.tokens, np.int32).tolist() + tokens
            row = next((r for r in pool.tiers.disk._index.rows() if r.key == row.parent), None)
        pool.serve([*tokens, 1])
        pool.cache.evict(64)
    damaged = pool.tiers.stats()["stores"]["disk"]["corrupt"]
    pool.close()
    return damaged
