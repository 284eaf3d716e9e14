"""The benchmarks' own parts: commands that are there, tables of pages, contenders that are not, summaries."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.common.page_tables import PAGE_SIZE, table_of
from bench.common.process import Contender, environment, run
from bench.common.results import spread, summary
from bench.common.venv import Venv

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "Makefile", ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "bench").rglob("*.*")]
NAMED = {
    (path.relative_to(ROOT), match[1])
    for path in TEXTS
    if path.suffix in {"", ".md", ".py", ".cpp", ".json"}
    for match in re.finditer(r"-m (bench(?:\.\w+)*)", path.read_text())
}


@pytest.mark.parametrize(("path", "module"), sorted(NAMED), ids=str)
def test_a_command_that_is_named_is_there(path, module):
    found = importlib.util.find_spec(module)
    assert found is not None, f"{path} names {module}"
    if found.submodule_search_locations:
        found = importlib.util.find_spec(f"{module}.__main__")
        assert found is not None, f"{path} names {module}, a folder that is no command"
    assert 'if __name__ == "__main__":' in Path(found.origin).read_text()


def test_commands_are_found():
    assert {"bench", "bench.cache.peers", "bench.end_to_end.setup"} <= {module for _, module in NAMED}


def test_requests_of_a_table_share_what_they_shall_and_nothing_else():
    batch, length, rows, shared = 3, 6 * PAGE_SIZE - 5, 7, 2 * PAGE_SIZE
    table, num_pages = table_of(batch, length, rows, shared)
    pages = table.kv_indices.reshape(batch, 6)
    assert (pages[:, :2] == pages[0, :2]).all()
    assert sorted({*table.kv_indices.tolist()}) == list(range(num_pages)) == list(range(2 + batch * 4))
    assert table.kv_last_page_len.tolist() == [PAGE_SIZE - 5] * batch
    assert np.diff(table.qo_indptr).tolist() == [rows] * batch
    for mine, slots in zip(pages, table.slots.reshape(batch, rows), strict=True):
        every = (mine[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).ravel()
        assert slots.tolist() == every[length - rows : length].tolist()


def test_a_peer_that_is_not_there_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.common.venv.ROOT", tmp_path)
    home = Venv("some-venv")
    contender = Contender("some peer", "driver", home, "peer")
    assert contender.measure("bench") == {"error": "not installed: run make some-venv"}
    home.folder.mkdir(parents=True)
    home.finish({"peer": "ERROR: no such package"})
    assert contender.measure("bench") == {"error": "not installed: ERROR: no such package"}
    home.finish({})
    assert home.why_missing("peer") == ""


def test_a_contender_that_fails_says_why():
    found = Contender("radixkv", "driver").measure("bench.nothing")
    assert found["error"].startswith("cannot be driven: ")
    assert "bench.nothing" in found["error"]


def test_a_process_gets_its_threads():
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.getcwd())"
    assert run(sys.executable, "-c", code, threads=3).split() == ["3", str(ROOT)]
    assert environment()["OMP_NUM_THREADS"] == "1"


def test_a_summary_is_the_table_without_what_it_was_made_from():
    row = {"measure": "a", "unit": "us", "figures": {"radixkv": 1.5}}
    results = {
        "date": "2026-01-01",
        "speed": {"threads": 1, "results": [1, 2], "rows": [row, row], "notes": ["n"]},
        "end": {"threads": {"1": {"contenders": {}}}, "rows": []},
    }
    kept = summary(results)
    assert kept["speed"] == {"threads": 1, "rows": [row, row], "notes": ["n"]}
    assert kept["end"] == {"rows": []}
    text = spread(kept)
    assert json.loads(text) == kept
    assert text.count(json.dumps(row) + ",\n") == 1


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").iterdir()), ids=lambda p: p.name)
def test_only_summaries_are_committed(path):
    found = json.loads(path.read_text())
    assert path.read_text() == spread(summary(found)) + "\n"
