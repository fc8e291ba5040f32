"""topk_svd against planted spectra and LAPACK in float64; summaries against svdvals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdef.errors import NotConverged
from specdef.spectral import dense, topk
from specdef.spectral.summary import (
    condition_number,
    sigma_max,
    spectral_summary,
    stable_rank,
)
from specdef.spectral.topk import TopKSVD, topk_svd, topk_svd_info

# value: |S - exact| / S[0]. basis: |U^T U - I|. measured: a residual recomputed in float64 against the one reported.
TOLERANCE = {
    torch.float32: {"value": 5e-6, "basis": 1e-5, "measured": 3e-6},
    torch.float64: {"value": 5e-6, "basis": 1e-12, "measured": 1e-13},
}


def planted(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    """Float64 matrix with the given singular values and Haar singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    side = len(values)
    left = torch.linalg.qr(torch.randn(m, side, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, side, generator=generator, dtype=torch.float64))[0]
    return (left * values) @ right.T


def spectrum(name: str, r: int) -> Tensor:
    """Adversarial spectra of length r."""
    one = torch.ones(r, dtype=torch.float64)
    index = torch.arange(1, r + 1, dtype=torch.float64)
    ramp = torch.linspace(1, 0, r, dtype=torch.float64)

    def topped(*top: float, rest: Tensor) -> Tensor:
        return torch.cat([torch.tensor(top, dtype=torch.float64), rest[len(top) :]])

    return {
        "flat": one,
        # The residual of a random block is already small here: one value must not hide behind a flat bulk.
        "spike-1.6e-3": topped(1.0016, rest=one),
        "spike-1.6e-4": topped(1.00016, rest=one),
        "spike-2e-5": topped(1.00002, rest=one),
        "repeated-30": topped(*[1.05] * 30, rest=one),
        "projector": (index <= r // 2).double(),
        "graded": 10 ** (-12 * (index - 1) / (r - 1)),
        "rank-5": topped(5, 4, 3, 2, 1, rest=0 * one),
        "clusters": topped(*[1.0, 1 - 1e-7, 1 - 2e-7], *[0.9] * 20, rest=0.5 * ramp),
        "gap-at-20": topped(*[1.0] * 20, rest=0.1 * ramp),
        "uniform": ramp,
        "narrow": 1 - 1e-2 * (1 - ramp),
        "outlier": topped(1e6, rest=ramp),
        "power-0.5": index**-0.5,
        "power-1": index**-1,
        "geometric": 0.8**index,
    }[name]


SPECTRA = [
    *(
        "flat",
        "spike-1.6e-3",
        "spike-1.6e-4",
        "spike-2e-5",
        "repeated-30",
        "projector",
        "graded",
        "rank-5",
    ),
    *("clusters", "gap-at-20", "uniform", "narrow", "outlier", "power-0.5", "power-1", "geometric"),
]


def check(matrix: Tensor, result: TopKSVD, exact: Tensor) -> None:
    """Assert shapes, order, orthonormality, values and that the residual is the true one."""
    U, S, Vh, residual = result
    m, n = matrix.shape
    k = len(exact)
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    tolerance = TOLERANCE[dtype]
    assert (U.shape, S.shape, Vh.shape, residual.shape) == ((m, k), (k,), (k, n), (k,))
    assert {U.dtype, S.dtype, Vh.dtype, residual.dtype} == {dtype}
    assert bool((S.diff() <= 0).all()) and bool((S >= 0).all())
    U, S, V, A = U.double(), S.double(), Vh.double().T, matrix.double()
    eye = torch.eye(k, dtype=torch.float64)
    assert float((U.T @ U - eye).abs().max()) <= tolerance["basis"]
    assert float((V.T @ V - eye).abs().max()) <= tolerance["basis"]
    assert float((S - exact).abs().max()) <= tolerance["value"] * float(exact[0])
    true = torch.maximum((A @ V - U * S).norm(dim=0), (A.T @ U - V * S).norm(dim=0))
    assert float((true / S[0] - residual).abs().max()) <= tolerance["measured"]
    assert float(residual.max()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECTRA)
def test_planted_spectrum(name: str, dtype: torch.dtype) -> None:
    values = spectrum(name, 300)
    matrix = planted(300, 420, values, seed=1).to(dtype)
    for k in (1, 8, 20):
        check(matrix, topk_svd(matrix, k), values[:k])


@pytest.mark.parametrize("name", ["spike-1.6e-4", "power-0.5", "geometric", "outlier", "flat"])
@pytest.mark.parametrize("shape", [(900, 330), (330, 900), (330, 330)])
def test_iteration_is_used_and_right(name: str, shape: tuple[int, int]) -> None:
    values = spectrum(name, 330)
    matrix = planted(*shape, values, seed=2).float()
    info = topk_svd_info(matrix, 4)
    assert info.method == "krylov" and info.converged and info.num_passes <= 20
    check(matrix, info.svd, values[:4])


@pytest.mark.parametrize("seed", range(4))
def test_gaussian_against_lapack(seed: int) -> None:
    matrix = torch.randn(310, 700, generator=torch.Generator().manual_seed(seed))
    exact = torch.linalg.svdvals(matrix.double())
    check(matrix, topk_svd(matrix, 10, seed=seed), exact[:10])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_restart_keeps_the_answer(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "_MAX_BASIS", 128)
    values = spectrum("uniform", 1030)
    # Low rank plus noise: a Haar pair of this size would take longer than the test.
    matrix = planted(1030, 1030, values[:60], seed=3) * 10
    noise = torch.randn(1030, 1030, generator=torch.Generator().manual_seed(0)).double() / 8
    matrix = (matrix + noise).to(dtype)
    info = topk_svd_info(matrix, 20)
    assert info.method == "krylov"
    # Eight steps of width 32 fill 128 columns: more passes than that mean that a restart has happened.
    assert info.num_passes > 12
    check(matrix, info.svd, torch.linalg.svdvals(matrix.double())[:20])


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e-42])
@pytest.mark.parametrize("side", [5, 300])
def test_magnitude(scale: float, side: int) -> None:
    values = 0.7 ** torch.arange(side, dtype=torch.float64)
    matrix = (planted(side, side + 3, values, seed=4) * scale).float()
    U, S, Vh, residual = topk_svd(matrix, 3)
    exact = torch.linalg.svdvals(matrix.double() / scale)[:3]
    # Subnormal values carry few digits: half a unit of 1.4e-45.
    assert torch.allclose(S.double() / scale, exact, rtol=1e-5, atol=1.4e-45 / scale)
    assert float(residual.max()) < 1e-5
    assert torch.allclose(U.T @ U, torch.eye(3), atol=1e-5)
    assert torch.allclose(Vh @ Vh.T, torch.eye(3), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (1, 4000), (3, 2000), (2000, 3), (7, 7)])
def test_small_and_thin(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    k = min(shape)
    check(matrix, topk_svd(matrix, k), torch.linalg.svdvals(matrix.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    matrix = planted(300, 280, spectrum("power-1", 280), seed=6).to(dtype)
    check(matrix, topk_svd(matrix, 5), torch.linalg.svdvals(matrix.double())[:5])


@pytest.mark.parametrize("shape", [(4, 6), (600, 400)])
def test_zero_matrix(shape: tuple[int, int]) -> None:
    info = topk_svd_info(torch.zeros(shape), 3)
    U, S, Vh, residual = info.svd
    assert info.method == "zero" and not S.any() and not residual.any()
    assert torch.equal(U.T @ U, torch.eye(3)) and torch.equal(Vh @ Vh.T, torch.eye(3))


def test_rank_below_k() -> None:
    values = torch.tensor([3.0, 2.0], dtype=torch.float64)
    matrix = planted(320, 310, values, seed=7).float()
    check(matrix, topk_svd(matrix, 6), torch.cat([values, torch.zeros(4, dtype=torch.float64)]))


def test_sparse_structure() -> None:
    matrix = torch.zeros(400, 300)
    matrix[17, 40] = 3.0
    matrix[200, 41] = -2.0
    matrix.diagonal().add_(0.01)
    exact = torch.linalg.svdvals(matrix.double())
    check(matrix, topk_svd(matrix, 4), exact[:4])


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-60, 60),
    data=st.data(),
)
def test_scaling_and_transposition(
    m: int, n: int, seed: int, exponent: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, min(m, n)))
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    one, other = topk_svd(matrix, k), topk_svd(matrix.T, k)
    scaled = topk_svd(matrix * 2.0**exponent, k)
    bound = 1e-5 * float(one.S[0])
    assert float((one.S - other.S).abs().max()) <= bound
    assert float((one.S - scaled.S * 2.0**-exponent).abs().max()) <= bound
    assert float(one.S[0]) <= float(matrix.norm()) * (1 + 1e-5)


@settings(max_examples=12, deadline=None)
@given(k=st.integers(1, 12), seed=st.integers(0, 2**31), decay=st.floats(0.3, 0.97))
def test_krylov_matches_planted_values(k: int, seed: int, decay: float) -> None:
    values = decay ** torch.arange(260, dtype=torch.float64)
    matrix = planted(260, 270, values, seed=seed).float()
    check(matrix, topk_svd(matrix, k, seed=seed % 7), values[:k])


def test_same_seed_same_bits_and_any_seed_same_values() -> None:
    matrix = planted(300, 350, spectrum("power-0.5", 300), seed=8).float()
    one, again, other = (topk_svd(matrix, 5, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.U, other.U)
    assert torch.allclose(one.S, other.S, rtol=1e-5)


def test_global_random_state_and_input_are_untouched() -> None:
    matrix = planted(300, 300, spectrum("power-1", 300), seed=9).float().requires_grad_()
    before, state = matrix.detach().clone(), torch.get_rng_state()
    result = topk_svd(matrix, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(matrix.detach(), before)
    assert not any(part.requires_grad for part in result)


def test_precision_switches_do_not_reach_the_residual() -> None:
    matrix = planted(300, 300, spectrum("power-0.5", 300), seed=10).float()
    exact = spectrum("power-0.5", 300)[:4]
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check(matrix, topk_svd(matrix, 4), exact)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_budget_exhausted_takes_the_dense_route() -> None:
    matrix = torch.randn(300, 300, generator=torch.Generator().manual_seed(11))
    info = topk_svd_info(matrix, 3, max_passes=4)
    assert info.method == "gram" and info.converged
    check(matrix, info.svd, torch.linalg.svdvals(matrix.double())[:3])


def test_failing_solver_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(12))

    def fail(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    info = topk_svd_info(matrix, 2)
    assert info.method == "lapack" and info.converged
    monkeypatch.setattr(dense, "_lapack", fail)
    with pytest.raises(NotConverged):
        topk_svd(matrix, 2)


def test_wrong_dense_answer_is_not_reported_as_right(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(13))
    honest = dense._lapack

    def perturbed(A: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        U, S, V = honest(A, k)
        return U, S * 1.01, V

    monkeypatch.setattr(dense, "_lapack", perturbed)
    monkeypatch.setattr(dense, "_gram", perturbed)
    info = topk_svd_info(matrix, 2)
    assert not info.converged and float(info.svd.residual.max()) > 5e-3
    with pytest.raises(NotConverged) as caught:
        topk_svd(matrix, 2, strict=True)
    assert caught.value.result.svd.S.shape == (2,)


def test_tolerance_below_the_floor() -> None:
    matrix = planted(300, 300, spectrum("power-1", 300), seed=14).float()
    info = topk_svd_info(matrix, 3, tol=1e-9)
    assert not info.converged and float(info.svd.residual.max()) < info.floor
    with pytest.raises(NotConverged, match="residual"):
        topk_svd(matrix, 3, tol=1e-9, strict=True)
    assert topk_svd_info(matrix.double(), 3, tol=1e-12, strict=True).converged


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [3, 300])
def test_not_finite(bad: float, side: int) -> None:
    matrix = torch.ones(side, side)
    matrix[1, 2] = bad
    with pytest.raises(ValueError, match="finite"):
        topk_svd(matrix, 1)
    with pytest.raises(ValueError, match="finite"):
        spectral_summary(matrix)


@pytest.mark.parametrize(
    ("matrix", "k", "options", "message"),
    [
        (torch.ones(3, 4), 0, {}, "k must be in 1..min"),
        (torch.ones(3, 4), 4, {}, "k must be in 1..min"),
        (torch.ones(3), 1, {}, "2-D"),
        (torch.ones(0, 3), 1, {}, "not empty"),
        (torch.ones(3, 3, dtype=torch.int64), 1, {}, "floating point"),
        (torch.ones(3, 3, dtype=torch.complex64), 1, {}, "floating point"),
        (torch.ones(3, 3), 1, {"tol": 0.0}, "tol"),
        (torch.ones(3, 3), 1, {"tol": math.nan}, "tol"),
        (torch.ones(3, 3), 1, {"max_passes": 0}, "max_passes"),
    ],
)
def test_bad_arguments(matrix: Tensor, k: int, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topk_svd(matrix, k, **options)


def test_sigma_max_and_stable_rank() -> None:
    values = spectrum("power-0.5", 300)
    matrix = planted(300, 320, values, seed=15).float()
    value, residual = sigma_max(matrix)
    assert value == pytest.approx(1.0, rel=1e-6) and residual <= 1e-5
    assert stable_rank(matrix) == pytest.approx(float((values**2).sum()), rel=1e-5)


@pytest.mark.parametrize("exact_below", [1024, 10])
@pytest.mark.parametrize("smallest", [1e-1, 1e-6, 1e-10])
@pytest.mark.parametrize("shape", [(270, 290), (290, 270)])
def test_condition_number(exact_below: int, smallest: float, shape: tuple[int, int]) -> None:
    values = torch.logspace(0, math.log10(smallest), 270, dtype=torch.float64)
    matrix = planted(*shape, values, seed=16)
    summary = spectral_summary(matrix, exact_below=exact_below)
    assert summary.method == ("lapack" if exact_below == 1024 else "inverse")
    assert summary.sigma_max == pytest.approx(1.0, rel=1e-6)
    # Rounding of the factorisation: eps * sigma_max / sigma_min.
    assert summary.sigma_min == pytest.approx(smallest, rel=1e-5 + 1e-14 / smallest)
    assert summary.condition == pytest.approx(1 / smallest, rel=1e-5 + 1e-14 / smallest)
    assert summary.residual <= 1e-5


@pytest.mark.parametrize("exact_below", [1024, 10])
def test_condition_of_singular_and_scaled(exact_below: int) -> None:
    matrix = planted(270, 270, spectrum("projector", 270), seed=17)
    singular = spectral_summary(matrix, exact_below=exact_below)
    assert singular.sigma_min == 0.0 and singular.condition == math.inf
    zero = spectral_summary(torch.zeros(4, 5), exact_below=exact_below)
    assert (zero.sigma_max, zero.stable_rank, zero.condition) == (0.0, 0.0, math.inf)
    tiny = spectral_summary(torch.eye(3) * 1e-30)
    assert tiny.sigma_min == pytest.approx(1e-30, rel=1e-6) and condition_number(
        torch.eye(3) * 1e-30
    ) == pytest.approx(1.0)


def test_condition_not_computed_is_none() -> None:
    matrix = planted(270, 270, spectrum("power-1", 270), seed=18)
    summary = spectral_summary(matrix, exact_below=0, condition_below=0)
    assert summary.method == "krylov" and summary.condition is None and summary.sigma_min is None
    assert summary.sigma_max == pytest.approx(1.0, rel=1e-6)
