"""What extraction asks of an encoder, and how a tower's outputs become one vector an image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Output = Literal["pooled", "cls", "mean"]
Inputs = Any
"""What an encoder's preprocessing makes of an image: a tensor, or a dict of tensors."""


@dataclass(frozen=True)
class Encoder:
    """A frozen image encoder: from images to one feature vector each.

    :func:`load_encoder` makes one from a name; a model of your own becomes one by its four parts.

    Examples:
        >>> from torchvision.transforms.functional import pil_to_tensor
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16))
        >>> encoder = Encoder(
        ...     model=model,
        ...     preprocess=lambda image: pil_to_tensor(image.resize((8, 8))) / 255,
        ...     forward=model,
        ...     record={"name": "a random projection"},
        ... )
    """

    model: nn.Module
    """What is moved to the device; its parameters are hashed into the record."""
    preprocess: Callable[[Any], Inputs]
    """From a PIL image to the encoder's input of that image, without a batch dimension."""
    forward: Callable[[Inputs], Tensor]
    """From a batch of inputs to features (B, d)."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What the feature set says of its encoder; anything JSON can hold."""
    mode: Literal["RGB", "L"] = "RGB"
    """What images are converted to before the preprocessing."""


@dataclass(frozen=True)
class Tower:
    """A vision tower as its own library loads it."""

    model: nn.Module
    preprocess: Callable[[Any], Inputs]
    pooled: Callable[[Inputs], Tensor]
    """The image embedding that the library itself offers (B, d)."""
    tokens: Callable[[Inputs], Tensor] | None
    """Its last hidden state: tokens (B, T, d) or a map (B, ...); None where it offers none."""
    prefix_tokens: int | None
    """How many tokens come before the patches', the class token first; None if not known."""
    record: Mapping[str, Any]
    channels_last: bool = False
    """Whether maps are (B, H, W, d) instead of (B, d, H, W)."""
    mode: Literal["RGB", "L"] = "RGB"


def encoder_of(tower: Tower, output: Output | None, layer: str | None) -> Encoder:
    """Choose what of a tower becomes the features.

    Raises:
        ValueError: an output that the tower does not have, or an unknown layer.
    """
    if layer is None and output in (None, "pooled"):
        run: Callable[[Inputs], Tensor] = tower.pooled
        chosen: Output = "pooled"
    else:
        if output == "pooled":
            raise ValueError("output: 'pooled' is the encoder's end; a layer takes 'cls' or 'mean'")
        chosen = output or "mean"
        states = _tapped(tower, layer) if layer is not None else tower.tokens
        if states is None:
            raise ValueError(
                f"output: {tower.record['name']} offers no last hidden state; take 'pooled', or "
                "name a layer"
            )
        run = _Pooling(states, chosen, tower)
    record = {
        **tower.record,
        "output": chosen,
        "layer": layer,
        "weights_sha256": weights_sha256(tower.model),
    }
    return Encoder(tower.model, tower.preprocess, run, record, tower.mode)


class _Pooling:
    """One vector an image from a hidden state."""

    def __init__(self, states: Callable[[Inputs], Tensor], how: Output, tower: Tower) -> None:
        self.states, self.how, self.tower = states, how, tower

    def __call__(self, inputs: Inputs) -> Tensor:
        states: Tensor = self.states(inputs)
        if states.ndim == 2:
            return states
        if self.how == "cls":
            if states.ndim != 3 or not self.tower.prefix_tokens:
                raise ValueError("output: this encoder has no class token here; take 'mean'")
            return states[:, 0]
        if states.ndim == 4:
            return torch.mean(states, (1, 2) if self.tower.channels_last else (2, 3))
        if states.ndim != 3:
            raise ValueError(f"layer: expected tokens or a map, got shape {tuple(states.shape)}")
        if self.tower.prefix_tokens is None:
            raise ValueError("output: the class token's place is not known here; take 'pooled'")
        patches = states[:, self.tower.prefix_tokens :]
        # Encoders of images of any shape pad their patches, and say which are padding.
        mask = inputs.get("pixel_attention_mask") if isinstance(inputs, Mapping) else None
        if mask is None or mask.shape != patches.shape[:2]:
            return patches.mean(1)
        weights: Tensor = mask.to(patches.dtype).unsqueeze(2)
        return (patches * weights).sum(1) / weights.sum(1)


class _Reached(Exception):  # noqa: N818  # ends a forward pass, and is no error
    """The layer that was asked for has given its output."""


def _tapped(tower: Tower, layer: str) -> Callable[[Inputs], Tensor]:
    """Return a forward pass that ends at a named module, with that module's output."""
    modules = dict(tower.model.named_modules())
    if layer not in modules or not layer:
        near = get_close_matches(layer, modules, n=3, cutoff=0.3)
        raise ValueError(f"layer: no module {layer!r} in this encoder; near: {', '.join(near)}")

    def states(inputs: Inputs) -> Tensor:
        reached: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            reached.append(output if isinstance(output, Tensor) else output[0])
            raise _Reached

        handle = modules[layer].register_forward_hook(keep)
        try:
            tower.pooled(inputs)
        except _Reached:
            return reached[0]
        finally:
            handle.remove()
        raise ValueError(f"layer: the encoder's forward pass never reaches {layer!r}")

    return states


def name_of(name: str) -> str:
    """Return a library's name of an encoder; of a local folder, the folder's own name alone."""
    path = name.removeprefix("local-dir:")
    return Path(path).name if path != name or path.startswith("/") else name


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with lists for tuples, as JSON gives them back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


def weights_sha256(model: nn.Module) -> str:
    """Return a checksum of every parameter and buffer by name: equal weights, equal checksum."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {flat.dtype} {tuple(flat.shape)}".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
