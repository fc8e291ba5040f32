"""TopKTracker against LAPACK while matrices drift, jump and train; stacks, views, state, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from specdef.spectral import tracking
from specdef.spectral.tracking import TopKTracker

# The promise: every value within this of the exact one, after every update.
RELATIVE = 1e-3


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights at random initialisation: the top singular values are the edge of a dense bulk."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype) / shape[-1] ** 0.5


def error(tracker: TopKTracker, name: str, matrix: Tensor) -> float:
    """Largest relative error of the values of one name."""
    exact = torch.linalg.svdvals(matrix.detach().double())[..., : tracker.k]
    return float(((tracker.values[name].double() - exact).abs() / exact).max())


def gradient_by_autograd(matrix: Tensor, k: int) -> Tensor:
    leaf = matrix.detach().clone().requires_grad_()
    torch.linalg.svdvals(leaf)[..., :k].sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.001, 0.02], ids=["slow", "fast"])
def test_values_follow_a_flat_spectrum(dtype: torch.dtype, noise: float) -> None:
    wide, tall = gaussian(64, 96, dtype=dtype), gaussian(80, 40, seed=1, dtype=dtype)
    tracker = TopKTracker({"wide": wide, "tall": tall}, 2)
    for step in range(200):
        wide += noise * gaussian(64, 96, seed=2 * step + 2, dtype=dtype)
        tall += noise * gaussian(80, 40, seed=2 * step + 3, dtype=dtype)
        tracker.update()
        assert max(error(tracker, "wide", wide), error(tracker, "tall", tall)) < RELATIVE, step
    assert tracker.count == 4
    # One product for each matrix and update is the least.
    assert noise > 0.01 or tracker.products < 1.5 * 400


@pytest.mark.parametrize("growth", [0.003, 0.03, 0.3])
@pytest.mark.parametrize("k", [1, 2])
def test_a_direction_that_grows_from_nothing_is_found(growth: float, k: int) -> None:
    matrix = gaussian(96, 160)
    edge = float(torch.linalg.matrix_norm(matrix, 2))
    u, v = (nn.functional.normalize(gaussian(size, seed=3 + size), dim=0) for size in matrix.shape)
    tracker = TopKTracker({"w": matrix}, k)
    for step in range(200):
        matrix += growth * edge * torch.outer(u, v)
        matrix += 0.003 * gaussian(96, 160, seed=10 + step)
        tracker.update()
        assert error(tracker, "w", matrix) < RELATIVE, step


@pytest.mark.parametrize("weight", [0.0, -0.02], ids=["plain", "raised"])
def test_training_with_the_spectral_term(weight: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 5))
    )
    parameters = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    tracker = TopKTracker({name: p.data for name, p in parameters.items()}, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, targets = torch.randn(64, 24), torch.randint(0, 5, (64,))
    tracker.update()
    before = {name: float(values[0]) for name, values in tracker.values.items()}
    for step in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        tracker.add_gradient(gradients, weight)
        optimizer.step()
        tracker.update()
        for name, parameter in parameters.items():
            assert error(tracker, name, parameter) < RELATIVE, (step, name)
    if weight:
        # A step of plain ascent adds -lr * weight to each value; the task adds what it will.
        assert all(
            float(tracker.values[name][0]) > value + 0.5 * 200 * 0.1 * 0.02
            for name, value in before.items()
        )


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (3, 12, 20), (16, 16)])
def test_a_small_side_is_exact_after_any_change(shape: tuple[int, ...]) -> None:
    matrix = gaussian(*shape, dtype=torch.float64)
    tracker = TopKTracker({"w": matrix}, 3)
    for seed in range(3):
        matrix.copy_(gaussian(*shape, seed=seed, dtype=torch.float64))
        tracker.update()
        assert error(tracker, "w", matrix) < 1e-12
    gradient = torch.zeros_like(matrix)
    tracker.add_gradient({"w": gradient}, 1.0)
    assert torch.allclose(gradient, gradient_by_autograd(matrix, 3), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(48, 70), (70, 48), (2, 40, 30)])
@pytest.mark.parametrize("k", [1, 2, 6])
def test_float64_to_rounding(shape: tuple[int, ...], k: int) -> None:
    values = 0.5 ** torch.arange(min(shape[-2:]), dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(gaussian(*shape, dtype=torch.float64), full_matrices=False)
    matrix = (U * values) @ Vh
    tracker = TopKTracker({"w": matrix}, k, tol=1e-12)
    for seed in range(4):
        matrix += 1e-3 * gaussian(*shape, seed=seed, dtype=torch.float64)
        tracker.update()
        assert error(tracker, "w", matrix) < 1e-10
    gradient = gaussian(*shape, seed=9, dtype=torch.float64)
    expected = gradient - 0.5 * gradient_by_autograd(matrix, k)
    tracker.add_gradient({"w": gradient}, -0.5)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-10)
    # The iteration got there, not the computation from scratch that starts it.
    assert tracker.products > 0 and tracker.refreshes == (2 if len(shape) == 3 else 1)
    assert tracker.residuals["w"] <= 1e-12


def test_stacks_are_their_matrices() -> None:
    stack = gaussian(3, 40, 56)
    tracker = TopKTracker({"stack": stack}, 2)
    for step in range(30):
        stack += 0.01 * gaussian(3, 40, 56, seed=step)
        tracker.update()
        assert tracker.values["stack"].shape == (3, 2)
        assert error(tracker, "stack", stack) < RELATIVE
    assert tracker.count == 6 and list(tracker.residuals) == ["stack"]


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_views_are_read_and_written_in_place(k: int, dtype: torch.dtype) -> None:
    stored = gaussian(70, 50).to(dtype)
    stack = gaussian(50, 2, 40).to(dtype)
    views = {"conv1d": stored.T, "part": stored[10:50:2, 5:].T, "stack": stack.movedim(1, 0)}
    tracker = TopKTracker(views, k)
    for seed in range(3):
        stored += 0.05 * gaussian(70, 50, seed=seed).to(dtype)
        tracker.update()
    assert max(error(tracker, name, view) for name, view in views.items()) < RELATIVE
    gradients = {
        "conv1d": torch.zeros(70, 50, dtype=dtype).T,
        "part": torch.zeros(70, 50, dtype=dtype)[10:50:2, 5:].T,
        "stack": torch.zeros(50, 2, 40, dtype=dtype).movedim(1, 0),
    }
    tracker.add_gradient(gradients, 2.0)
    for name, view in views.items():
        # The vectors beside a small gap may turn by the residual; the slope along the matrix may not.
        slope = (view.float() * gradients[name].float()).sum(dim=(-2, -1))
        assert torch.allclose(slope, 2 * tracker.values[name].sum(-1), rtol=5e-3), name


def test_one_precision_and_no_graph() -> None:
    parameter = nn.Parameter(gaussian(40, 60))
    tracker = TopKTracker({"w": parameter}, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tracker.update()
        tracker.update()
    assert error(tracker, "w", parameter) < 1e-5
    assert not tracker.values["w"].requires_grad and parameter.grad is None


def test_resumed_it_goes_on_bit_for_bit() -> None:
    def drift(matrices: dict[str, Tensor], steps: range) -> None:
        for step in steps:
            for matrix in matrices.values():
                matrix += 0.01 * gaussian(*matrix.shape, seed=step)
            tracker.update()

    first = {"a": gaussian(64, 80), "b.c": gaussian(2, 30, 64), "small": gaussian(8, 9)}
    tracker = straight = TopKTracker(first, 2, seed=5)
    drift(first, range(37))
    saved = save(straight.state_dict())
    second = {name: matrix.clone() for name, matrix in first.items()}
    tracker = resumed = TopKTracker(second, 2, seed=5)
    resumed.load_state_dict(load(saved))
    assert torch.equal(resumed.values["a"], straight.values["a"])
    drift(second, range(37, 80))
    tracker = straight
    drift(first, range(37, 80))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert resumed.residuals == straight.residuals


def test_the_state_of_another_tracker_is_refused() -> None:
    state = TopKTracker({"a": gaussian(64, 80)}, 2).state_dict()
    with pytest.raises(ValueError, match=r"b\.side .* found nothing"):
        TopKTracker({"b": gaussian(64, 80)}, 2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"a\.left should have shape \(4, 64\), found \(5, 64\)"):
        TopKTracker({"a": gaussian(64, 80)}, 1).load_state_dict(state)


def test_a_replaced_matrix_is_computed_afresh() -> None:
    kept, replaced = gaussian(96, 128), gaussian(96, 128, seed=1)
    tracker = TopKTracker({"kept": kept, "replaced": replaced}, 1)
    for _ in range(10):
        tracker.update()
    assert tracker.refreshes == 2
    replaced.copy_(gaussian(96, 128, seed=2))
    tracker.update()
    assert tracker.refreshes == 3
    assert error(tracker, "replaced", replaced) < 1e-5


def test_every_matrix_is_computed_afresh_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_ROTATION", 6)
    tracker = TopKTracker({name: gaussian(40, 50, seed=ord(name)) for name in "abc"}, 1)
    counts = []
    for _ in range(13):
        tracker.update()
        counts.append(tracker.refreshes)
    assert counts == [3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9]


def test_what_cannot_be_tracked_is_named() -> None:
    with pytest.raises(ValueError, match=r"head \(3, 8\): k = 4 exceeds"):
        TopKTracker({"head": torch.zeros(3, 8)}, 4)
    with pytest.raises(ValueError, match=r"head: expected .* torch\.int64 of shape \(3, 8\)"):
        TopKTracker({"head": torch.zeros(3, 8, dtype=torch.int64)}, 1)
    with pytest.raises(ValueError, match=r"bias: expected .* shape \(3,\)"):
        TopKTracker({"bias": torch.zeros(3)}, 1)
    with pytest.raises(ValueError, match="k must be at least 1"):
        TopKTracker({}, 0)
    with pytest.raises(ValueError, match="tol must be positive"):
        TopKTracker({}, 1, tol=0.0)


@pytest.mark.parametrize("shape", [(8, 12), (40, 60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_too_low_a_rank_is_named(shape: tuple[int, int], dtype: torch.dtype) -> None:
    outer = torch.outer(gaussian(shape[0], dtype=dtype), gaussian(shape[1], seed=1, dtype=dtype))
    TopKTracker({"w": outer}, 1).update()
    with pytest.raises(ValueError, match="w has rank 1"):
        TopKTracker({"w": outer}, 2).update()
    with pytest.raises(ValueError, match=r"w\[1\] has rank 0"):
        TopKTracker({"w": torch.stack([outer, 0 * outer])}, 1).update()


@pytest.mark.parametrize("shape", [(8, 12), (40, 60)])
def test_an_entry_that_is_not_finite_is_named(shape: tuple[int, int]) -> None:
    matrices = {name: gaussian(*shape) for name in ("good", "bad")}
    matrices["bad"][1, 2] = float("nan")
    with pytest.raises(ValueError, match="bad is not finite"):
        TopKTracker(matrices, 1).update()
    matrices["bad"][1, 2] = 0.0
    tracker = TopKTracker(matrices, 1)
    tracker.update()
    matrices["bad"][1, 2] = float("inf")
    with pytest.raises(ValueError, match="bad is not finite"):
        tracker.update()


def test_nothing_to_track() -> None:
    tracker = TopKTracker({}, 1)
    tracker.update()
    assert tracker.values == {} and tracker.count == 0


def test_a_rank_lost_on_the_way_is_named() -> None:
    matrix = gaussian(40, 60)
    tracker = TopKTracker({"w": matrix}, 2)
    tracker.update()
    matrix.copy_(torch.outer(gaussian(40), gaussian(60)))
    with pytest.raises(ValueError, match="w has rank 1"):
        tracker.update()
