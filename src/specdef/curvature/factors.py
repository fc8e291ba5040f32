"""The papers' bounds on a network's Hessian: the Jacobian through a weight matrix, factorised and checked, and what follows.

Let every path from W_l to the output pass a later linear layer W_j. For sample i the Jacobian of the output with respect to
vec W_l is J_i = A_i (I (x) W_j) C_i, with A_i = d output / d out_j and C_i = d in_j / d vec W_l. With squared error, mean
over all elements, the block of W_l in the Hessian is H_l = G + E with G = c sum_i J_i^T J_i, c = 2 / elements; E (residuals times
second derivatives of the output) is zero where the output is piecewise linear in W_l. A principal block bounds the whole from
below (Cauchy), so with v the leading eigenvector of G and rho = v^T E v / lambda_max(G)

    max |eigenvalue of H| >= |v^T H_l v| = |1 + rho| lambda_max(G) >= min(1, |1 + rho|) * (bound on lambda_max(G)).

Weyl's lambda_max(G) - |E| <= v^T H_l v is never above the middle. A skip connection around W_j breaks the factorisation:
it is checked, and refused. Everything is dense and in float64: for nets of up to about a thousand weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from specdef.curvature.bounds import Bound, Law, chain_bound, rank_bound, repeated, top_k_bound
from specdef.curvature.jacobians import Jacobians, float64_state, is_linear
from specdef.curvature.parameters import flat_slices
from specdef.curvature.subspace_bounds import abc_gap, abc_noted, abc_sequential, abc_subspace

# Largest |J - A (I (x) W) C| / |J| taken for rounding: float64 leaves 1e-14 here, a skip connection some tenths.
_TOLERANCE = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A weight and the later weight that its every path to the output passes.

    Args:
        block: Parameter whose Hessian block is bounded.
        through: Weight of a linear layer or convolution.
        scores: Where block and through are the query and key weights: the module that gives (W_K Z)^T W_Q Z, rows for
            keys. The score is linear in each of the two, and the block's Jacobian contains the transpose of the other.
    """

    block: str
    through: str
    scores: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """J_i = A_i (I_copies (x) B) C_i of every sample i.

    Args:
        pair: Which weights.
        A: d output / d out_j `[samples, outputs, copies * d]`.
        B: The weight `[d, h]`; the transpose of the other one for a pair of query and key.
        C: d in_j / d vec W_l `[samples, copies * h, n]`.
        J: d output / d vec W_l `[samples, outputs, n]`, computed on its own.
        copies: How often the layer is applied to one sample (tokens or positions).
        error: |J - A (I (x) B) C| / |J| over all samples, Frobenius.
    """

    pair: Pair
    A: Float[Tensor, "samples outputs p"]
    B: Float[Tensor, "d h"]
    C: Float[Tensor, "samples q n"]
    J: Float[Tensor, "samples outputs n"]
    copies: int
    error: float


def factorise(model: nn.Module, inputs: Tensor, pair: Pair) -> Factors:
    """Factorise the Jacobian of a block through a later weight, and check the product against the Jacobian itself.

    Args:
        model: Gives each sample's output independently of the other samples; evaluated in float64 as it stands.
        inputs: Samples along the first dimension.
        pair: Block and later weight.

    Returns:
        The factors.

    Raises:
        ValueError: The weights do not exist or are of no linear layer, or the product is not the Jacobian (the block
            reaches the output on another path as well).
    """
    net = Jacobians(model, inputs)
    if pair.block not in net.state or not pair.through.endswith(".weight"):
        raise ValueError(
            f"{pair.block} must be a parameter and {pair.through} the weight of a linear layer."
        )
    J = net.weight_jacobian(pair.block, lambda run: run.output)
    tried = []
    for A, B, C in _scores(net, pair) if pair.scores else _linear(net, pair):
        copies = A.shape[-1] // B.shape[0]
        product = A @ repeated(B, copies) @ C
        scale = float(J.norm()) or 1.0
        tried.append(
            Factors(pair=pair, A=A, B=B, C=C, J=J, copies=copies, error=float((J - product).norm()) / scale)
        )  # fmt: skip
    found = min(tried, key=lambda factors: factors.error)
    if not found.error <= _TOLERANCE:
        raise ValueError(
            f"the Jacobian of {pair.block} does not factorise through {pair.through} (relative error {found.error:.1e}): "
            "it reaches the output on another path, or not through this weight."
        )
    return found


def find_pairs(model: nn.Module, inputs: Tensor) -> list[Pair]:
    """List the pairs of weights that factorise, queries and keys aside.

    Args:
        model: The network.
        inputs: Samples along the first dimension.

    Returns:
        Pairs of a trainable weight matrix and the weight of a later linear layer or convolution.
    """
    return [factors.pair for factors in _all_factors(model, inputs)]


def network_bounds(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, pairs: Sequence[Pair] | None = None
) -> list[Bound]:
    """Bound the largest |eigenvalue| of the Hessian of the mean squared error from below, by weights.

    Per pair, quadratic bounds (lambda_max(G) = c sigma_1(J)^2, and a bound on sigma_1(J)) and linear ones (G = P (I (x) W) C
    with the second copy of the weight inside P = c J^T A, the form of Theorem 2.1). "theorem-2.1", "remark-A.3", "rank",
    "abc-gap" and "abc-noted" take the best sample, the others all samples at once.

    Cost: dense Jacobians and SVDs of sizes samples * outputs; one dense Hessian.

    Args:
        model: The network; frozen parameters are constants.
        inputs: Samples along the first dimension.
        targets: Of the shape of the output.
        pairs: Which weights; None takes all of `find_pairs`.

    Returns:
        The bounds, vacuous ones with the reason. Those with `rigorous` hold for the Hessian at these weights.

    Raises:
        ValueError: A pair does not factorise.
    """
    H, slices = dense_hessian(model, inputs, targets)
    for pair in pairs or ():
        if pair.block not in slices:
            raise ValueError(f"{pair.block} is frozen or absent: it has no block in the Hessian.")
    if pairs is None:
        found = _all_factors(model, inputs)
    else:
        found = [factorise(model, inputs, pair) for pair in pairs]
    bounds: list[Bound] = []
    c = 2 / targets.numel()
    for factors in found:
        pair = factors.pair
        block = H[slices[pair.block], slices[pair.block]]
        J = factors.J.flatten(0, 1)
        values, vectors = torch.linalg.eigh(c * J.T @ J)
        v = vectors[:, -1]
        rho = float(v @ block @ v) / float(values[-1]) - 1 if float(values[-1]) > 0 else 0.0
        bounds += [_on_hessian(bound, law, c, rho, pair) for law, bound in _on_jacobian(factors)]
    return bounds


def dense_hessian(
    model: nn.Module, inputs: Tensor, targets: Tensor
) -> tuple[Float[Tensor, "n n"], dict[str, slice]]:
    """Return the Hessian of the mean squared error in float64 and where each trainable parameter stands in it.

    Args:
        model: The network.
        inputs: Samples along the first dimension.
        targets: Of the shape of the output.

    Returns:
        The matrix and slices by parameter name.

    Raises:
        ValueError: Output and targets differ in shape.

    >>> H, _ = dense_hessian(nn.Linear(1, 1, bias=False), torch.tensor([[3.0]]), torch.tensor([[1.0]]))
    >>> H
    tensor([[18.]], dtype=torch.float64)
    """
    state = float64_state(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    slices = flat_slices(trained)

    def loss(flat: Tensor) -> Tensor:
        moved = {name: flat[slices[name]].view(p.shape) for name, p in trained.items()}
        output: Tensor = functional_call(model, state | moved, (inputs.double(),))
        if output.shape != targets.shape:
            raise ValueError(f"targets must be {list(output.shape)}, got {list(targets.shape)}.")
        return (output - targets.double()).square().mean()

    flat = torch.cat([state[name].flatten() for name in trained])
    # Reverse over reverse: forward mode has gaps (the derivative of SiLU's), and warns on loading.
    H: Tensor = jacrev(grad(loss))(flat)
    return H, slices


def lambda_max(matrix: Float[Tensor, "n n"]) -> float:
    """Return the largest |eigenvalue|, which is the papers' sigma_max(H).

    Args:
        matrix: Symmetric.

    Returns:
        The value.
    """
    return float(torch.linalg.eigvalsh(matrix).abs().max())


def _all_factors(model: nn.Module, inputs: Tensor) -> list[Factors]:
    weights = [name for name, p in model.named_parameters() if p.requires_grad and p.ndim >= 2]
    through = [f"{name}.weight" for name, module in model.named_modules() if is_linear(module)]
    found = []
    for pair in (Pair(block=b, through=t) for b in weights for t in through if b != t):
        try:
            found.append(factorise(model, inputs, pair))
        except ValueError:
            continue
    return found


def _on_jacobian(f: Factors) -> list[tuple[Law, Bound]]:
    P = f.J.mT @ f.A
    AB = f.A @ repeated(f.B, f.copies)
    samples = torch.eye(len(f.A), dtype=f.A.dtype, device=f.A.device)
    A_all = torch.einsum("ij,iop->iojp", samples, f.A).flatten(2).flatten(0, 1)
    C_all, P_all = f.C.flatten(0, 1), torch.cat(list(P), 1)
    copies, all_copies = f.copies, f.copies * len(f.A)
    return [
        ("linear", chain_bound(P, f.B, f.C, copies=copies)),
        ("quadratic", chain_bound(f.A, f.B, f.C, copies=copies)),
        ("quadratic", top_k_bound(AB, f.C)),
        ("quadratic", rank_bound(AB, f.C)),
        ("quadratic", abc_gap(f.A, f.B, f.C, copies=copies)),
        ("linear", abc_sequential(P_all, f.B, C_all, copies=all_copies)),
        ("quadratic", abc_sequential(A_all, f.B, C_all, copies=all_copies)),
        ("quadratic", abc_subspace(A_all, f.B, C_all, copies=all_copies)),
        ("linear", abc_noted(P, repeated(f.B, copies), f.C)),
    ]


def _on_hessian(bound: Bound, law: Law, c: float, rho: float, pair: Pair) -> Bound:
    gauss_newton = c * bound.value ** (2 if law == "quadratic" else 1)
    # Rounding leaves 1e-16 where E is zero; a rho of that size is kept, it only lowers the bound.
    share = min(1.0, abs(1 + rho))
    head = "c sigma_1(A B C)^2" if law == "quadratic" else "c sigma_1((J^T A) B C)"
    return replace(
        bound,
        equation=f"lambda_max >= min(1, |1 + rho|) {head}; {bound.equation}",
        value=share * gauss_newton,
        vacuous=bound.vacuous or ("" if share else "the second-order part cancels Gauss-Newton"),
        factors=bound.factors | {"gauss_newton": gauss_newton, "rho": rho},
        law=law,
        block=pair.block,
        through=pair.through,
    )


def _linear(net: Jacobians, pair: Pair) -> list[tuple[Tensor, Tensor, Tensor]]:
    name = pair.through.removesuffix(".weight")
    if not is_linear(net.model.get_submodule(name)):
        raise ValueError(f"{pair.through} is not the weight of a linear layer or convolution.")
    A = net.part_jacobian(name).flatten(2)
    C = net.weight_jacobian(pair.block, lambda run: run.entered, at=name)
    return [(A, net.state[pair.through].flatten(1), C)]


def _scores(net: Jacobians, pair: Pair) -> list[tuple[Tensor, Tensor, Tensor]]:
    """S = (W_K Z)^T W_Q Z is W_K^T in the derivative by W_Q: dS[s, t] = z_s^T W_K^T (dW_Q z_t); and the other way round."""
    own, other = (name.removesuffix(".weight") for name in (pair.block, pair.through))
    G = net.part_jacobian(pair.scores)
    with torch.no_grad():
        z = vmap(lambda x: net.run(x, at=other).entered)(net.inputs)
    C = net.weight_jacobian(pair.block, lambda run: run.left, at=own)
    B = net.state[pair.through].T
    # The block may be the query's or the key's weight; the check against J tells which.
    sides = (torch.einsum("iost,isd->iotd", G, z), torch.einsum("iost,itd->iosd", G, z))
    return [(A.flatten(2), B, C) for A in sides]
