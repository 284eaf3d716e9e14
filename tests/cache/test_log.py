"""The operation log: the tree at every step, page for page; what an explanation says is what happened."""

from __future__ import annotations

import json

import numpy as np
import pytest

import radixkv
from radixkv import cli
from radixkv.journal_log import is_log, read_log
from radixkv.journal_story import Explanation, Story, story_of
from tests.cache.test_cache import serve
from tests.cache.test_journal import full_pages, random_traffic


def rebuilt(story, step):
    """{page: its namespace, the tokens up to its end} of a story's tree."""
    pages, found = {p.page: p for p in story.state(step)}, {}
    for page, state in pages.items():
        tokens, above = state.tokens, state.parent
        while above >= 0:
            tokens, above = (*pages[above].tokens, *tokens), pages[above].parent
        found[page] = state.namespace, tokens
    return found


@pytest.mark.parametrize("page_size", [1, 3])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", ["lru", "hazard"])
def test_the_tree_at_every_step_page_for_page(tmp_path, page_size, seed, policy):
    rng = np.random.default_rng(seed)
    cache = radixkv.PrefixCache(40, page_size, policy)
    for _ in random_traffic(cache, rng, 10):  # what was there before is in the log as well
        pass
    journal = cache.journal()
    recorded = {journal.end: full_pages(cache)}
    with cache.record(str(tmp_path / "log")) as log:
        for _ in random_traffic(cache, rng, 200):
            recorded[journal.end] = full_pages(cache)
            log.pump()
        recorded[journal.end] = full_pages(cache)
    story = read_log(str(tmp_path / "log"))
    assert (story.begin, story.end, story.gaps) == (min(recorded), max(recorded), [])
    for step, pages in recorded.items():
        assert rebuilt(story, step) == pages
    steps = sorted(recorded)
    for before, after in zip(steps, steps[7:], strict=False):
        came, went = story.diff(before, after)
        left = set(story.state(before)) - set(went) | set(came)
        assert left == set(story.state(after))


def test_steps_that_were_lost_are_refused_and_the_rest_is_whole(tmp_path):
    cache = radixkv.PrefixCache(4, 1)
    with cache.record(str(tmp_path / "log")) as log:
        with log._lock:  # the log's thread waits
            for i in range(40):
                serve(cache, [i, i, i])
        serve(cache, [7, 8, 9])
        log.pump()
        assert log.num_lost == 1
        assert log.num_requests == 41
        now = full_pages(cache)
    story = read_log(str(tmp_path / "log"))
    assert rebuilt(story, story.end) == now
    [(begin, end)] = story.gaps
    with pytest.raises(radixkv.InvalidArgument, match=f"steps {begin} to {end} were lost"):
        story.state(begin + 1)
    with pytest.raises(radixkv.InvalidArgument, match=f"step 99999: the log has 0 to {story.end}"):
        story.state(99999)


def test_who_evicted_what_when_and_what_would_have_kept_it(tmp_path):
    path = str(tmp_path / "log")
    cache = radixkv.PrefixCache(10, 4)
    with cache.record(path) as log:
        serve(cache, list(range(32)))  # request 1
        log.pump()
        for i in range(2):  # requests 2 and 3 need 4 pages each: 2 are free, then none is
            serve(cache, [100 + i] * 16)
        log.pump()
    found = read_log(path).explain(list(range(32)))
    assert (found.num_tokens, found.num_cached, found.wanted, found.instead) == (32, 8, 8, None)
    assert found.removed_by == 3
    assert found.idle_seconds is not None
    assert 0 <= found.idle_seconds < 60
    assert found.pool_factor == 1.6  # 8 + 4 + 4 pages
    assert "8 of 32 tokens are cached; nothing cached goes on at token 8 (8)" in str(found)
    assert f"was evicted at step {found.removed_at} by request 3" in str(found)
    assert "a pool 1.6 times as large would have kept it" in str(found)


def test_the_step_of_a_removal_is_the_step_after_which_the_page_is_gone(tmp_path):
    path = str(tmp_path / "log")
    cache = radixkv.PrefixCache(8, 4)
    with cache.record(path):
        serve(cache, list(range(16)))
        cache.evict(2)
    story = read_log(path)
    found = story.explain(list(range(16)))
    gone = {tokens for _, tokens in rebuilt(story, found.removed_at).values()}
    after = {tokens for _, tokens in rebuilt(story, found.removed_at + 1).values()}
    assert gone - after == {tuple(range(12))}
    assert "taken out at step" in str(found)
    assert "by evict() or clear()" in str(found)


def test_where_a_prompt_diverges(tmp_path):
    path = str(tmp_path / "log")
    cache = radixkv.PrefixCache(8, 4)
    with cache.record(path):
        serve(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    story = read_log(path)
    found = story.explain([1, 2, 3, 4, 5, 6, 9, 9])
    assert (found.num_cached, found.wanted, found.instead, found.removed_at) == (6, 9, 7, None)
    assert "diverged at token 6 (9 against 7)" in str(found)
    assert "diverged at token 6 ('nine' against 'seven')" in found.text(lambda ids: {9: "nine", 7: "seven"}[ids[0]])
    assert str(story.explain([1, 2, 3, 4])) == "all 4 tokens are cached"
    assert story.explain([1, 2, 3, 4], "another").num_cached == 0


def test_a_request_is_explained_as_of_when_it_came(tmp_path, capsys):
    path = str(tmp_path / "log")
    cache = radixkv.PrefixCache(10, 4)
    prompts = [list(range(32)), [100] * 16, [101] * 16, list(range(32)), [7] * 8]
    with cache.record(path) as log:
        for prompt in prompts:
            serve(cache, prompt)
            log.pump()
    story = read_log(path)
    assert story.explain(prompts[0]).num_cached == 32, "it is there again, for request 4 computed it"
    then = story.explain_request(4)
    earlier = tmp_path / "earlier"
    cache = radixkv.PrefixCache(10, 4)
    with cache.record(str(earlier)) as log:
        for prompt in prompts[:3]:
            serve(cache, prompt)
            log.pump()
    now = read_log(str(earlier)).explain(prompts[3])
    assert (then.num_cached, then.removed_by, then.removed_at) == (now.num_cached, now.removed_by, now.removed_at)
    assert (then.num_cached, then.removed_by, then.pool_factor) == (8, 3, 1.6)
    assert story.explain_request(1).num_cached == 0
    assert "no page that held the rest is known" in str(story.explain_request(5))
    with pytest.raises(radixkv.InvalidArgument, match="request 9: the log has 5, 1 to 5"):
        story.explain_request(9)
    assert cli.main(["log", path, "--request", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pool_factor"] == 1.6


def test_a_replay_writes_its_log(tmp_path, capsys):
    path = str(tmp_path / "log")
    arguments = ["replay", "chat", "--requests", "30", "--capacity-tokens", "2k"]
    assert cli.main([*arguments, "--log", path, "--json"]) == 0
    logged = json.loads(capsys.readouterr().out)
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hit_tokens"] == logged["hit_tokens"]
    story = read_log(path)
    assert (len(story.releases), story.gaps) == (30, [])
    assert sum(release.num_cached for release in story.releases) == logged["hit_tokens"]
    assert cli.main([*arguments, "--log", str(tmp_path / "no" / "log")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_a_live_cache_explains_what_its_journal_tells():
    cache = radixkv.PrefixCache(8, 4)
    serve(cache, list(range(100, 108)))
    cache.journal()
    serve(cache, list(range(16)))
    assert str(cache.explain(list(range(16)))) == "all 16 tokens are cached"
    cache.evict(1)
    assert cache.match(list(range(100, 108))) == 4
    assert cache.explain(list(range(100, 108))).removed_by == 0
    for i in range(30):  # more records than the journal keeps
        serve(cache, [50 + i] * 16)
    assert cache.explain(list(range(100, 108))).removed_at is None
    assert cache.explain([79] * 16).wanted is None
    found = cache.explain([77] * 16)
    assert found.removed_at is not None
    assert found.num_cached == cache.match([77] * 16)
    assert rebuilt(story_of(cache), story_of(cache).end) == full_pages(cache)
    with pytest.raises(radixkv.InvalidTokens):
        cache.explain([-1])


FAMILY = (
    ("acme", list(range(16))),  # four pages of the tenant
    ("acme/ann", [*range(16), *range(20, 28)]),  # and two of hers on top
    ("acme/bob", [*range(16), *range(30, 38)]),
)


@pytest.mark.parametrize("how", ["live", "log"])
def test_explanations_look_into_the_namespaces_above(tmp_path, how, capsys):
    cache = radixkv.PrefixCache(40, 4, hierarchical=True)
    path = str(tmp_path / "log")
    cache.journal()
    with cache.record(path):
        for namespace, tokens in FAMILY:
            serve(cache, tokens, namespace)
    explain = cache.explain if how == "live" else read_log(path).explain
    for namespace, tokens in FAMILY:
        for other in ("acme", "acme/ann", "acme/bob", "acme/ann/1", "zenith"):
            found = explain(tokens, other)
            assert found.num_cached == cache.match(tokens, other), (namespace, other)
    assert str(explain(FAMILY[1][1], "acme/ann")) == "all 24 tokens are cached"
    assert explain(FAMILY[1][1], "acme/bob").instead == 30  # his own, never hers
    assert explain(FAMILY[1][1], "acme").instead is None
    if how == "log":
        assert is_log(path)
        assert cli.main(["log", path, "--request", "2", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["num_cached"] == 16


def test_what_a_namespace_above_lost_is_why_a_user_misses(tmp_path):
    cache = radixkv.PrefixCache(8, 4, hierarchical=True)
    with cache.record(str(tmp_path / "log")) as log:
        for namespace, tokens in (FAMILY[0], ("acme/ann", [7] * 16), ("acme/ann", [8] * 16)):
            serve(cache, tokens, namespace)
            log.pump()
        assert cache.match(FAMILY[0][1], "acme/ann") == 0
    found = read_log(str(tmp_path / "log")).explain(FAMILY[0][1], "acme/ann")
    assert (found.num_cached, found.removed_by) == (0, 3)
    assert found.pool_factor == 1.4  # 12 pages, of 4 and 4 and 4
    assert read_log(str(tmp_path / "log")).explain(FAMILY[0][1], "zenith").removed_at is None


def test_explanations_of_any_family(tmp_path):
    """What is cached, by the log, is what is cached, whoever asks; in full pages, which the journal has."""
    names = ("a", "a/b", "a/c", "a/b/d", "b")
    for seed in range(4):
        rng = np.random.default_rng(seed)
        cache = radixkv.PrefixCache(12, 2, hierarchical=True)
        journal, story = cache.journal(), Story(12, 2, hierarchical=True)
        for _ in range(60):
            tokens, name = rng.integers(0, 2, int(rng.integers(1, 12))).tolist(), str(rng.choice(names))
            with cache.acquire([*tokens, 9], name) as lease:
                lease.advance(max(0, len(tokens) // 2 * 2 - lease.num_written))
            story.add(journal.read(story.end))
            for asked in names:
                found = story.explain(tokens, asked, sizes=False)
                assert found.num_cached == cache.match(tokens, asked)
                assert (found.removed_at is None) or (found.num_cached < len(tokens))


def test_a_file_that_is_no_log(tmp_path):
    path = tmp_path / "log"
    for content in (b"", b"hello", b"\x81\xa1a\x01"):
        path.write_bytes(content)
        with pytest.raises(radixkv.TraceError, match="is no operation log of version 1"):
            read_log(str(path))
    with pytest.raises(radixkv.TraceError, match="cannot read"):
        read_log(str(tmp_path / "none"))
    with pytest.raises(radixkv.TraceError, match="cannot write"):
        radixkv.PrefixCache(4, 4).record(str(tmp_path / "no" / "log"))


def test_a_log_that_was_cut_short_is_whole_up_to_there(tmp_path):
    path = tmp_path / "log"
    cache = radixkv.PrefixCache(8, 2)
    with cache.record(str(path)) as log:
        for i in range(8):
            serve(cache, [i] * 4)
            log.pump()
    whole, known = path.read_bytes(), read_log(str(path))
    for cut in range(60, len(whole), 7):
        path.write_bytes(whole[:cut])
        try:
            story = read_log(str(path))
        except radixkv.TraceError:
            continue
        assert rebuilt(story, story.end) == (rebuilt(known, story.end) if story.end else {})


def test_a_log_that_is_damaged_is_a_trace_error_or_a_log(tmp_path):
    path, rng = tmp_path / "log", np.random.default_rng(5)
    cache = radixkv.PrefixCache(8, 2)
    with cache.record(str(path)):
        serve(cache, [1, 2, 3, 4, 5])
    whole = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(len(whole), size=3):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_log(str(path))
        except radixkv.TraceError:
            continue


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    cache = radixkv.PrefixCache(8, 2)
    log = cache.record(str(tmp_path / "log"))

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    with log._lock:
        log._stream.close()
        log._stream = Full()
    serve(cache, [1, 2, 3, 4])
    with pytest.raises(radixkv.TraceError, match="stopped after 0 steps: No space left on device: make room"):
        log.close()
    log.close()


def test_the_command(tmp_path, capsys):
    path = str(tmp_path / "log")
    cache = radixkv.PrefixCache(4, 4)
    with cache.record(path):
        serve(cache, list(range(12)))
        serve(cache, [50] * 8)

    def run(*arguments):
        assert cli.main(["log", path, *arguments]) == 0
        return capsys.readouterr().out

    assert "5 pages stored, 1 removed" in run()
    assert json.loads(run("--json"))["requests"] == 2
    end = json.loads(run("--json"))["last_step"]
    assert len(json.loads(run("--state", str(end), "--json"))["pages"]) == 4
    assert "begins ''" in run("--state", "4")
    assert [len(json.loads(run("--diff", "4", str(end), "--json"))[k]) for k in ("came", "went")] == [2, 1]
    assert "8 of 12 tokens are cached" in run("--explain", " ".join(map(str, range(12))))
    assert json.loads(run("--explain", "50 50", "--json"))["num_cached"] == 2
    assert cli.main(["log", path, "--explain", "hello"]) == 1
    assert "'hello' are no token ids: give numbers, or --tokenizer" in capsys.readouterr().err


def test_an_explanation_without_times():
    assert "s after" not in str(Explanation(8, 4, 1, None, 9, 2))


def test_requests_that_were_lost_are_counted(tmp_path):
    path = str(tmp_path / "log")
    cache = radixkv.PrefixCache(4000, 16)
    with cache.record(path) as log:
        with log._lock:
            for i in range(40):
                serve(cache, [i] * 60_000)  # the journal keeps 2**20 tokens of releases
        log.pump()
    story = read_log(path)
    assert story.lost_releases + len(story.releases) == 40
    assert story.lost_releases > 20
    assert story.explain([0] * 60_000).pool_factor is None
