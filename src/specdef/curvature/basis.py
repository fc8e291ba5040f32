"""What Krylov methods share: vectors as rows of chunks, checked products, safe norms, random starts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from specdef.curvature.linear import SymmetricOperator
from specdef.errors import SpecDefError

# A float32 norm outside this range is taken again in float64, as its squares may over- or underflow.
_SAFE_NORM = (2.0**-40, 2.0**60)


class Rows:
    """Vectors as rows, in chunks, so that a growing basis is never copied.

    Args:
        n: Length of a vector.
        chunk: Rows allocated at a time.
        dtype: Floating type.
        device: Where they live.
    """

    def __init__(self, n: int, chunk: int, dtype: torch.dtype, device: torch.device) -> None:
        self.n, self.chunk, self.dtype, self.device = n, chunk, dtype, device
        self.chunks: list[Tensor] = []
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        index %= self.count
        return self.chunks[index // self.chunk][index % self.chunk]

    def append(self, *rows: Tensor) -> None:
        """Copy rows in at the end."""
        for row in rows:
            if self.count == len(self.chunks) * self.chunk:
                self.chunks.append(
                    torch.empty(self.chunk, self.n, dtype=self.dtype, device=self.device)
                )
            self.count += 1
            self[-1].copy_(row)

    def drop_first(self) -> None:
        """Move the second of two rows to the first place."""
        self[0].copy_(self[1])
        self.count = 1

    def block(self, begin: int, end: int, *, copy: bool = False) -> Tensor:
        """Return rows begin..end: a view where they lie in one chunk, unless `copy`."""
        parts = [part[max(0, begin - at) : end - at] for at, part in self._parts(end)]
        parts = [part for part in parts if len(part)]
        return parts[0] if len(parts) == 1 and not copy else torch.cat(parts)

    def dot(self, vector: Tensor, window: int | None) -> Tensor:
        """Return Q^T v, or its last entries."""
        parts = [part @ vector for part in self._window(window)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def minus(self, vector: Tensor, coefficients: Tensor, window: int | None) -> Tensor:
        """Return v - Q c."""
        at = 0
        for part in self._window(window):
            c = coefficients[at : at + len(part)]
            # The first time a new tensor: an operator may have returned one that is not ours.
            vector = torch.addmv(vector, part.T, c, alpha=-1)
            at += len(part)
        return vector

    def combine(self, coordinates: Tensor) -> Tensor:
        """Return the rows' combinations `[k, n]` by `coordinates` `[m, k]`."""
        C = coordinates.to(self.device, self.dtype)
        result = torch.zeros(C.shape[1], self.n, dtype=self.dtype, device=self.device)
        for at, part in self._parts(len(C)):
            result.addmm_(C[at : at + len(part)].T, part)
        return result

    def combine_(self, coordinates: Tensor) -> None:
        """Replace the rows by their combinations, in blocks of columns so that no second basis is needed."""
        C = coordinates.to(self.device, self.dtype)
        parts = [part for _, part in self._parts(len(C))]
        for left in range(0, self.n, 2**15):
            here = slice(left, left + 2**15)
            new = C.T @ torch.cat([part[:, here] for part in parts])
            for at in range(0, len(new), self.chunk):
                rows = new[at : at + self.chunk]
                self.chunks[at // self.chunk][: len(rows), here] = rows
        self.count = C.shape[1]

    def _parts(self, count: int) -> list[tuple[int, Tensor]]:
        """List (index of the first row, rows) of every chunk, up to a number of rows."""
        starts = range(0, count, self.chunk)
        return [(at, self.chunks[at // self.chunk][: count - at]) for at in starts]

    def _window(self, window: int | None) -> list[Tensor]:
        if window is None:
            return [part for _, part in self._parts(self.count)]
        return [self.block(max(0, self.count - window), self.count)]


def norm(v: Tensor) -> float:
    """Return the norm of a vector; NaN or infinite only where an entry is."""
    value = float(torch.linalg.vector_norm(v))
    if v.dtype == torch.float64 or _SAFE_NORM[0] < value < _SAFE_NORM[1]:
        return value
    return float(torch.linalg.vector_norm(v.double()))


def working_dtype(operator: SymmetricOperator) -> torch.dtype:
    """Return the type to keep vectors in: one of 16 bits has neither the digits nor the range."""
    return torch.float64 if operator.dtype == torch.float64 else torch.float32


def product(operator: SymmetricOperator, v: Tensor) -> Tensor:
    """Return A v in the working type, or raise SpecDefError where it is not finite."""
    result = (operator @ v).detach().to(operator.device, working_dtype(operator))
    if not math.isfinite(norm(result)):
        raise SpecDefError(
            "A product of the operator with a vector is NaN or infinite.",
            hint="The loss, its derivatives or the weights are not finite: check the weights and the data, or compute "
            "in float64.",
        )
    return result


def gaussian_vectors(operator: SymmetricOperator, seed: int) -> Iterator[Tensor]:
    """Yield Gaussian vectors `[n]`, drawn on the CPU whatever the device: a seed means the same vectors everywhere."""
    generator = torch.Generator().manual_seed(seed)
    n, dtype = operator.shape[0], working_dtype(operator)
    while True:
        yield torch.randn(n, generator=generator, dtype=dtype).to(operator.device)
