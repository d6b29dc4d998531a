"""See what latents respond to: the images that activate them, and names for them.

It needs the extra ``report``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from monoloss_plugin._later import later

if TYPE_CHECKING:
    from monoloss_plugin.gallery.grid import LatentGrid
    from monoloss_plugin.gallery.maps import heat_maps
    from monoloss_plugin.gallery.names import LatentNames, name_latents, names_from_means
    from monoloss_plugin.gallery.pictures import Pictures, open_pictures
    from monoloss_plugin.gallery.samples import ActivatingSamples, activating_samples
    from monoloss_plugin.gallery.show import ActivatingImage, show_latents, top_images

__all__ = [
    "ActivatingImage",
    "ActivatingSamples",
    "LatentGrid",
    "LatentNames",
    "Pictures",
    "activating_samples",
    "heat_maps",
    "name_latents",
    "names_from_means",
    "open_pictures",
    "show_latents",
    "top_images",
]

__getattr__, __dir__ = later(
    __name__,
    {
        "ActivatingImage": "show",
        "ActivatingSamples": "samples",
        "LatentGrid": "grid",
        "LatentNames": "names",
        "Pictures": "pictures",
        "activating_samples": "samples",
        "heat_maps": "maps",
        "name_latents": "names",
        "names_from_means": "names",
        "open_pictures": "pictures",
        "show_latents": "show",
        "top_images": "show",
    },
)
