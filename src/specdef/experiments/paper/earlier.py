"""Figures 1 and 2 and the quartic law: what their claims say of the papers' numbers, in the papers' own terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from specdef.experiments.paper.verdicts import FAILED, HELD, ONLY_THERE, comparison, held_if

Claims = Sequence[Mapping[str, Any]]


def figure1_comparisons(claims: Claims) -> list[dict[str, Any]]:
    """Compare figure 1 and section 2 of papers/001.

    Args:
        claims: Of the record of `figure1`.

    Returns:
        As `comparison` makes them.
    """
    accelerated = _of(claims, "Accelerated")
    return [
        _stated(claims, "Gradient descent at", "Steps of gradient descent on a quadratic, over the condition number κ", "κ", lambda n: f"κ^{_span(n['exponents'].values())}"),
        _stated(claims, "Accelerated", "Steps of accelerated methods", "√κ", lambda _: f"κ^{_span(p for e in accelerated['numbers']['exponents'].values() for p in e.values())}"),
        _stated(claims, "The learning rate", "Largest rate of gradient descent that does not diverge", "2/σ_max", lambda n: f"excess left at 0.99, 1, 1.01 of it: {', '.join(f'{v:.1g}' for v in n['excess_left'].values())}"),
        _stated(claims, "f - f*", "Rate at that step size, (1 − 2/√κ)^t", "an upper bound", lambda n: f"exceeded up to {_largest(n['largest_ratio']):.3g} times"),
    ]  # fmt: skip


def figure2_comparisons(claims: Claims) -> list[dict[str, Any]]:
    """Compare figure 2 and Theorem 2.1 of papers/001.

    Args:
        claims: Of the record of `figure2`.

    Returns:
        As `comparison` makes them.
    """
    paper, best = _of(claims, "Scaling one"), _of(claims, "It does so")
    verdict = FAILED if not paper["held"] else HELD if best["held"] else ONLY_THERE

    def growth(net: Mapping[str, Any]) -> str:
        known = [(float(s), n) for s, n in net["median_steps"].items() if n is not None]
        return f"{known[0][1]:g} to {known[-1][1]:g} at {known[-1][0]:g}"

    nets = ", ".join(f"{name} {growth(net)}" for name, net in best["numbers"].items())
    return [
        comparison("Steps of Adam grow with one scaled singular value (MLP, CNN, transformer)", paper="in all cases", ours=f"at the best rate, over scales: {nets}; none beyond in the budget", verdict=verdict, at_the_papers_rate=paper["numbers"], best=best["numbers"]),
        _stated(claims, "The bounds hold", "Theorem 2.1: σ_max(H) / bound", "above 1 in all cases", lambda n: f"at least {n['smallest_ratio']:.3f} in {n['cases']} cases"),
        _stated(claims, "Theorem 2.1 says", "Theorem 2.1 says something on all three networks", "yes", lambda n: "; ".join(f"{a}: zero in {e['vacuous']} of {e['of']}" for a, e in n.items())),
        _stated(claims, "lambda_max grows", "Growth of σ_max(H) with the scale, truth / bound", "– / linear", lambda n: f"scale^{_span(n['truth'].values())} / scale^{_span(v for v in n['bound'].values() if v is not None)}"),
        _stated(claims, "lambda_max can", "σ_max(H) can be raised through any weight matrix", "yes (top-k of every matrix)", lambda n: f"not through {len(n['exponents_below_half'])} of {n['matrices']}"),
    ]  # fmt: skip


def collapse_comparisons(claims: Claims) -> list[dict[str, Any]]:
    """Compare the quartic law and the conditions of arXiv 2602.15799 (papers/002).

    Args:
        claims: Of the record of `collapse`.

    Returns:
        As `comparison` makes them; on a language model only where one was run.
    """
    found = [
        _stated(claims, "Planted: without", "Alignment loss over time where the three conditions are planted", "t⁴", lambda n: f"t^{n['exponent']:.2f}"),
        _stated(claims, "Quartic law", "The same observed on a language model, gradient descent", "t⁴", lambda n: f"t^{_span(n['exponents'].values())}"),
        _stated(claims, "The task's gradient", "Condition 2: the gradient starts orthogonal to the sensitive subspace", "nearly", lambda n: f"overlap {_span(n['overlap_over_random'].values(), '.3g')} times a random one's"),
        _stated(claims, "The sensitive subspace", "Condition 1: sensitivity is of low rank", "most of the trace in few directions", lambda n: f"{_span((100 * e for e in n['energy'].values()), '.0f')} % of it"),
        _stated(claims, "Curvature couples", "Condition 3: curvature couples the task into it", "yes", lambda n: f"{_span(n['gamma_over_random'].values(), '.2g')} times a random direction"),
        _stated(claims, "The forecast is within a factor of 2 of the observed damage in every run where it calls", "Damage is foreseeable before training", "not measured", lambda n: f"within a factor of 2 in {n['right']} of {n['runs']} runs it calls itself applicable to"),
    ]  # fmt: skip
    return [entry for entry in found if entry]


def _stated(claims: Claims, begins: str, quantity: str, paper: str, ours: Callable[[Any], str]) -> dict[str, Any]:  # fmt: skip
    """Turn one claim into a comparison; an empty one where it was not made."""
    found = next((c for c in claims if c["claim"].startswith(begins)), None)
    if found is None:
        return {}
    return comparison(quantity, paper=paper, ours=ours(found["numbers"]), verdict=held_if(found["held"]), claim=found["claim"])  # fmt: skip


def _of(claims: Claims, begins: str) -> Mapping[str, Any]:
    return next(c for c in claims if c["claim"].startswith(begins))


def _span(values: Any, digits: str = ".2f") -> str:
    known = sorted(values)
    low, high = (format(v, digits) for v in (known[0], known[-1]))
    return low if low == high else f"{low} to {high}"


def _largest(numbers: Mapping[Any, Any]) -> float:
    return max(_largest(v) if isinstance(v, Mapping) else float(v) for v in numbers.values())
