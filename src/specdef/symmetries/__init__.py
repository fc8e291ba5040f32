"""Where a network can be rescaled without changing its function: one small table per model family, as data."""

from specdef.symmetries.families import FAMILIES
from specdef.symmetries.find import find_sites
from specdef.symmetries.roles import (
    Role,
    is_transposed,
    layer_index,
    lockable_matrices,
    matches,
    module_name,
    role,
)
from specdef.symmetries.site import Leg, Site, SiteKind, Symmetries, Uncovered

__all__ = [
    "FAMILIES",
    "Leg",
    "Role",
    "Site",
    "SiteKind",
    "Symmetries",
    "Uncovered",
    "find_sites",
    "is_transposed",
    "layer_index",
    "lockable_matrices",
    "matches",
    "module_name",
    "role",
]
