"""The 8x8 digits that come with scikit-learn: small, real, and there without a network."""

from __future__ import annotations

from typing import Any

from specdef.errors import SpecDefError


def digits() -> tuple[Any, Any]:
    """Load the digits.

    Returns:
        Images, a float64 array `[1797, 8, 8]` of whole numbers 0 to 16, and labels, an int64 array `[1797]`.

    Raises:
        SpecDefError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SpecDefError(
            "The digits come with scikit-learn, which is not installed.",
            hint="Run `pip install scikit-learn`.",
        ) from None
    data = load_digits()
    return data.images, data.target
