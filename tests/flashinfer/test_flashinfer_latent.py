"""Latent layers by FlashInfer's kernels for MLA: against the oracle, in an engine beside others, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import radixkv
from radixkv.attention import Options
from radixkv.attention.flashinfer import FlashInferAttention
from radixkv.errors import BackendUnavailable, InvalidArgument
from radixkv.formats import FORMATS, LayerFormat, fp8
from radixkv.pool import KVPool
from radixkv.shape import LayerShape
from tests.attention.helpers import Heads, Request, error, random_sequence
from tests.attention.helpers import one_torch_thread as one_torch_thread
from tests.flashinfer.helpers import TOLERANCE, FlashInferPool, each_dtype, each_target, use_target
from tests.flashinfer.recorder import Recorder

pytestmark = pytest.mark.usefixtures("one_torch_thread")
PLAIN = Options(192**-0.5)
LATENT = LayerShape(16, 1, 576, 512, latent=True)


def latent_heads(count: int) -> Heads:
    return Heads(count, 1, 576, latent=512)


@each_target
@each_dtype
@pytest.mark.parametrize("count", [1, 16, 128])
@pytest.mark.parametrize("page_size", [1, 16])
def test_against_the_oracle(target: str, dtype: torch.dtype, count: int, page_size: int) -> None:
    """Decode steps, and prefill, extend and decode together."""
    pool = FlashInferPool(latent_heads(count), dtype, 200 if page_size == 1 else 20, page_size, target=target)
    generator = torch.Generator().manual_seed(count)
    for lengths in ([(40, 1), (17, 1), (1, 1)], [(40, 40), (66, 7), (33, 1)]):
        requests = [Request(random_sequence(generator, n, pool.heads, dtype), n, rows) for n, rows in lengths]
        got = pool.attend(requests, np.random.default_rng(0), PLAIN)
        assert error(got, requests, PLAIN) <= 2 * TOLERANCE[dtype]  # rows of few keys are as large as values, up to 5


@each_target
def test_an_engine_with_latent_layers_and_others(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cold, on a hit inside a page, forked and decoding: as on the CPU."""
    shapes = [LATENT, LayerShape(4, 2, 64), LATENT]

    def run(engine: radixkv.Engine) -> list[torch.Tensor]:
        table = torch.randn(50, 16, 576, generator=torch.Generator().manual_seed(0))
        outs: list[torch.Tensor] = []

        def forward(leases: list[radixkv.Lease]) -> None:
            with engine.step(leases) as step:
                x = (table[step.input_ids.cpu()] / (1 + step.positions.cpu()[:, None, None] / 99)).half()
                parts = x, x[:, :1], x[:, :4, :64], x[:, :2, :64]
                x, rows, q, kv = (part.contiguous().to(engine.device) for part in parts)
                for layer in (0, 2):
                    outs.append(step.attend(layer, x, rows, rows[..., :512], sm_scale=0.07).cpu())
                outs.append(step.attend(1, q, kv, kv).cpu())

        prompt = list(range(45))
        first = engine.acquire(prompt[:38])
        forward([first])
        first.release()
        lease = engine.acquire(prompt)
        assert lease.num_cached == 37 + 1
        forward([lease])
        child = lease.fork()
        for each, token in ((lease, 1), (child, 2)):
            each.extend([token])
        forward([lease, child])
        lease.release(), child.release()
        return outs

    want = run(radixkv.Engine(layers=shapes, num_pages=20, page_size=16, dtype=torch.float16))
    with monkeypatch.context() as patch:
        if target == "twin":
            use_target(patch, target)
        device = "cpu" if target == "twin" else "cuda"
        engine = radixkv.Engine(layers=shapes, num_pages=20, page_size=16, dtype=torch.float16, device=device)
    assert isinstance(engine.attention, FlashInferAttention)
    for got, expected in zip(run(engine), want, strict=True):
        assert (got.float() - expected.float()).abs().max() <= 4e-3


def attention(shape: LayerShape, stored: LayerFormat = FORMATS["fp16"], **options: object) -> FlashInferAttention:
    layers = KVPool([LayerShape(6, 2, 64), shape], [FORMATS["fp16"], stored], 8, 4, torch.device("cpu")).layers
    return FlashInferAttention(layers, dtype=torch.float16, api=Recorder(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (LayerShape(16, 1, 320, 256, latent=True), "layer 1 is latent, 16 heads over rows of 256 . 64: "),
        (LayerShape(16, 1, 576, 448, latent=True), "16 heads over rows of 448 . 128: "),
        (
            LayerShape(20, 1, 576, 512, latent=True),
            "20 heads over rows of 512 . 64: .* and 1, 2, .* 128 heads",
        ),
    ],
)
def test_rows_and_heads_without_kernels(shape: LayerShape, message: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"{message}.*leave radixkv.hf.latent.* use device='cpu'"):
        attention(shape)


def test_formats_and_graphs_without_kernels() -> None:
    with pytest.raises(BackendUnavailable, match="layer 1 is latent and stores fp8: .* leave kv_format out"):
        attention(LATENT, fp8())
    with pytest.raises(BackendUnavailable, match="layer 1 is latent: .* leave cuda_graphs out"):
        attention(LATENT, cuda_graphs=True)


@each_target
def test_calls_without_kernels(target: str) -> None:
    pool = FlashInferPool(latent_heads(16), torch.float16, 8, 4, target=target)
    device = pool.flashinfer.device
    request = Request(random_sequence(torch.Generator().manual_seed(0), 6, pool.heads, torch.float16), 6, 2)
    pool.flashinfer.plan(pool.load([request], np.random.default_rng(0)))
    q, out = (torch.zeros(2, 16, width, dtype=torch.float16, device=device) for width in (576, 512))
    for options in (Options(0.1, 5), Options(0.1, -1, 2.0), Options(0.1, attention_chunk=8)):
        with pytest.raises(BackendUnavailable, match="has a window, a soft cap, chunks or sinks .* use device='cpu'"):
            pool.flashinfer.run(0, q, out, options)
    with pytest.raises(BackendUnavailable, match="has a window, a soft cap, chunks or sinks"):
        pool.flashinfer.run(0, q, out, PLAIN, torch.zeros(16, device=device))
    with pytest.raises(BackendUnavailable, match="sm_scale is -1.0: .* positive factor"):
        pool.flashinfer.run(0, q, out, Options(-1.0))
    with pytest.raises(InvalidArgument, match="sm_scale is None in a latent layer"):
        pool.flashinfer.run(0, q, out)
    k = torch.zeros(2, 1, 576, dtype=torch.float16, device=device)
    with pytest.raises(InvalidArgument, match="v of a latent layer has memory of its own"):
        pool.flashinfer.append(0, k, torch.zeros(2, 1, 512, dtype=torch.float16, device=device))
