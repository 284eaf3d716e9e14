"""The Prometheus collector: every figure where it belongs, and a dashboard and alerts that name what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import radixkv
from radixkv.observe.metrics import MAX_GROUPS, Metrics
from radixkv.scheduling import Request, Scheduler

prometheus_client = pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")

MONITORING = Path(__file__).parents[2] / "docs" / "monitoring"


class Host:
    """The engine of a host that computes nothing."""

    def __init__(self, num_pages=64, page_size=4):
        self.cache = radixkv.PrefixCache(num_pages=num_pages, page_size=page_size)


class Figures:
    """What an engine of two layers with a disk tier says."""

    class Rows(NamedTuple):
        rows: int
        not_finite: int
        unusual: int
        sampled: int
        mean_error: float
        largest_error: float

    class Tiers:
        def stats(self):
            store = {"read": 7, "written": 9, "refused": 6, "failed": 2, "corrupt": 1, "breaker": "open"}
            counts = {"ready": 5, "late": 1, "declined": 4, "filled_tokens": 640, "skipped_writes": 3}
            return {**counts, "hub": {"slots": 10, "used": 4}, "stores": {"disk": store}}

    layers = (object(), object())
    tiers: object = Tiers()

    def __init__(self):
        self.attention = self

    def stored(self, layer):
        return self.Rows(100, 0, 1, 10, 0.01, 0.02), self.Rows(100, layer, 2, 30 * layer, 0.03, 0.04 + layer)


class Plan:
    tokens_read = 1000
    tokens_saved = 600


def exported(metrics):
    registry = prometheus_client.CollectorRegistry()
    registry.register(metrics)
    return prometheus_client.generate_latest(registry).decode()


def value(text, series):
    found = re.findall(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
    assert len(found) == 1, f"{series} is there {len(found)} times in\n{text}"
    return float(found[0])


def served(metrics, *prompts, namespaces=None, num_pages=64, new_tokens=4):
    """Serves all prompts at once; each answer is of token 7."""
    host = Host(num_pages)
    scheduler = Scheduler(host)
    metrics = Metrics(host.cache) if metrics is None else metrics(host.cache)
    for prompt, namespace in zip(prompts, namespaces or [""] * len(prompts), strict=True):
        request = Request(prompt, new_tokens, namespace=namespace)
        scheduler.submit(request)
        assert metrics.watch(request) is request
    while True:
        with metrics.step():
            batch = scheduler.next()
            if batch is None:
                break
            for lease in batch.leases:
                lease.advance()
            scheduler.accept([7] * len(batch.drawing))
    return host.cache, metrics


def test_figures_are_those_of_the_cache_and_of_its_requests():
    prompt = list(range(40))
    cache, metrics = served(None, prompt, [*prompt, 50, 51, 52])
    with cache.acquire(prompt):
        text, stats = exported(metrics), cache.stats()
    for state in ("free", "private", "protected", "evictable"):
        assert value(text, f'radixkv_pages{{state="{state}"}}') == getattr(stats, state)
    assert value(text, "radixkv_pages_in_use_ratio") == (stats.private + stats.protected) / 64 > 0
    assert value(text, "radixkv_hit_tokens_total") == stats.hit_tokens > 0
    assert value(text, "radixkv_input_tokens_total") == stats.input_tokens
    assert value(text, "radixkv_evicted_pages_total") == stats.evicted_pages
    assert value(text, 'radixkv_finished_requests_total{group="default",status="length"}') == 2
    assert value(text, 'radixkv_finished_tokens_total{group="default",kind="prompt"}') == 83
    assert value(text, 'radixkv_finished_tokens_total{group="default",kind="generated"}') == 8
    assert value(text, 'radixkv_queue_requests{status="running"}') == 0
    assert value(text, "radixkv_time_to_first_token_seconds_count") == 2
    assert value(text, 'radixkv_step_seconds_bucket{le="+Inf"}') == value(text, "radixkv_step_seconds_count") > 4


def test_groups_are_the_callers_and_bounded():
    names = ["", "a-1", "a-2", "b-1"]
    _, metrics = served(lambda cache: Metrics(cache, lambda name: name[:1] or "none"), *[[1, 2]] * 4, namespaces=names)
    text = exported(metrics)
    assert value(text, 'radixkv_finished_requests_total{group="a",status="length"}') == 2
    assert value(text, 'radixkv_finished_requests_total{group="none",status="length"}') == 1
    assert "a-1" not in text
    many = [str(n) for n in range(MAX_GROUPS + 7)]
    _, metrics = served(lambda cache: Metrics(cache, str), *[[1]] * len(many), namespaces=many, num_pages=512)
    assert value(exported(metrics), 'radixkv_finished_requests_total{group="other",status="length"}') == 7


def test_preemptions_count_while_a_request_is_under_way_and_never_fall():
    prompts = [list(range(20 * i, 20 * i + 20)) for i in range(6)]
    host = Host(num_pages=100)
    scheduler, metrics = Scheduler(host), Metrics(host.cache)
    requests = [metrics.watch(Request(prompt, 200)) for prompt in prompts]
    scheduler.submit(requests[0])
    for request in requests[1:]:
        scheduler.submit(request)
    seen = [0.0]
    while (batch := scheduler.next()) is not None:
        for lease in batch.leases:
            lease.advance()
        scheduler.accept([7] * len(batch.drawing))
        seen.append(value(exported(metrics), "radixkv_preemptions_total"))
    assert seen == sorted(seen)
    assert seen[-1] == sum(request.stats.preemptions for request in requests) > 0


def test_a_step_that_raises_is_timed_and_cascades_add_up():
    metrics = Metrics(radixkv.PrefixCache(num_pages=4))
    with pytest.raises(RuntimeError, match="model"), metrics.step():
        raise RuntimeError("model")
    metrics.add_plan(Plan())
    metrics.add_plan(Plan())
    text = exported(metrics)
    assert value(text, "radixkv_step_seconds_count") == 1
    assert value(text, "radixkv_cascade_saved_tokens_total") == 1200


def test_requests_that_are_done_are_let_go_where_nobody_scrapes():
    host = Host()
    scheduler, metrics = Scheduler(host), Metrics(host.cache)
    for token in range(20):
        scheduler.submit(metrics.watch(Request([token], 1)))
        batch = scheduler.next()
        batch.leases[0].advance()
        scheduler.accept([7])
    assert len(metrics._watched) == 1
    assert value(exported(metrics), 'radixkv_finished_requests_total{group="default",status="length"}') == 20


def test_a_scrape_changes_nothing():
    cache, metrics = served(None, list(range(40)))
    before = str(cache.snapshot()), cache.stats()
    first = exported(metrics)
    assert exported(metrics) == first
    assert (str(cache.snapshot()), cache.stats()) == before


def test_what_formats_stored_and_tiers_did():
    text = exported(Metrics(radixkv.PrefixCache(4)).follow(Figures()))
    assert value(text, 'radixkv_stored_rows_total{tensor="k"}') == 200
    assert value(text, 'radixkv_stored_not_finite_rows_total{tensor="v"}') == 1
    assert value(text, 'radixkv_stored_unusual_rows_total{tensor="v"}') == 4
    assert value(text, 'radixkv_stored_mean_error_ratio{tensor="k"}') == pytest.approx(0.01)
    assert value(text, 'radixkv_stored_largest_error_ratio{tensor="v"}') == 1.04
    assert value(text, 'radixkv_tier_fetches_total{result="late"}') == 1
    assert value(text, "radixkv_tier_filled_tokens_total") == 640
    assert value(text, 'radixkv_tier_hub_slots{state="free"}') == 6
    assert value(text, 'radixkv_tier_store_events_total{event="written",store="disk"}') == 9
    assert value(text, 'radixkv_tier_store_up{store="disk"}') == 0


def test_an_engine_that_counts_nothing_more():
    bare = Figures()
    bare.attention, bare.tiers = object(), None
    text = exported(Metrics(radixkv.PrefixCache(4)).follow(bare))
    assert "radixkv_stored" not in text
    assert "radixkv_tier" not in text


def test_a_real_engine_tells_the_same_as_its_attention():
    torch = pytest.importorskip("torch")
    engine = radixkv.Engine(
        num_layers=2, num_qo_heads=2, num_kv_heads=1, head_dim=64, num_pages=16, dtype=torch.bfloat16, kv_format="int8"
    )
    with engine.acquire(list(range(40))) as lease, engine.step([lease]) as step:
        rows = len(step.input_ids)
        for layer in range(2):
            q, k, v = (torch.randn(rows, heads, 64, dtype=torch.bfloat16) for heads in (2, 1, 1))
            k[3, 0, 5] = float("nan")
            step.attend(layer, q, k, v)
    text = exported(Metrics(engine.cache).follow(engine))
    assert value(text, 'radixkv_stored_rows_total{tensor="k"}') == 80
    assert value(text, 'radixkv_stored_not_finite_rows_total{tensor="k"}') == 2
    assert value(text, 'radixkv_stored_not_finite_rows_total{tensor="v"}') == 0
    assert "radixkv_tier" not in text


def names_in(text):
    return set(re.findall(r"radixkv_\w+", text)) - {"radixkv_"}


def test_dashboard_and_alerts_name_metrics_that_exist():
    _, metrics = served(None, [1, 2, 3])
    text = exported(metrics.follow(Figures()))
    known = set(re.findall(r"^(radixkv_\w+)", text, re.MULTILINE))
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) >= 12
    used = names_in(" ".join(expressions)) | names_in((MONITORING / "alerts.yml").read_text())
    assert used <= known, used - known
    boxes = [tuple(panel["gridPos"][k] for k in "xywh") for panel in dashboard["panels"]]
    assert len(set(boxes)) == len(boxes)
    assert all(x + w <= 24 for x, _, w, _ in boxes)


PROMTOOL = shutil.which("promtool")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian's package prometheus has it)")
def test_promtool_finds_nothing_to_say(tmp_path):
    assert PROMTOOL is not None
    _, metrics = served(None, [1, 2, 3])
    metrics.follow(Figures())
    checks = [
        subprocess.run(
            [PROMTOOL, "check", "metrics"], input=exported(metrics), capture_output=True, text=True, check=False
        ),
        subprocess.run(
            [PROMTOOL, "check", "rules", MONITORING / "alerts.yml"], capture_output=True, text=True, check=False
        ),
    ]
    checks.append(
        subprocess.run(
            [PROMTOOL, "test", "rules", MONITORING / "alerts_test.yml"], capture_output=True, text=True, check=False
        )
    )
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    records = [{"record": f"r{i}", "expr": re.sub(r"\$__\w+", "1m", expr)} for i, expr in enumerate(expressions)]
    (tmp_path / "dashboard.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": records}]}))
    checks.append(
        subprocess.run(
            [PROMTOOL, "check", "rules", tmp_path / "dashboard.yml"], capture_output=True, text=True, check=False
        )
    )
    assert [(done.returncode, done.stderr) for done in checks] == [(0, "")] * 4, checks
    assert "6 rules found" in checks[1].stdout
    assert "SUCCESS" in checks[2].stdout


def test_without_prometheus_client():
    code = """
import sys
sys.modules["prometheus_client"] = None
import radixkv
from radixkv.observe.metrics import Metrics
try:
    Metrics(radixkv.PrefixCache(4))
except radixkv.BackendUnavailable as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'radixkv[metrics]'" in done.stdout


def test_what_larger_pools_would_have_found():
    cache = radixkv.PrefixCache(10, 4)
    metrics = Metrics(cache)
    for _ in range(20):
        for i in range(4):
            with cache.acquire([i] * 16 + [9]) as lease:
                lease.advance()
    text, curve = exported(metrics), cache.curve()
    assert value(text, "radixkv_what_if_input_tokens_total") == 20 * 4 * 17
    assert value(text, 'radixkv_what_if_hit_tokens_total{times="1"}') == curve.hit_tokens
    assert value(text, 'radixkv_what_if_hit_tokens_total{times="2"}') == curve.larger[2.0] > 4 * curve.hit_tokens
    assert value(text, 'radixkv_what_if_hit_tokens_total{times="1.25"}') == curve.larger[1.25]
