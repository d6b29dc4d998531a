"""Convert SAEs of other libraries to SAELens SAEs with the same latents and reconstruction.

From a checkpoint only tensors and plain values are unpickled. Needs the extra ``sae-lens``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from monoloss_plugin._later import later

if TYPE_CHECKING:
    from monoloss_plugin.convert.dictionary_learning import from_dictionary_learning
    from monoloss_plugin.convert.loaders import (
        dictionary_learning_loader,
        monoloss_loader,
        overcomplete_loader,
        prisma_loader,
        saev_loader,
    )
    from monoloss_plugin.convert.monoloss import from_monoloss
    from monoloss_plugin.convert.overcomplete import from_overcomplete
    from monoloss_plugin.convert.prisma import from_prisma
    from monoloss_plugin.convert.saev import from_saev
    from monoloss_plugin.convert.sparsify import from_sparsify

__all__ = [
    "dictionary_learning_loader",
    "from_dictionary_learning",
    "from_monoloss",
    "from_overcomplete",
    "from_prisma",
    "from_saev",
    "from_sparsify",
    "monoloss_loader",
    "overcomplete_loader",
    "prisma_loader",
    "saev_loader",
    "sparsify_loader",
]

__getattr__, __dir__ = later(
    __name__,
    {
        "dictionary_learning_loader": "loaders",
        "from_dictionary_learning": "dictionary_learning",
        "from_monoloss": "monoloss",
        "from_overcomplete": "overcomplete",
        "from_prisma": "prisma",
        "from_saev": "saev",
        "from_sparsify": "sparsify",
        "monoloss_loader": "loaders",
        "overcomplete_loader": "loaders",
        "prisma_loader": "loaders",
        "saev_loader": "loaders",
        "sparsify_loader": "loaders",
    },
)
