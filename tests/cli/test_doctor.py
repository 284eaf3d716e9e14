"""radixkv doctor: what it says about right backends, wrong backends and missing ones."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from radixkv.attention import Options, PageTable, parity
from radixkv.attention.cascade import OFF
from radixkv.attention.native import NativeAttention
from radixkv.cli import main
from radixkv.errors import BackendUnavailable
from tests.attention.helpers import one_torch_thread as one_torch_thread
from tests.flashinfer.helpers import backend_over, each_target

pytestmark = pytest.mark.usefixtures("one_torch_thread")
KINDS = ("decode", "mixed", "extend", "cascade")
OPTIONS = (
    "", "scale", "window", "wide window", "soft cap", "window + soft cap", "chunks", "sinks", "head_dim 128",
    "8-bit", "8-bit, window", "8-bit, head_dim 128",
)  # fmt: skip


LATENT = {"decode, latent", "mixed, latent", "extend, latent"}


def named(*options: str) -> set[str]:
    return {f"{kind}, {option}" if option else kind for kind in KINDS for option in options}


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main(["doctor", "--batches", "3", "--json", *arguments])
    return status, json.loads(capsys.readouterr().out)


def test_the_native_backend_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = doctor(capsys, "--device", "cpu")
    assert (status, found["ok"]) == (0, True)
    assert found["attention"] == {"backend": "native", "why": "asked for, so the C++ kernels of this package run"}
    assert {(c["case"], c["dtype"]) for c in found["cases"]} == {
        (case, dtype) for case in named(*OPTIONS) | LATENT for dtype in ("float32", "bfloat16", "float16")
    }
    assert all(c["batches"] == 3 and 0 < c["error"] <= c["allowed"] and c["problem"] is None for c in found["cases"])
    assert main(["doctor", "--device", "cpu", "--batches", "1", "--dtype", "float16"]) == 0
    text = capsys.readouterr().out
    assert "51 of 51 cases are right" in text
    assert f"torch {torch.__version__}" in text


def test_the_build_of_torch_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The package index calls every build 2.13.0; which one is installed, only torch itself says."""
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr("importlib.metadata.version", lambda package: "2.13.0")
    status, found = doctor(capsys, "--device", "cpu", "--dtype", "float32")
    assert (status, found["packages"]["torch"], found["packages"]["numpy"]) == (0, "2.13.0+cu130", "2.13.0")
    assert main(["info"]) == 0
    assert "2.13.0+cu130" in capsys.readouterr().out


PLAIN = Options()


class Wrong(NativeAttention):
    """One key too few in a window, NaN where there is a soft cap, an error with a scale; knows no chunk and no sink."""

    def run(
        self,
        layer: int,
        q: torch.Tensor,
        out: torch.Tensor,
        options: Options = PLAIN,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if options.sm_scale is not None:
            raise RuntimeError("no kernel image is available")
        narrow = options.window_left - (options.window_left > 0)
        super().run(layer, q, out, options._replace(window_left=narrow, attention_chunk=0))
        if options.logits_soft_cap > 0:
            out[-1, 0, 0] = torch.nan


def test_a_wrong_backend_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radixkv.cli.doctor._backend", Wrong)
    status, found = doctor(capsys, "--device", "cpu", "--dtype", "float32")
    assert (status, found["ok"]) == (1, False)
    rows = {c["case"]: c for c in found["cases"]}
    wider_than_all = {"decode, wide window", "mixed, wide window", "extend, wide window"}
    assert {name for name, row in rows.items() if row["ok"]} == named(
        "", "head_dim 128", "8-bit", "8-bit, head_dim 128"
    ) | wider_than_all
    assert rows["decode, window"]["error"] > 1e-3
    assert rows["mixed, soft cap"]["error"] is None
    assert rows["decode, scale"]["problem"] == "RuntimeError: no kernel image is available"
    assert rows["decode, scale"]["batches"] == 0
    assert main(["doctor", "--device", "cpu", "--batches", "1", "--dtype", "float32"]) == 1
    text = capsys.readouterr().out
    assert text.count("FAILED") >= 16


def test_a_cascade_that_is_not_one_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that leaves the cascade out, or takes a wrong page for shared, has the cascade cases against it."""

    class Misreading(NativeAttention):
        def plan(self, table: PageTable) -> None:
            begins, pages = table.kv_indptr[:-1], table.kv_indices.copy()
            users = begins[pages[begins] == pages[begins[0]]]
            if len(users) > 1:
                pages[users] = pages[users + 1]
            super().plan(table._replace(kv_indices=pages))

    def failed(make: Callable[..., NativeAttention]) -> dict[str, str | None]:
        monkeypatch.setattr("radixkv.cli.doctor._backend", make)
        status, found = doctor(capsys, "--device", "cpu", "--dtype", "float32")
        assert status == 1
        return {c["case"]: c["problem"] for c in found["cases"] if not c["ok"]}

    cascades = {name for name in named(*OPTIONS) if name.startswith("cascade")}
    without = failed(lambda layers, dtype, cascade=None: NativeAttention(layers, dtype=dtype, cascade=OFF))
    assert without == dict.fromkeys(cascades, "AssertionError: a cascade was to be tested, but no segment is used")
    narrow = {f"cascade, {o}" for o in OPTIONS if "window" in o and "wide" not in o}  # do not see the first pages
    assert failed(Misreading) == dict.fromkeys(cascades - narrow)


def test_latent_rows_that_are_misread_fail() -> None:
    """A backend that leaves out what is rotated, or takes the wrong part for the value."""

    class Unrotated(NativeAttention):
        def run(self, layer: int, q: torch.Tensor, *rest: Any) -> None:
            super().run(layer, torch.cat([q[..., :512], torch.zeros_like(q[..., 512:])], -1), *rest)

    class Shifted(NativeAttention):
        def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
            k = k.roll(1, -1)
            super().append(layer, k, k[..., :512])

    cases = [case for case in parity.cases([torch.float32]) if case.latent]
    assert {case.name for case in cases} == LATENT
    for case in cases:
        for make, ok in ((NativeAttention, True), (Unrotated, False), (Shifted, False)):
            assert parity.run_case(case, 1, make, torch.device("cpu"), seed=1).ok == ok


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, found = doctor(capsys, "--device", "cuda")
    assert (status, found["ok"], found["cases"]) == (1, False, [])
    assert found["attention"]["backend"] is None
    assert "finds no CUDA device" in found["attention"]["why"]
    assert main(["doctor", "--device", "cuda"]) == 1
    assert "nothing could be tested" in capsys.readouterr().out


def test_kernels_that_cannot_be_compiled_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that can be made but not used: each case says why."""

    class Unusable(NativeAttention):
        def append(self, layer: int, *tensors: torch.Tensor) -> None:
            raise BackendUnavailable("install the CUDA toolkit")

    monkeypatch.setattr("radixkv.cli.doctor._backend", Unusable)
    status, found = doctor(capsys, "--device", "cpu", "--dtype", "float16")
    assert status == 1
    assert {c["problem"] for c in found["cases"]} == {"BackendUnavailable: install the CUDA toolkit"}


def test_without_torch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radixkv.cli.info._version", lambda package: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    status, found = doctor(capsys)
    assert (status, found["cases"]) == (1, [])
    assert "radixkv[engine]" in found["attention"]["why"]


@each_target
def test_flashinfer_is_right(target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if target == "twin":
        monkeypatch.setattr("radixkv.cli.doctor._backend", functools.partial(backend_over, "twin"))
    device = "cpu" if target == "twin" else "cuda"
    status, found = doctor(capsys, "--device", device, "--dtype", "bfloat16", "--dtype", "float16")
    assert status == 0, [c for c in found["cases"] if not c["ok"]]
    assert {c["case"] for c in found["cases"]} == named(*OPTIONS) | LATENT


@each_target
def test_8_bit_cases(target: str) -> None:
    device = torch.device("cpu" if target == "twin" else "cuda")
    for case in (c for c in parity.cases([torch.float16]) if c.fp8):
        result = parity.run_case(case, 5, functools.partial(backend_over, target), device, seed=0)
        assert result.problem is None
        assert result.ok


def test_slow_products_of_16_bits_are_noted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a fault of this package, but what makes a model slow, and there is a remedy."""
    linear = pytest.importorskip("radixkv.hf.linear")
    for slow, notes in (({torch.bfloat16, torch.float16}, "bfloat16 and float16"), ({torch.float16}, "float16")):
        monkeypatch.setattr(linear, "multiplies", lambda dtype, slow=slow: dtype not in slow)
        assert main(["doctor", "--device", "cpu", "--batches", "1", "--dtype", "float32"]) == 0
        found = capsys.readouterr().out
        assert f"note: torch multiplies {notes} on this CPU several times slower than float32: call" in found
    monkeypatch.setattr(linear, "multiplies", lambda dtype: True)
    assert doctor(capsys, "--device", "cpu", "--dtype", "float32")[1]["notes"] == []
