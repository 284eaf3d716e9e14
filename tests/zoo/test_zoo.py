"""Families of models on the engine: those known by hand, and a part of the rest in turn. `make zoo` tries all."""

import os
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.20")

from tests.hf.helpers import one_thread
from tests.zoo.families import families
from tests.zoo.judge import CACHE_REASONS, MISSING, REASONS, Verdict, judge
from tests.zoo.table import PAGE, read_table, table_of, transformers

PARTS = 16

# What must come of these, whatever a table says: a few that run and one for each reason.
BY_HAND = {
    "llama": "",
    "gemma3_text": "",
    "gemma4_text": "",
    "gemma3n_text, K and V shared": "",
    "gemma4_text, K and V shared": "",
    "gpt_oss": "",
    "mimo_v2_flash": "",
    "llama4_text": "",
    "mixtral": "",
    "stablelm": "",
    "granitemoehybrid, attention only": "",
    "llava": "",
    "qwen2_vl": "",
    "granitemoehybrid": "state between tokens",
    "lfm2, with convolutions": "state between tokens",
    "deepseek_v32": "sparse attention",
    "bloom": "own attention code",
    "bart": "positions or state by place in the batch",
    "kosmos-2.5": "positions counted from elsewhere",
    "phimoe": "window not told to attention",
    "udop": "encoder-decoder",
    "paligemma": "not causal",
    "instructblip": "needs more than tokens",
}
OPTIMIZED = {"llama", "mistral", "qwen2"}
LATENT = {"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k25", "longcat_flash", "minicpm3", "mistral4", "youtu"}


def part() -> int:
    """RADIXKV_ZOO_PART, or a part that changes with every commit."""
    if named := os.environ.get("RADIXKV_ZOO_PART"):
        return int(named) % PARTS
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return int(commit.stdout[:8] or "0", 16) % PARTS


PART = part()
REST = [name for name in families() if name not in BY_HAND]


@pytest.fixture(autouse=True, scope="module")
def single_threaded():
    with one_thread():
        yield


def assert_as_written(name: str, verdict: Verdict) -> None:
    """Not wrong, and what docs/models.md says, if that was written with the installed transformers."""
    assert verdict.verdict != "wrong", verdict
    version, table = read_table()
    if version == transformers.__version__ and table[name].reason != MISSING:
        assert verdict == table[name], "run python -m tests.zoo --write if this is meant"


@pytest.mark.parametrize("name", BY_HAND)
def test_families_known_by_hand(name):
    verdict = judge(name)
    expected = ("refused", BY_HAND[name]) if BY_HAND[name] else ("runs", "")
    assert (verdict.verdict, verdict.reason) == expected
    assert_as_written(name, verdict)


@pytest.mark.parametrize("name", REST[PART::PARTS], ids=lambda name: f"part {PART}: {name}")
def test_a_part_of_the_rest(name):
    assert_as_written(name, judge(name))


def test_the_table_names_every_family_and_no_unknown_reason():
    version, table = read_table()
    if version == transformers.__version__:
        assert table_of(table) in PAGE.read_text(), "run python -m tests.zoo --write"
        assert list(table) == sorted(families(), key=lambda name: (order(table[name]), name))
    assert sum(verdict.verdict != "untestable" for verdict in table.values()) >= 60
    assert sum(verdict.verdict == "untestable" for verdict in table.values()) <= len(table) / 10
    for name, verdict in table.items():
        assert verdict.verdict in ("runs", "refused", "untestable"), name
        if verdict.verdict == "refused":
            assert verdict.reason in REASONS, name
        if verdict.verdict == "runs":
            assert verdict.optimized in ("yes", "no"), name
            assert verdict.cached in {"yes", *CACHE_REASONS}, name
            assert verdict.latent in ("yes", "no", ""), name
    assert all(table[name].optimized == "yes" for name in OPTIMIZED)
    assert all(table[name].latent == "yes" for name in LATENT)


def order(verdict: Verdict) -> int:
    return ("runs", "refused", "untestable").index(verdict.verdict)
