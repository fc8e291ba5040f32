"""One table per model family, keyed by the `model_type` of config.json."""

from __future__ import annotations

from specdef.symmetries.families import encoder, gpt, llama, moe, resnet
from specdef.symmetries.table import Family

FAMILIES: dict[str, Family] = {
    **llama.FAMILIES,
    **moe.FAMILIES,
    **gpt.FAMILIES,
    **encoder.FAMILIES,
    **resnet.FAMILIES,
}
