"""Directions in weight space kept parameter by parameter, on each parameter's device: coordinates in them, and their removal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import final

import torch
from torch import Tensor

from specdef.curvature.parameters import flat_slices

Pieces = Iterable[tuple[str, Tensor]]
"""A vector as (name of a parameter, flat piece), in the parameters' order; may be lazy, so that only a piece is in memory."""


@final
class Rows:
    """The span of rows U in the coordinates phi = P^(1/2) theta.

    Memory: m n numbers. The rows need not be orthonormal: stored in bfloat16 they no longer are, so that the projector is
    U^T (U U^T)^-1 U.

    Args:
        rows: U `[m, n]`, linearly independent.
        metric: p^(1/2) `[n]`; None for ones.
        parameters: Tensors by name, in the order in which they lie in a flat vector; they say where each piece lives.
        dtype: Type the rows are kept in.
    """

    def __init__(
        self,
        rows: Tensor,
        metric: Tensor | None,
        parameters: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> None:
        # what is kept in half precision is multiplied in single
        self.dtype = dtype if dtype == torch.float64 else torch.float32
        self._slices = flat_slices(parameters)
        self._blocks = {
            name: rows[:, part].to(parameters[name].device, dtype).contiguous()
            for name, part in self._slices.items()
        }
        self._metric = None if metric is None else {
            name: metric[part].to(parameters[name].device, self.dtype) for name, part in self._slices.items()
        }  # fmt: skip
        gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for block in self._blocks.values():
            wide = block.to(self.dtype)
            gram += (wide @ wide.T).double().cpu()
        self._factor = torch.linalg.cholesky(gram)

    def coordinates(self, pieces: Pieces, *, covector: bool = False) -> tuple[Tensor, float]:
        """Return (U P^(1/2) v, |P^(1/2) v|), or (U P^(-1/2) g, |P^(-1/2) g|) for a gradient: one pass over U.

        Args:
            pieces: v or g.
            covector: It is a gradient.

        Returns:
            `[m]` float64 on the CPU, and the length in the metric.
        """
        c: Tensor | None = None
        square: Tensor | None = None
        for name, piece in pieces:
            v = self._scaled(name, piece.to(self.dtype), covector)
            part, norm = self._blocks[name].to(self.dtype) @ v, torch.linalg.vecdot(v, v).double()
            c = part if c is None or square is None else c + part.to(c.device)
            square = norm if square is None else square + norm.to(square.device)
        assert c is not None and square is not None
        return c.double().cpu(), float(square.sqrt())

    def within(self, c: Tensor) -> float:
        """Return the length of the part in the span of a vector with given coordinates.

        Args:
            c: `[m]`, as `coordinates` gives them.

        Returns:
            |U^T (U U^T)^-1 c|.
        """
        return float(torch.linalg.solve_triangular(self._factor, c[:, None], upper=False).norm())

    def part(self, name: str, c: Tensor, *, covector: bool = False) -> Tensor:
        """Return one parameter's piece of P^(-1/2) U^T (U U^T)^-1 c, or of P^(1/2) U^T (U U^T)^-1 c for a gradient.

        Args:
            name: Of the parameter.
            c: `[m]`, as `coordinates` gives them.
            covector: It is a gradient.

        Returns:
            Flat.
        """
        block = self._blocks[name]
        weights = torch.cholesky_solve(c[:, None], self._factor)[:, 0]
        piece = block.to(self.dtype).T @ weights.to(block.device, self.dtype)
        return self._scaled(name, piece, not covector)

    def flat(self) -> Tensor:
        """Return U `[m, n]` on the first parameter's device, in the type it is multiplied in."""
        blocks = [block.to(self.dtype) for block in self._blocks.values()]
        return torch.cat([block.to(blocks[0].device) for block in blocks], 1)

    def _scaled(self, name: str, v: Tensor, inverse: bool) -> Tensor:
        if self._metric is None:
            return v
        return v / self._metric[name] if inverse else v * self._metric[name]
