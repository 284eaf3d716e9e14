"""radixkv doctor: what it says about right backends, wrong backends and missing ones."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from radixkv.attention import parity
from radixkv.attention.native import NativeAttention
from radixkv.cli import main
from radixkv.errors import BackendUnavailable
from tests.attention_helpers import one_torch_thread as one_torch_thread
from tests.flashinfer_helpers import backend, each_target

pytestmark = pytest.mark.usefixtures("one_torch_thread")
CASES = {
    f"{kind}{option}" for kind in ("decode", "mixed") for option in ("", ", scale", ", window", ", soft cap", ", 8-bit")
}


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main(["doctor", "--batches", "3", "--json", *arguments])
    return status, json.loads(capsys.readouterr().out)


def test_the_native_backend_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = doctor(capsys, "--device", "cpu")
    assert (status, found["ok"]) == (0, True)
    assert found["attention"] == {"backend": "native", "why": "asked for, so the C++ kernels of this package run"}
    assert {(c["case"], c["dtype"]) for c in found["cases"]} == {
        (case, dtype) for case in CASES for dtype in ("float32", "bfloat16", "float16")
    }
    assert all(c["batches"] == 3 and 0 < c["error"] <= c["allowed"] and c["problem"] is None for c in found["cases"])
    assert main(["doctor", "--device", "cpu", "--batches", "1", "--dtype", "float16"]) == 0
    text = capsys.readouterr().out
    assert "10 of 10 cases are right" in text
    assert f"torch {torch.__version__}" in text


class Wrong(NativeAttention):
    """Sees one key too few where there is a window, writes NaN where there is a soft cap, fails with a scale."""

    def run(self, *tensors: torch.Tensor, **options: Any) -> None:
        if options["sm_scale"] is not None:
            raise RuntimeError("no kernel image is available")
        if options["window_left"] > 0:
            options["window_left"] -= 1
        super().run(*tensors, **options)
        if options["logits_soft_cap"] > 0:
            tensors[3][-1, 0, 0] = torch.nan


def test_a_wrong_backend_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def make(device: torch.device, sizes: dict[str, Any]) -> Wrong:
        return Wrong(**sizes)

    monkeypatch.setattr("radixkv.cli.doctor._backend", make)
    status, found = doctor(capsys, "--device", "cpu", "--dtype", "float32")
    assert (status, found["ok"]) == (1, False)
    rows = {c["case"]: c for c in found["cases"]}
    assert {name for name, row in rows.items() if row["ok"]} == {"decode", "mixed", "decode, 8-bit", "mixed, 8-bit"}
    assert rows["decode, window"]["error"] > 1e-3
    assert rows["mixed, soft cap"]["error"] is None
    assert rows["decode, scale"]["problem"] == "RuntimeError: no kernel image is available"
    assert rows["decode, scale"]["batches"] == 0
    assert main(["doctor", "--device", "cpu", "--batches", "1", "--dtype", "float32"]) == 1
    text = capsys.readouterr().out
    assert text.count("FAILED") == 6
    assert "4 of 10 cases are right" in text


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
        def append(self, *tensors: torch.Tensor) -> None:
            raise BackendUnavailable("install the CUDA toolkit")

    monkeypatch.setattr("radixkv.cli.doctor._backend", lambda device, sizes: Unusable(**sizes))
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
        monkeypatch.setattr("radixkv.cli.doctor._backend", lambda device, sizes: backend("twin", **sizes))
    device = "cpu" if target == "twin" else "cuda"
    status, found = doctor(capsys, "--device", device, "--dtype", "bfloat16", "--dtype", "float16")
    assert status == 0, [c for c in found["cases"] if not c["ok"]]
    assert {c["case"] for c in found["cases"]} == CASES


@each_target
def test_8_bit_cases(target: str) -> None:
    device = torch.device("cpu" if target == "twin" else "cuda")
    for case in (c for c in parity.cases([torch.float16], fp8=True) if c.fp8):
        result = parity.run_case(case, 5, lambda sizes: backend(target, **sizes), device, seed=0)
        assert result.problem is None
        assert result.ok
