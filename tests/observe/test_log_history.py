"""The page of an operation log: at every step it shows the tree that was recorded."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import radixkv
from radixkv.cli import main
from radixkv.errors import InvalidArgument
from radixkv.journal_log import is_log, read_log
from radixkv.observe import history_of, timeline_html
from tests.cache.test_cache import serve
from tests.cache.test_journal import random_traffic
from tests.cache.test_log import rebuilt
from tests.observe.test_tree_html import IN_BROWSER, drive, prefix_of


def recorded(path, prompts, num_pages=6, page_size=2):
    cache = radixkv.PrefixCache(num_pages, page_size)
    with cache.record(str(path)) as log:
        for prompt, namespace in prompts:
            serve(cache, prompt, namespace)
            log.pump()
    return read_log(str(path))


def shown(history, place):
    return {prefix_of(history, i) for i in range(len(history.runs)) if history.is_alive(i, place)}


@settings(max_examples=40)
@given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.sampled_from("ab")), max_size=25))
def test_every_moment_is_the_recorded_tree(tmp_path_factory, prompts):
    story = recorded(tmp_path_factory.mktemp("log") / "log", prompts)
    history = history_of(story)
    assert [m.request for m in history.moments if m.request] == list(range(1, len(prompts) + 1))
    assert len(history.uses) == len(history.moments)
    for place, moment in enumerate(history.moments):
        assert shown(history, place) == set(rebuilt(story, moment.step).values())
    for place, (prompt, namespace) in enumerate(prompts, 1):
        use, whole = history.uses[place], tuple(prompt[: len(prompt) // 2 * 2])
        assert prefix_of(history, use) == (namespace, whole) if use >= 0 else not whole


@pytest.mark.parametrize("policy", ["lru", "hazard"])
def test_forks_pins_evictions_and_clears_are_in_it(tmp_path, policy):
    cache = radixkv.PrefixCache(40, 3, policy)
    for _ in random_traffic(cache, np.random.default_rng(1), 20):
        pass
    with cache.record(str(tmp_path / "log")) as log:
        for _ in random_traffic(cache, np.random.default_rng(2), 300):
            log.pump()
        cache.clear()
    story = read_log(str(tmp_path / "log"))
    history = history_of(story)
    assert len(history.moments) > 100
    for place, moment in list(enumerate(history.moments))[::7]:
        assert shown(history, place) == set(rebuilt(story, moment.step).values())
    assert history.moments[0].step == story.begin > 0 == history.moments[-1].request
    assert history.moments[-1].step == story.end


def test_where_records_were_lost_there_is_no_moment(tmp_path):
    cache = radixkv.PrefixCache(4, 1)
    with cache.record(str(tmp_path / "log")) as log:
        serve(cache, [5, 5])
        log.pump()
        with log._lock:
            for i in range(40):
                serve(cache, [i, i, i])
        serve(cache, [7, 8, 9])
        log.pump()
    story = read_log(str(tmp_path / "log"))
    [(begin, end)] = story.gaps
    history = history_of(story)
    assert not [m for m in history.moments if begin < m.step < end]
    for place, moment in enumerate(history.moments):
        assert shown(history, place) == set(rebuilt(story, moment.step).values())


def test_a_part_of_a_log(tmp_path):
    story = recorded(tmp_path / "log", [([i] * 8, "") for i in range(12)], num_pages=8)
    half = story.end // 2
    history = history_of(story, half, story.end - 3)
    assert (history.moments[0].step, history.moments[-1].step) == (half, story.end - 3)
    assert len(history.runs) < len(history_of(story).runs)
    for place, moment in enumerate(history.moments):
        assert shown(history, place) == set(rebuilt(story, moment.step).values())
    with pytest.raises(InvalidArgument, match=f"steps 0 to {story.end + 1}: the log has 0 to {story.end}"):
        history_of(story, 0, story.end + 1)


def test_an_empty_log(tmp_path):
    history = history_of(recorded(tmp_path / "log", []))
    assert (len(history.moments), history.runs) == (1, [])
    assert "<svg" in timeline_html(history)


@IN_BROWSER
def test_the_slider_steps_through_the_log(tmp_path):
    story = recorded(tmp_path / "log", [([i] * 13, "") for i in range(3)], num_pages=6, page_size=4)
    history = history_of(story)
    script = """
    for (const at of [0, 1, 2, 3]) {
      $("step").value = at; $("step").oninput();
      log.push($("when").textContent.replace(/[\\d.]+ s:/, "T s:"), $("at").value);
      log.push(type("1 1 1 1 1 1 1 1 1 1 1 1"), boxes().length);
    }
    $("at").value = WANTED; $("at").oninput(); log.push($("step").value, $("jump").hidden);
    """
    wanted = history.moments[2].step
    log = drive(tmp_path, timeline_html(history), script.replace("WANTED", str(wanted)))
    for place, moment in enumerate(history.moments):
        pages = len(story.state(moment.step))
        request = f"request {moment.request}, " if moment.request else ""
        there = max((len(t) for _, t in rebuilt(story, moment.step).values() if set(t) == {1}), default=0)
        assert log[4 * place : 4 * place + 3] == [
            f"after step {moment.step} of {story.end}, {request}T s: {4 * pages} tokens in {pages} of 6 pages",
            str(moment.step),
            f"{there} of 12 tokens are cached",
        ]
        assert log[4 * place + 3] == len({tokens[0] for _, tokens in rebuilt(story, moment.step).values()})
    assert log[-2:] == ["2", False]


def test_the_command(tmp_path, capsys):
    path, file = tmp_path / "cache.log", tmp_path / "cache.html"
    story = recorded(path, [([i] * 8, "") for i in range(9)])
    assert is_log(str(path))
    assert not is_log(str(tmp_path))
    assert main(["view", str(path), "-o", str(file)]) == 0
    assert "9 requests, 6 pages of 2 tokens" in capsys.readouterr().err
    assert "<svg" in file.read_text()
    assert main(["view", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [step["request"] for step in found["steps"]] == list(range(10))
    assert sum(run["died"] < 0 for run in found["runs"]) == len(story.state(story.end))
    assert main(["view", str(path), "--steps", "4", "9", "--json", "-o", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["steps"][0]["step"] == 4
    for arguments, message in (
        (("--capacity-tokens", "100"), "is an operation log"),
        (("--steps", "3", "999"), "the log has 0 to"),
        (("--json", "-o", "-"), "two outputs"),
    ):
        assert main(["view", str(path), *arguments]) == 1
        assert message in capsys.readouterr().err
    assert main(["view", "chat", "--steps", "1", "2"]) == 1
    assert "--steps is for an operation log, and chat is none" in capsys.readouterr().err


def test_a_trace_as_json(capsys):
    assert main(["view", "chat", "--requests", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["steps"]) == 6
    assert found["runs"][0]["tokens"]
