"""Names on disk and names in memory: transformers renames some tensors when it loads a checkpoint."""

from __future__ import annotations

from torch import Tensor, nn

from specdef.errors import SpecDefError


class NameMap:
    """Finds in a model what its checkpoint calls by another name.

    Follows transformers' own renamings (ViT's `attention.attention.query` is `q_proj` in memory) and the prefix of a base
    model. Does not follow conversions that merge several tensors into one, such as the experts of a mixture.

    Args:
        model: A transformers model, or any module whose names are those of its checkpoint.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors = model.state_dict(keep_vars=True)
        self._renamings: list[object] | None = None

    def name(self, name: str) -> str:
        """Return the name in memory.

        Args:
            name: Tensor name in the checkpoint.

        Returns:
            Its key in the model's state dict.

        Raises:
            SpecDefError: The model has no such tensor.
        """
        prefix = getattr(self._model, "base_model_prefix", "")
        for candidate in (
            name,
            f"{prefix}.{name}",
            name.removeprefix(f"{prefix}."),
            self._rename(name),
        ):
            if candidate in self._tensors:
                return candidate
        raise SpecDefError(
            f"{type(self._model).__name__} has no tensor of its own for {name}",
            hint="transformers merges the experts of a mixture in memory: work on the folder, data-free and absorbed.",
        )

    def tensor(self, name: str) -> Tensor:
        """Return the parameter or buffer itself.

        Args:
            name: Tensor name in the checkpoint.

        Returns:
            The model's own tensor, not a copy.

        Raises:
            SpecDefError: The model has no such tensor.
        """
        tensor: Tensor = self._tensors[self.name(name)]
        return tensor

    def _rename(self, name: str) -> str:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming, rename_source_key
        except ImportError:
            return name
        if self._renamings is None:
            found = (
                get_model_conversion_mapping(self._model) if hasattr(self._model, "config") else []
            )
            self._renamings = [item for item in found if isinstance(item, WeightRenaming)]
        prefix = getattr(self._model, "base_model_prefix", None)
        renamed: str = rename_source_key(name, self._renamings, [], prefix, self._tensors)[0]
        return renamed
