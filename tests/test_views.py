"""as_matrix and from_matrix: shapes, shared memory, the 1 x 1 convolution identity, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specdef.spectral.views import as_matrix, diagonal_sigma_max, from_matrix


@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
        st.tuples(*[st.integers(1, 4)] * 4),
        st.tuples(*[st.integers(1, 3)] * 5),
    ),
    transposed=st.booleans(),
)
def test_round_trip_shares_memory(shape: tuple[int, ...], transposed: bool) -> None:
    transposed = transposed and len(shape) == 2
    weight = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    matrix = as_matrix(weight, transposed=transposed)
    assert matrix.data_ptr() == weight.data_ptr() and matrix.ndim == 2
    assert matrix.shape[0] == (shape[1] if transposed else shape[0])
    assert torch.equal(from_matrix(matrix, weight, transposed=transposed), weight)
    matrix[0, 0] = -1.0
    assert float(weight.flatten()[0]) == -1.0


def test_transposed_is_the_linear_map() -> None:
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        x @ weight, torch.nn.functional.linear(x, as_matrix(weight, transposed=True))
    )


def test_compensation_of_a_convolution_is_a_one_by_one_convolution() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 3, 3, 5, generator=generator, dtype=torch.float64)
    C = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    image = torch.randn(1, 3, 8, 9, generator=generator, dtype=torch.float64)
    merged = from_matrix(C @ as_matrix(weight), weight)
    behind = torch.nn.functional.conv2d(
        torch.nn.functional.conv2d(image, weight, stride=2, padding=1), C[:, :, None, None]
    )
    torch.testing.assert_close(
        torch.nn.functional.conv2d(image, merged, stride=2, padding=1), behind
    )


@pytest.mark.parametrize(
    ("weight", "transposed", "message"),
    [
        (torch.zeros(3), False, "diagonal_sigma_max"),
        (torch.zeros(()), False, "axes"),
        (torch.zeros(8, 4, 4), False, "take one expert"),
        (torch.zeros(2, 3, 1, 1), True, "transposed"),
        (torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), False, "contiguous"),
    ],
)
def test_refused_weights(weight: Tensor, transposed: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_matrix(weight, transposed=transposed)


@pytest.mark.parametrize(
    ("matrix", "like", "transposed"),
    [
        (torch.zeros(3, 4), torch.zeros(4, 3), False),
        (torch.zeros(3, 4), torch.zeros(3, 4), True),
        (torch.zeros(3, 8), torch.zeros(3, 2, 2, 3), False),
        (torch.zeros(3, 4), torch.zeros(3, 2, 2, 1), True),
        (torch.zeros(3, 4), torch.zeros(12), False),
        (torch.zeros(12), torch.zeros(3, 4), False),
    ],
)
def test_from_matrix_refuses_other_shapes(matrix: Tensor, like: Tensor, transposed: bool) -> None:
    with pytest.raises(ValueError, match="must have"):
        from_matrix(matrix, like, transposed=transposed)


def test_gain_equals_its_diagonal_matrix() -> None:
    gain = torch.randn(17, generator=torch.Generator().manual_seed(3))
    exact = torch.linalg.svdvals(torch.diag(gain.double()))[0]
    assert diagonal_sigma_max(gain) == pytest.approx(float(exact))


@pytest.mark.parametrize(
    "gain",
    [torch.zeros(0), torch.zeros(2, 2), torch.tensor([1.0, torch.nan]), torch.tensor([torch.inf])],
)
def test_bad_gain(gain: Tensor) -> None:
    with pytest.raises(ValueError, match="gain must be"):
        diagonal_sigma_max(gain)
