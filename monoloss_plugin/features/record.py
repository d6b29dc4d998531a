"""What made a feature set: the encoder, the images and the settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_origin, get_type_hints

from monoloss_plugin._places import kind_of


@dataclass(frozen=True)
class FeatureRecord:
    """How the features of a set were made. A field that is not known is empty or None."""

    encoder: dict[str, Any] = field(default_factory=dict)
    """Library, name, weights and preprocessing, in the words of each library."""
    source: dict[str, Any] = field(default_factory=dict)
    """Kind, name, split and checksums of the images."""
    dtype: str | None = None
    """Type of the stored features."""
    autocast: str | None = None
    """Precision in which the encoder ran; None for float32."""
    patches: dict[str, Any] = field(default_factory=dict)
    """Of a patch set: ``grid``, its height and width (None if images have different ones);
    ``kept``, how many patches of each image were kept (None for all); and whether there is a
    ``class_token``. Empty for a set of one feature for each image."""
    width: int | None = None
    """d, the length of a feature vector."""
    rows: int | None = None
    """N, the number of images with features."""
    source_rows: int | None = None
    """Number of images in the source, readable or not."""
    unreadable: int = 0
    """Number of images that were left out."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries that made the features."""
    columns: dict[str, str] = field(default_factory=dict)
    """Type of each column, if the set was published."""

    @classmethod
    def of(cls, content: Any) -> FeatureRecord:
        """Make a record from a dict. Entries with other names or types are left out.

        Raises:
            TypeError: ``content`` is neither a dict nor a record.
        """
        if isinstance(content, FeatureRecord):
            return content
        if not isinstance(content, Mapping):
            raise TypeError(f"record: expected a dict, got {kind_of(content)}")
        known: dict[str, Any] = {}
        for name, kind in get_type_hints(cls).items():
            plain = dict if get_origin(kind) is dict else kind  # isinstance takes no dict[str, Any]
            if name in content and isinstance(content[name], plain):
                known[name] = content[name]
        return cls(**known)

    def of_pooled(self) -> FeatureRecord:
        """Return the record of the means over the patches of a patch set."""
        encoder = {**self.encoder, "output": "mean"} if self.encoder else {}
        return replace(self, encoder=encoder, patches={})

    def describe_patches(self) -> str:
        """Say which patches each image of a patch set has; an empty text for another set."""
        if not self.patches:
            return ""
        grid, kept = self.patches.get("grid"), self.patches.get("kept")
        said = [f"a grid of {grid[0]} x {grid[1]}" if grid else "grids of several sizes"]
        said += [f"{kept} patches kept of each image"] if kept else []
        said += ["with the class token"] if self.patches.get("class_token") else []
        return ", ".join(said)

    @classmethod
    def from_json(cls, text: str) -> FeatureRecord:
        """Make a record from JSON; an empty record if the text is not a JSON object."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError:
            return cls()
        return cls.of(content) if isinstance(content, dict) else cls()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are known, as a dict that JSON can hold."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}
