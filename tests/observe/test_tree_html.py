"""The page of a cache: what it holds, against the cache, and what it does, in a browser."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import radixkv
from radixkv.cli import main
from radixkv.errors import InvalidArgument
from radixkv.observe import Timeline, timeline_html, tree_html
from tests.observe.browser import CHROMIUM, chromium

SYSTEM = "You are a helpful assistant of the city library. "


def serve(cache, tokens, namespace=""):
    with cache.acquire(tokens, namespace) as lease:
        lease.advance()


def letters(ids):
    return "".join(map(chr, ids))


def data_of(page):
    return json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture
def cache():
    cache = radixkv.PrefixCache(num_pages=64, page_size=8)
    for words in ("When do you open? ", "Where can I print? ", "Where can I sleep? "):
        serve(cache, [ord(c) for c in SYSTEM + words])
    return cache


def test_a_snapshot_is_wholly_in_the_page(cache):
    cache.pin([ord(c) for c in SYSTEM])
    with cache.acquire([ord(c) for c in SYSTEM + "When do you open? Thanks"]):
        snapshot = cache.snapshot()
    data = data_of(tree_html(snapshot, letters))
    paths = {}
    for i, (parent, text) in enumerate(zip(data["parent"], data["text"], strict=True)):
        assert parent < i
        paths[i] = paths.get(parent, "") + text
    leaves = sorted(paths[i] for i in set(paths) - set(data["parent"]))
    assert leaves == sorted(SYSTEM + w for w in ("When do you open? ", "Where can I print? ", "Where can I sleep? "))
    assert sum(data["pages"]) == cache.stats().protected + cache.stats().evictable
    assert data["state"][0] == "pinned"
    assert "leased" in data["state"]


def test_nothing_is_fetched_and_no_text_can_end_the_script():
    nasty = '</script><img src=x onerror="alert(1)">\0\ud800'
    cache = radixkv.PrefixCache(num_pages=8, page_size=2)
    serve(cache, [1, 2, 3, 4], "<b>tenant</b>")
    page = tree_html(cache.snapshot(), lambda ids: nasty, title="<i>mine</i>")
    page.encode()
    assert page.count("</script>") == 2
    assert "<i>mine" not in page
    assert not re.search(r'(src|href)=["\']?(http|//)|@import|url\(', page)
    assert data_of(page)["text"][0] == nasty


def test_too_many_tokens_are_refused():
    node = {"tokens": np.arange(4_000_001), "pages": [0], "locks": 0, "pins": 0, "children": []}
    many = [{"namespace": "", "children": [node]}]
    with pytest.raises(InvalidArgument, match="4000001 tokens"):
        tree_html(many)


@pytest.mark.parametrize("names", [("a", "b"), ("a", "a/b", "a/c", "a/b/d")], ids=["flat", "hierarchical"])
@given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(0, 3)), max_size=30))
def test_the_timeline_is_the_tree_at_every_step(names, prompts):
    cache = radixkv.PrefixCache(num_pages=6, page_size=2, hierarchical=len(names) > 2)
    prompts = [(prompt, names[i % len(names)]) for prompt, i in prompts]
    timeline, trees = Timeline(cache), [set()]
    for prompt, namespace in prompts:
        serve(cache, prompt, namespace)
        timeline.mark(np.array(prompt, dtype=np.int32), namespace)
        trees.append(full_pages(cache))
        end = timeline.uses[-1]
        assert (prefix_of(timeline, end)[1] if end >= 0 else ()) == tuple(prompt[: len(prompt) // 2 * 2])
    for step, tree in enumerate(trees):
        assert {prefix_of(timeline, timeline.runs.index(run)) for run in timeline.alive(step)} == tree


def prefix_of(timeline, i):
    """(namespace, all tokens down to the end of a run)."""
    tokens, namespace = (), timeline.runs[i].namespace
    while i >= 0:
        tokens, i = (*timeline.runs[i].tokens.tolist(), *tokens), timeline.runs[i].parent
    return namespace, tokens


def full_pages(cache):
    """The prefixes that end at a full page, as the cache itself tells."""
    found = set()
    for root in cache.snapshot():
        todo = [((), root["namespace"], node) for node in root["children"]]
        while todo:
            before, above, node = todo.pop()
            tokens, namespace = (*before, *node["tokens"].tolist()), node.get("namespace", above)
            ends = range(len(before) + cache.page_size, len(tokens) + 1, cache.page_size)
            found |= {(namespace, tokens[:end]) for end in ends}
            todo += [(tokens, namespace, child) for child in node["children"]]
    return found


def test_a_picture_of_a_family_says_whose_each_page_is():
    cache = radixkv.PrefixCache(num_pages=8, page_size=2, hierarchical=True)
    serve(cache, [1, 2, 3, 4], "acme")
    serve(cache, [1, 2, 3, 4, 5, 6], "acme/ann")
    data = data_of(cache.to_html())
    assert sorted(data["namespaces"]) == ["acme", "acme/ann"]
    assert [data["namespaces"][i] for i in data["namespace"]] == ["acme", "acme/ann"]


def test_marks_that_come_too_late_are_refused():
    cache = radixkv.PrefixCache(num_pages=4, page_size=2)
    timeline = Timeline(cache)
    for i in range(40):
        serve(cache, [i, i, i, i, i, i, i, i])
    with pytest.raises(InvalidArgument, match="forgotten"):
        timeline.mark(np.array([1], dtype=np.int32))


def test_view(capsys, tmp_path):
    file = tmp_path / "cache.html"
    assert main(["view", "chat", "--requests", "30", "--capacity-tokens", "2000", "-o", str(file)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "30 requests" in err
    data = data_of(file.read_text())
    assert len(data["uses"]) == 31
    assert data["num_pages"] == 125
    assert max(data["died"]) > 0


IN_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

DRIVE = """<script>
const log = [];
const boxes = () => [...document.querySelectorAll("#tree rect")];
const type = words => { $("query").value = words; $("query").oninput(); return $("hits").textContent; };
%s
document.body.setAttribute("data-log", JSON.stringify(log));
</script></body>"""


def drive(tmp_path, page, script, *arguments):
    """What a script found out that was run at the end of a page."""
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", DRIVE % script))
    dom = chromium(file, "--dump-dom", *arguments)
    found = re.search(r'data-log="(.*?)"', dom)
    assert found is not None, dom[-2000:]
    return json.loads(found[1].replace("&quot;", '"'))


@IN_BROWSER
def test_a_click_a_search_and_a_hover(tmp_path, cache):
    page = tree_html(cache.snapshot(), letters)
    script = """
    log.push(boxes().length, type("print"), document.querySelectorAll("rect.found").length);
    log.push(type("89 111 117 1"), type("nowhere"), type(""));
    boxes()[0].onpointerenter(); log.push($("detail").textContent);
    boxes().find(b => b.node.before && b.node.below.length === 2).onclick(); log.push(boxes().length, $("out").hidden);
    $("out").onclick(); log.push(boxes().length, $("out").hidden);
    $("out").onclick(); log.push($("out").hidden);
    """
    log = drive(tmp_path, page, script)
    assert log[:3] == [5, "in 1 box of 12 tokens", 1]
    assert log[3:6] == ["3 of 4 tokens are cached", "not found", ""]
    assert SYSTEM[:30] in log[6]
    assert log[6].startswith("48 tokens, 6 pages, after 0 tokens")
    assert log[7] == 3
    assert log[8:] == [False, 5, False, True]


@IN_BROWSER
def test_the_slider_shows_what_was_there(tmp_path):
    cache = radixkv.PrefixCache(num_pages=4, page_size=4)
    timeline = Timeline(cache)
    for i in range(3):
        prompt = np.array([i] * 12 + [9], dtype=np.int32)
        serve(cache, prompt)
        timeline.mark(prompt)
    script = """
    for (const at of [0, 1, 2, 3]) {
      $("step").value = at; $("step").oninput();
      log.push($("when").textContent, type("1 1 1 1 1 1 1 1 1 1 1 1"));
    }
    """
    log = drive(tmp_path, timeline_html(timeline), script)
    assert log[0::2] == [
        f"after request {step} of 3: {len(timeline.alive(step)) * 4} tokens in {len(timeline.alive(step))} of 4 pages"
        for step in range(4)
    ]
    assert log[1::2][:3] == [f"{n} of 12 tokens are cached" for n in (0, 0, 12)]


@IN_BROWSER
@pytest.mark.parametrize("width", [360, 1100])
def test_it_fits_its_window_and_is_legible(tmp_path, cache, width):
    """On a phone nothing scrolls sideways; text is drawn inside its box."""
    page = tree_html(cache.snapshot(), letters)
    script = """
    document.documentElement.style.width = "WIDTHpx"; draw();
    for (const each of document.querySelectorAll("body *")) log.push(each.getBoundingClientRect().right <= WIDTH);
    for (const text of document.querySelectorAll("#tree text:not(.name)")) {
      const inner = text.getBoundingClientRect(), box = text.previousSibling.getBoundingClientRect();
      log.push(inner.left >= box.left && inner.right <= box.right + 1 && inner.bottom <= box.bottom + 2);
    }
    """
    log = drive(tmp_path, page, script.replace("WIDTH", str(width)), "--window-size=1200,700")
    assert len(log) > 20
    assert all(log)
