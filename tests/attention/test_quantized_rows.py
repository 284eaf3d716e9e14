"""What rows of 8 and 4 bits lose, and what is counted of it."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from radixkv.errors import InvalidArgument
from radixkv.formats import FORMATS, LayerFormat, RowFormat
from radixkv.pool import KVPool
from radixkv.shape import LayerShape
from tests.attention import storing
from tests.attention.helpers import ISAS, Heads, Options, Pool, Request, Tokens, error, random_sequence
from tests.attention.helpers import one_torch_thread as one_torch_thread

pytestmark = pytest.mark.usefixtures("one_torch_thread")
ROWS = int(os.environ.get("RADIXKV_ROWS", "20000"))
"""Random rows; of hostile ones a tenth."""
CHUNK = 20_000  # rows at a time
INT8, INT4 = RowFormat("int8"), RowFormat("int4")
each_isa = pytest.mark.parametrize("isa", ISAS)


def relative(rows: torch.Tensor, stored: RowFormat) -> torch.Tensor:
    rows = rows.double()
    return (storing.as_stored(rows.float(), stored) - rows).norm(dim=-1) / rows.norm(dim=-1)


def gaussian_rows(count: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(count, dim, generator=generator)


def hostile_rows(count: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    """Of every size: few large numbers, numbers of two sizes, noise on a constant; before or after the rotation."""

    def rand(width: int = 1) -> torch.Tensor:
        return torch.rand(count, width, generator=generator)

    noise, small = gaussian_rows(count, dim, generator), 10 ** (-4 * rand())
    large = rand(dim) < rand() ** 4
    large[:, 0] = True
    kinds = torch.stack([noise**7, torch.where(large, 1.0, small), noise.sign().where(large, small), 1 + small * noise])
    rows = kinds[torch.randint(len(kinds), (count,), generator=generator), torch.arange(count)]
    rows = rows.where(rand() < 0.5, storing.rotate(rows))
    return rows * 10.0 ** torch.randint(-20, 20, (count, 1), generator=generator)


def losses(
    stored: RowFormat, rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None
) -> tuple[torch.Tensor, float]:
    """||x' - x|| / ||x|| of each row x that is stored so, and how near their elements come to their bounds."""
    exact, off = rows.double(), storing.load(codes, scales, stored) - rows.double()
    errors = off.norm(dim=-1) / exact.norm(dim=-1)
    if stored.rotated:
        root = 1 if stored.has_row_scales else storing.rotation_size(rows.shape[-1]) ** 0.5
        exact, off = storing.rotate(exact) / root, storing.rotate(off) / root
    most = exact.abs().amax(-1, keepdim=True)
    if stored.dtype == "int8":  # half a step, and what rounding the scale up to bf16 adds
        bound = (1.008 / 254 * most).expand_as(exact)
    elif stored.dtype == "int4":  # none but the row's own length
        bound = exact.norm(dim=-1, keepdim=True).expand_as(exact)
    else:  # half a unit of e4m3's last place, what the rotation rounds, and anything where numbers are clamped
        bound = ((exact.abs() / 16).clamp(min=2**-10) + 2**-20 * most).where(exact.abs() <= 448, torch.inf)
    return errors, (off.abs() / bound).max().item()


@pytest.mark.parametrize(("dim", "int8", "int4"), [(64, 0.0059, 0.0936), (128, 0.0065, 0.0953)])
def test_what_append_loses_of_gaussian_and_of_hostile_rows(dim: int, int8: float, int4: float) -> None:
    """For any row, of any shape and size: the reference's bytes, and no element, and no row, beyond its bound."""
    generator = torch.Generator().manual_seed(dim)
    fp8 = LayerFormat(RowFormat("float8_e4m3fn"), RowFormat("float8_e4m3fn", rotated=True))
    pools = [Pool(Heads(1, 1, dim), num_pages=CHUNK // 16 + 1, kv_format=kv_format) for kv_format in ("k8v4", fp8)]
    errors: dict[tuple[str, RowFormat], list[torch.Tensor]] = {}
    shares: dict[tuple[str, RowFormat], float] = {}
    for make, count in ((gaussian_rows, ROWS), (hostile_rows, ROWS // 10)):
        for begin in range(0, count, CHUNK):
            rows = make(min(CHUNK, count - begin), dim, generator)[:, None]
            for stored, codes, scales in (each for pool in pools for each in pool.store(rows)):
                want, want_scales = storing.store(rows, stored)
                assert torch.equal(codes, want.view(torch.uint8))
                assert scales is None or torch.equal(scales, want_scales)
                some, share = losses(stored, rows, want, want_scales)
                errors.setdefault((make.__name__, stored), []).append(some)
                shares[make.__name__, stored] = max(share, shares.get((make.__name__, stored), 0.0))
    of = {kind: torch.cat(parts) for kind, parts in errors.items()}
    for (rows_of, stored), some in of.items():
        figures = f"mean {some.mean():.4f}, worst {some.max():.4f}; nearest to the bound {shares[rows_of, stored]:.4f}"
        print(f"\n{len(some):,} {rows_of} of {dim}, {stored.dtype}{', rotated' * stored.rotated}: {figures}", end="")
    assert max(shares.values()) <= 1
    assert max(some.max().item() for some in of.values()) <= 1 + 1e-12
    assert of["gaussian_rows", INT8].mean() == pytest.approx(int8, abs=0.0003)
    assert of["gaussian_rows", INT4].mean() == pytest.approx(int4, abs=0.003)
    assert of["gaussian_rows", INT4].max() < 0.40


@pytest.mark.parametrize(("dim", "error"), [(64, 0.351), (128, 0.470)])
def test_a_row_of_4_bits_whose_rotation_is_one_spike(dim: int, error: float) -> None:
    """All other elements, of nothing, become the smallest level."""
    spike = torch.zeros(1, dim)
    spike[0, 5] = 1.0
    assert relative(storing.rotate(spike), INT4).item() == pytest.approx(error, abs=0.003)


@each_isa
@pytest.mark.parametrize(("times", "plain", "centred"), [(10, 0.09, 0.02), (40, 0.3, 0.02)])
def test_a_large_constant_in_the_keys(isa: str, times: float, plain: float, centred: float) -> None:
    """What biases of K do to Qwen2.5: rotation keeps 8 bits usable, and a static centre takes the constant away."""
    generator = torch.Generator().manual_seed(2)
    sequence = random_sequence(generator, 300, Heads(2, 1, 64), torch.float32)
    constant = torch.zeros(64)
    constant[[23, 55]] = times * sequence.k.norm(dim=-1).mean() / 2**0.5
    sequence = sequence._replace(k=sequence.k + constant)
    sequence.q[..., [23, 55]] = 0.0  # so that the answers are those without the constant
    request = Request(sequence, 300, 100)
    for stored, most in (
        (FORMATS["int8"], plain),
        (LayerFormat(INT8, INT8, tuple((sequence.k[:150].mean((0, 1))).tolist())), centred),
    ):
        pool = Pool(Heads(2, 1, 64), num_pages=20, isa=isa, kv_format=stored)
        got = run(pool, sequence, request)
        exact = Pool(Heads(2, 1, 64), num_pages=20, isa=isa)
        want = run(exact, sequence, request)
        assert (got - want).norm() <= most * want.norm(), stored


def run(pool: Pool, sequence: Tokens, request: Request) -> torch.Tensor:
    """All rows appended by the pool itself, which knows centres; the request's last rows."""
    whole = request._replace(rows=request.length)
    return pool.attend([whole], np.random.default_rng(0))[0][-request.rows :]


@each_isa
@pytest.mark.parametrize("k", [INT8, INT4, RowFormat("float8_e4m3fn")], ids=lambda k: k.dtype)
@pytest.mark.parametrize("options", [Options(), Options(logits_soft_cap=2.0)], ids=["plain", "cap"])
def test_a_centre_changes_no_answer_but_by_rounding(isa: str, k: RowFormat, options: Options) -> None:
    """Capped logits see it: what it adds to all scores of a query is added back."""
    sequence = random_sequence(torch.Generator().manual_seed(3), 200, Heads(4, 2, 64), torch.float32)
    centre = torch.randn(2, 64, generator=torch.Generator().manual_seed(4))
    stored = LayerFormat(k, INT8, tuple(centre.flatten().tolist()))
    pool = Pool(Heads(4, 2, 64), num_pages=20, isa=isa, kv_format=stored)
    got = pool.attend([Request(sequence, 200, 200)], np.random.default_rng(0), options)
    kept = storing.as_stored(sequence.k - centre, k) + centre.double()
    seen = Tokens(sequence.q, kept, storing.as_stored(sequence.v, INT8))
    assert error(got, [Request(seen, 200, 200)], options) <= 2e-4


def test_centres_that_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="a centre of keys stored as bfloat16: only those of 8 and 4 bits"):
        LayerFormat(RowFormat("bfloat16"), INT8, (1.0,))
    with pytest.raises(InvalidArgument, match="not finite"):
        LayerFormat(INT8, INT8, (float("nan"),))
    with pytest.raises(InvalidArgument, match="k_centre has 3 numbers: this layer's keys have 128 of all heads"):
        KVPool([LayerShape(4, 2, 64)], [LayerFormat(INT8, INT8, (1.0,) * 3)], 1, 1, torch.device("cpu"))


@each_isa
def test_a_row_that_is_not_finite_poisons_who_sees_it_and_no_one_else(isa: str) -> None:
    for name in ("int8", "k8v4", "int4"):
        for what in ("k", "v"):
            sequence = random_sequence(torch.Generator().manual_seed(5), 200, Heads(), torch.float32)
            pool = Pool(num_pages=20, isa=isa, kv_format=name)
            (clean,) = pool.attend([Request(sequence, 200, 200)], np.random.default_rng(0))
            getattr(sequence, what)[100, 1, 7] = torch.inf
            (got,) = pool.attend([Request(sequence, 200, 200)], np.random.default_rng(0))
            assert torch.equal(got[:100], clean[:100])
            assert torch.equal(got[100:, :3], clean[100:, :3]), "the other kv head"
            assert bool(got[100:, 3:].isnan().all())
            (windowed,) = pool.attend([Request(sequence, 200, 200)], np.random.default_rng(0), Options(window_left=9))
            assert windowed.isnan().any(-1).any(-1).nonzero().flatten().tolist() == list(range(100, 110))


@each_isa
def test_what_was_stored_is_counted(isa: str) -> None:
    """Rows of one head; of 1 in 1,024 the exact error."""
    usual = LayerFormat(INT8, INT4, usual_scales=(1e-30, float("inf")))
    pool = Pool(Heads(2, 2, 64), num_pages=200, isa=isa, kv_format=usual, num_threads=2)
    sequence = random_sequence(torch.Generator().manual_seed(6), 2000, Heads(2, 2, 64), torch.float32)
    sequence.v[7, 1, 3] = torch.nan
    pool.attend([Request(sequence, 2000, 2000)], np.random.default_rng(0))
    k, v = pool.backend.stored(0)
    assert (k.rows, k.not_finite, k.unusual) == (4000, 0, 4000)
    assert (v.rows, v.not_finite, v.unusual) == (4000, 1, 0)
    assert k.sampled == v.sampled == 4
    for counts, stored, rows in ((k, INT8, sequence.k), (v, INT4, sequence.v)):
        exact = relative(rows.flatten(0, 1)[::1024], stored)
        assert counts.mean_error == pytest.approx(exact.mean().item(), rel=1e-5)
        assert counts.largest_error == pytest.approx(exact.max().item(), rel=1e-5)
    fp8 = Pool(Heads(1, 1, 64), num_pages=2, isa=isa, kv_format="fp8")
    large = random_sequence(torch.Generator().manual_seed(7), 4, Heads(1, 1, 64), torch.float32)
    large.k[2, 0, 0] = 449.0
    fp8.attend([Request(large, 4, 4)], np.random.default_rng(0))
    assert fp8.backend.stored(0)[0].unusual == 1


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_a_pool_takes_the_bytes_that_the_formula_says(name: str, page_size: int) -> None:
    """codes and scales, each up to 16 bytes: of a token and kv head as docs/formats.md has it."""
    sizes = {"int8": (1, 2), "k8v4": (0.75, 2), "int4": (0.5, 2), "fp8": (1, 0), "fp8_rotated": (1, 0), "fp32": (4, 0)}
    code, scale = sizes.get(name, (2, 0))
    for dim in (64, 80, 96, 128, 256):
        shape = LayerShape(6, 3, dim)
        pool = KVPool([shape] * 3, [FORMATS[name]] * 3, 5, page_size, torch.device("cpu"))
        rows = page_size * 3
        bytes_of = [dim * (1 if name == "k8v4" else code), dim * (0.5 if name == "k8v4" else code)]
        want = sum(-(-int(rows * b) // 16) * 16 + -(-rows * scale // 16) * 16 for b in bytes_of)
        assert pool.nbytes == 3 * 5 * want
        assert FORMATS[name].token_bytes(shape) == 3 * (sum(bytes_of) + 2 * scale)
