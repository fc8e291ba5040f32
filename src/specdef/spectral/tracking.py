"""The k largest singular triplets of many matrices that change a little at a time, as weights do in training.

Block power iteration with Rayleigh–Ritz, warm-started: one product with a few columns per matrix and update, with the
matrix and with its transpose by turns. Each product measures the pair before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from specdef.spectral.blocks import Blocks, Product, check_finite, check_rank
from specdef.spectral.prepare import full_precision

# Products in one update before a matrix is computed afresh, which costs 30 to 60 of them.
_MAX_PRODUCTS = 16
# Updates of which one multiplies the whole block. Odd, so that both sides have their turn.
_PERIOD = 3
# Updates in which every matrix is computed afresh once, by turns.
_ROTATION = 1000


class TopKTracker:
    """The k largest singular triplets of matrices that change a little at a time.

    Where little changed, an update costs one product with k columns, and every third time with the k + 3 of the whole
    block, in which a value that grows from below is found. Where the residual measured is too large for values exact
    to tol / 20, more products follow, and after 16 a computation from scratch. Besides, every matrix is computed afresh
    once in 1000 updates.

    float64 is computed in float64, all else in float32. No gradient is recorded.

    Args:
        matrices: Name to live tensor, (m, n) or a stack (b, m, n), of any strides, all on one device; read anew in
            each update.
        k: Triplets per matrix, 1..min(m, n).
        tol: Largest residual accepted, relative to the value; smaller ones are asked for beside a small gap,
            where the error of a value is the square of the residual over the gap.
        seed: Of computations from scratch; same seed, same machine, same answer.

    Raises:
        ValueError: A tensor is no floating-point matrix or stack, or `k` or `tol` is out of range.

    >>> tracker = TopKTracker({"weight": torch.diag(torch.tensor([1.0, 3.0, 2.0]))}, 2)
    >>> tracker.update()
    >>> [round(s, 5) for s in tracker.values["weight"].tolist()]
    [3.0, 2.0]
    """

    def __init__(
        self, matrices: Mapping[str, Tensor], k: int, *, tol: float = 1e-2, seed: int = 0
    ) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        if not tol > 0:
            raise ValueError(f"tol must be positive, got {tol}.")
        self.k, self.tol = k, tol
        self.updates = self.refreshes = self.products = 0
        alike: dict[tuple[object, ...], dict[str, Tensor]] = {}
        for name, matrix in matrices.items():
            shape = tuple(matrix.shape)
            if matrix.ndim not in (2, 3) or 0 in shape or not matrix.is_floating_point():
                raise ValueError(
                    f"{name}: expected floating-point matrices (m, n) or (b, m, n), "
                    f"got {matrix.dtype} of shape {shape}."
                )
            if k > min(shape[-2:]):
                raise ValueError(f"{name} {shape}: k = {k} exceeds the smaller side.")
            alike.setdefault((*shape[-2:], matrix.dtype), {})[name] = matrix.detach()
        self._groups = [Blocks(tensors, k, seed) for tensors in alike.values()]
        # name -> group, and where in it: an index for a matrix, a slice for a stack.
        self._places: dict[str, tuple[Blocks, int | slice]] = {}
        for group, tensors in zip(self._groups, alike.values(), strict=True):
            start = 0
            for name, tensor in tensors.items():
                stop = start + (len(tensor) if tensor.ndim == 3 else 1)
                self._places[name] = group, slice(start, stop) if tensor.ndim == 3 else start
                start = stop
        self.values = {name: group.values[at] for name, (group, at) in self._places.items()}
        self.count = sum(values.numel() for values in self.values.values())

    @property
    def residuals(self) -> dict[str, float]:
        """Largest residual measured last under each name, relative to the largest singular value."""
        return {name: max(group.residuals[_span(at)]) for name, (group, at) in self._places.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Bring the triplets up to the matrices as they are now.

        Raises:
            ValueError: A matrix is not finite, or of rank below k, where the gradient of its values is undefined.
        """
        self.updates += 1
        if not self._groups:
            return
        with full_precision(self._groups[0].left.device):
            tracked = [group for group in self._groups if not group.dense]
            for group in self._groups:
                if group.dense:
                    group.factorise()
            everything = [(group, row) for group in tracked for row in range(len(group.items))]
            stale = everything if self.updates == 1 else self._iterate(tracked)
            turn = self.updates % _ROTATION
            due = [
                pair
                for i, pair in enumerate(everything)
                if i * _ROTATION // len(everything) == turn and pair not in stale
            ]
            for group, row in stale + due:
                group.refresh(row, self.tol)
            self.refreshes += len(stale) + len(due)

    def _iterate(self, groups: list[Blocks]) -> list[tuple[Blocks, int]]:
        """Multiply each matrix until its values are exact enough; return those where they are not to be had so."""
        turn = {group: (self.updates + i) % _PERIOD == 0 for i, group in enumerate(groups)}
        active = {group: list(range(len(group.items))) for group in groups}
        for i in range(_MAX_PRODUCTS):
            kinds: dict[tuple[Blocks, int, bool], list[int]] = {}
            for group, rows in active.items():
                for row in rows:
                    whole = i > 0 or turn[group] or group.residuals[row] > self.tol / 2
                    kinds.setdefault((group, group.side[row], whole), []).append(row)
            if not kinds:
                break
            products = [
                Product(group, side, rows, whole=whole)
                for (group, side, whole), rows in kinds.items()
            ]
            # One transfer, one factorisation and one judgement for all: calls cost more than the numbers of a matrix.
            sizes = [len(rows) for rows in kinds.values()]
            numbers = torch.cat([product.multiply() for product in products]).cpu()
            matrices = [(product.blocks, row) for product in products for row in product.rows]
            check_finite(numbers, matrices)
            width = products[0].blocks.width
            P, S, Rh = torch.linalg.svd(numbers[:, : width * width].reshape(-1, width, width))
            check_rank(S, self.k, matrices)
            parts = (torch.split(part, sizes) for part in (P, S, Rh))
            for product, *part in zip(products, *parts, strict=True):
                product.rotate(*part)
            active = self._unsettled(matrices, S, numbers[:, width * width :])
            self.products += sum(sizes)
        return [(group, row) for group, rows in active.items() for row in rows]

    def _unsettled(
        self, matrices: Sequence[tuple[Blocks, int]], S: Tensor, measured: Tensor
    ) -> dict[Blocks, list[int]]:
        """Return the matrices with values not exact enough, given Ritz values, Rayleigh quotients and residuals."""
        k, tol = self.k, self.tol
        own, gaps = S[:, :k], measured[:, k:]
        # What the product gained on the pair before it: a value that entered from outside shows here first.
        gains = own - measured[:, :k].sort(1, descending=True)[0]
        beyond, floor = torch.tensor(
            [(group.beyond[row], 10 * group.eps) for group, row in matrices], dtype=S.dtype
        )[:, :, None].unbind(1)
        # The error of a value is r^2 over its distance to the rest of the spectrum.
        distance = torch.maximum(own - beyond, 2 * tol * own)
        small = torch.minimum(tol * own, (tol / 20 * own * distance).sqrt())
        floor = floor * S[:, :1]
        settled = gaps <= torch.maximum(small, floor)
        settled &= gains <= torch.maximum(tol / 20 * own, floor)
        residuals = (gaps / S[:, :1]).amax(1).tolist()
        active: dict[Blocks, list[int]] = {}
        for (group, row), residual, done in zip(
            matrices, residuals, settled.all(1).tolist(), strict=True
        ):
            group.residuals[row] = residual
            if not done:
                active.setdefault(group, []).append(row)
        return active

    @torch.no_grad()
    def add_gradient(self, gradients: Mapping[str, Tensor], weight: float) -> None:
        """Add the weighted gradient of the sum of the k values, sum_i u_i v_i^T, in place.

        Args:
            gradients: For every name a tensor shaped like its matrix, of any strides.
            weight: Factor of the sum.
        """
        for name, (group, at) in self._places.items():
            gradient = gradients[name]
            U, V = (
                block[at][..., : self.k, :].to(gradient.dtype)
                for block in (group.left, group.right)
            )
            if self.k > 4:
                multiply = gradient.addmm_ if gradient.ndim == 2 else gradient.baddbmm_
                multiply(U.mT, V, alpha=weight)
                continue
            # addmm_ takes twice as long for so few columns.
            for i in range(self.k):
                gradient.addcmul_(U[..., i, :, None], V[..., i, None, :], value=weight)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of all that the next update depends on besides the matrices."""
        state = {"counters": torch.tensor([self.updates, self.refreshes, self.products])}
        for name, (group, at) in self._places.items():
            rows = _span(at)
            state[f"{name}.side"] = torch.tensor(group.side[rows])
            for part, numbers in (("residuals", group.residuals), ("beyond", group.beyond)):
                state[f"{name}.{part}"] = torch.tensor(numbers[rows], dtype=torch.float64)
            for part in Blocks.TENSORS:
                state[f"{name}.{part}"] = getattr(group, part)[at].clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where `state_dict` was taken, bit for bit.

        Args:
            state: Of a tracker of matrices with the same names, shapes and k.

        Raises:
            ValueError: If it is not.
        """
        for name, tensor in self.state_dict().items():
            found = tuple(state[name].shape) if name in state else "nothing"
            if found != tuple(tensor.shape):
                raise ValueError(
                    f"the state of another tracker: {name} should have shape {tuple(tensor.shape)}, found {found}."
                )
        self.updates, self.refreshes, self.products = state["counters"].tolist()
        for name, (group, at) in self._places.items():
            rows = _span(at)
            group.side[rows] = state[f"{name}.side"].tolist()
            group.residuals[rows] = state[f"{name}.residuals"].tolist()
            group.beyond[rows] = state[f"{name}.beyond"].tolist()
            for part in Blocks.TENSORS:
                getattr(group, part)[at].copy_(state[f"{name}.{part}"])


def _span(at: int | slice) -> slice:
    return slice(at, at + 1) if isinstance(at, int) else at
