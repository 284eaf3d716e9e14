"""`radixkv tiers`: what a directory holds; damage is found, and nothing that a writer changes meanwhile is."""

import json
import sqlite3
import sys

import pytest

from radixkv.cli import main
from radixkv.tiers.inspect import holdings, verify
from tests.tiers.pool import IDENTITY, Pool
from tests.tiers.test_tiers import PROMPT, options, stored


def run(capsys, *arguments):
    status = main(["tiers", *map(str, arguments)])
    return (status, *capsys.readouterr())


def test_it_shows_identities_namespaces_and_sizes(tmp_path, capsys):
    pool = Pool(options(tmp_path))
    for namespace in ("", "a", "a-salt"):
        pool.serve(PROMPT, namespace)
        pool.tiers.pump()
    other = Pool(options(tmp_path), identity={**IDENTITY, "weights": "other"})
    other.close()
    status, out, _ = run(capsys, tmp_path, "--json", "--verify")
    assert status == 0
    found = {one["identity"]["weights"]: one for one in json.loads(out)["identities"]}
    assert found["other"]["pages"] == 0
    assert not found["other"]["in_use"]
    ours = found["w"]
    assert (ours["pages"], ours["tokens"], ours["bytes"]) == (30, 120, 30 * 4096)
    assert ours["file_bytes"] >= 30 * 4096
    assert sorted(ours["namespaces"].values()) == [10, 10, 10]
    assert ours["in_use"]
    assert ours["damaged"] == []
    assert 0 <= ours["age_seconds"] < 60
    assert "salt" not in out
    status, out, _ = run(capsys, tmp_path)
    assert status == 0
    assert "30 pages, 120 tokens, in use" in out
    assert "weights     w" in out
    pool.close()


def test_verify_names_damaged_pages(tmp_path, capsys):
    stored(tmp_path)
    (file,) = tmp_path.rglob("pages-0000.bin")
    data = bytearray(file.read_bytes())
    data[2 * 4096 + 5] ^= 1
    file.write_bytes(data)
    status, out, _ = run(capsys, tmp_path, "--verify", "--json")
    assert status == 1
    (one,) = json.loads(out)["identities"]
    with sqlite3.connect(tmp_path.joinpath(one["folder"], "index.sqlite")) as db:
        (key,) = db.execute("SELECT key FROM page WHERE slot=2").fetchone()
    db.close()
    assert one["damaged"] == [key.hex()]
    status, out, _ = run(capsys, tmp_path, "--verify")
    assert status == 1
    assert "1 pages are damaged" in out
    file.write_bytes(data[:4096])
    status, out, _ = run(capsys, tmp_path, "--verify", "--json")
    assert len(json.loads(out)["identities"][0]["damaged"]) == 9


def test_a_damaged_index_is_said(tmp_path, capsys):
    stored(tmp_path)
    (file,) = tmp_path.rglob("index.sqlite")
    file.write_bytes(b"rubbish" * 1000)
    status, out, _ = run(capsys, tmp_path, "--verify")
    assert status == 1
    assert "index cannot be read" in out


def test_what_changes_under_verify_is_no_damage(tmp_path):
    pool = Pool(options(tmp_path, capacity=12 * 4096))
    pool.serve(PROMPT)
    pool.tiers.pump()
    (holding,) = holdings(tmp_path)
    rows = type(pool.tiers.disk._index).rows

    def then_change(index):
        found = list(rows(index))
        pool.serve(PROMPT[::-1])
        pool.tiers.pump()
        return iter(found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("radixkv.tiers.index.Index.rows", then_change)
        assert verify(holding) == []
    pool.close()


@pytest.mark.parametrize("made", [False, True])
def test_what_is_no_directory_of_a_tier(tmp_path, capsys, made):
    path = tmp_path / "none"
    if made:
        path.mkdir()
    status, out, err = run(capsys, path)
    assert (status, out) == (1, "")
    assert "holds no pages" in err


def test_a_bar_shows_how_far_it_is(tmp_path, capsys, monkeypatch):
    stored(tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ticks = iter(range(100))
    monkeypatch.setattr("radixkv.cli.common.time.monotonic", lambda: next(ticks))
    _, _, err = run(capsys, tmp_path, "--verify")
    assert "[##############################] 100 % 10 pages" in err
