"""An encoder, and the choice of which of its outputs become the features."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Output = Literal["pooled", "cls", "mean", "patches", "cls+patches"]
Inputs = Any
"""What the preprocessing makes of an image: a tensor, or a dict of tensors."""


class PatchTokens(NamedTuple):
    """The patches of B images, as an encoder gives them."""

    features: Tensor
    """(B, P, d), the patches of each image, row after row of its grid."""
    grid: tuple[int, int] | Tensor
    """Height and width of every image's grid, in patches; (B, 2) integers if images differ."""
    present: Tensor | None = None
    """(B, P) bool: False where there is padding; None if there is none."""
    class_token: Tensor | None = None
    """(B, d), if it is to be kept beside the patches."""


@dataclass(frozen=True)
class Encoder:
    """A frozen image encoder, which gives one feature vector for each image, or its patches.

    :func:`load_encoder` makes one from a name. To use a model of your own, pass its four parts.

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
    """The module to move to the device. The record gets a checksum of its weights."""
    preprocess: Callable[[Any], Inputs]
    """Takes a PIL image and returns the encoder's input, without a batch dimension."""
    forward: Callable[[Inputs], Any]
    """Takes a batch of inputs and returns features (B, d), or their :class:`PatchTokens`."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What the feature set says about its encoder: anything that JSON can hold."""
    mode: Literal["RGB", "L"] = "RGB"
    """Images are converted to this mode before the preprocessing."""


@dataclass(frozen=True)
class Tower:
    """The image part of a model, as its own library loads it."""

    model: nn.Module
    preprocess: Callable[[Any], Inputs]
    pooled: Callable[[Inputs], Tensor]
    """Returns the library's own image embedding (B, d)."""
    tokens: Callable[[Inputs], Tensor] | None
    """Returns the last hidden state, tokens (B, T, d) or a map; None if the model has none."""
    prefix_tokens: int | None
    """Number of tokens before the patches; None if it is not known."""
    record: Mapping[str, Any]
    """What is to be recorded beside the library and the name."""
    channels_last: bool = False
    """Whether a map is (B, H, W, d) and not (B, d, H, W)."""
    mode: Literal["RGB", "L"] = "RGB"
    class_token: bool = True
    """Whether the first of the tokens before the patches, if there are any, is a class token."""
    patch_size: tuple[int, int] | None = None
    """Height and width of a patch in pixels, of the model's first layer; None if not known."""


def encoder_of(tower: Tower, output: Output | None, layer: str | None) -> Encoder:
    """Make an encoder of a tower; see :func:`load_encoder` for ``output`` and ``layer``.

    Raises:
        ValueError: the tower does not have this output or layer.
    """
    chosen: Output = output or ("pooled" if layer is None else "mean")
    forward: Callable[[Inputs], Any] = tower.pooled
    if chosen != "pooled":
        states = tower.tokens if layer is None else _output_of_layer(tower, layer)
        if states is None:
            raise ValueError(
                f"output: {tower.record['name']} offers no last hidden state; take 'pooled', or "
                "name a layer"
            )
        make = _patches_of_states if chosen in ("patches", "cls+patches") else _pooled_states
        forward = partial(make, tower, states, chosen)
    elif layer is not None:
        raise ValueError("output: 'pooled' is the encoder's end; a layer takes 'cls' or 'mean'")
    checksum = weights_sha256(tower.model)
    record = {**tower.record, "output": chosen, "layer": layer, "weights_sha256": checksum}
    return Encoder(tower.model, tower.preprocess, forward, record, tower.mode)


def _pooled_states(
    tower: Tower, states_of: Callable[[Inputs], Tensor], how: Output, inputs: Inputs
) -> Tensor:
    """Return one vector (B, d) for each image from its hidden states."""
    states = states_of(inputs)
    if states.ndim == 2:
        return states
    if how == "cls":
        if states.ndim != 3 or not tower.prefix_tokens or not tower.class_token:
            raise ValueError("output: this encoder has no class token here; take 'mean'")
        return states[:, 0]
    if states.ndim == 4:
        return torch.mean(states, (1, 2) if tower.channels_last else (2, 3))
    if states.ndim != 3:
        raise ValueError(f"layer: expected tokens or a map, got shape {tuple(states.shape)}")
    if tower.prefix_tokens is None:
        raise ValueError("output: it is not known which tokens are patches here; take 'pooled'")
    patches = states[:, tower.prefix_tokens :]
    present = _present(inputs, patches)
    return patches.mean(1) if present is None else mean_of_patches(patches, present)


def mean_of_patches(patches: Tensor, present: Tensor) -> Tensor:
    """Return the mean (B, d) of the patches (B, P, d) that are ``present`` (B, P)."""
    weights = present.to(patches.dtype).unsqueeze(2)
    total: Tensor = (patches * weights).sum(1)
    return total / weights.sum(1)


def _present(inputs: Inputs, patches: Tensor) -> Tensor | None:
    """Return which patches (B, P) are no padding; None if there is none.

    Encoders that take images of any shape add padding, and say where it is.
    """
    mask = inputs.get("pixel_attention_mask") if isinstance(inputs, Mapping) else None
    return None if mask is None or mask.shape != patches.shape[:2] else mask.bool()


def _patches_of_states(
    tower: Tower, states_of: Callable[[Inputs], Tensor], how: Output, inputs: Inputs
) -> PatchTokens:
    """Return the patches of each image from its hidden states."""
    states = states_of(inputs)
    if states.ndim not in (3, 4):
        raise ValueError(f"output: {how!r} needs tokens or a map, got shape {tuple(states.shape)}")
    if states.ndim == 4:
        prefix, moved = 0, states if tower.channels_last else states.permute(0, 2, 3, 1)
        tokens = PatchTokens(moved.flatten(1, 2), (moved.shape[1], moved.shape[2]))
    elif tower.prefix_tokens is None:
        raise ValueError("output: it is not known which tokens are patches here; take 'pooled'")
    else:
        prefix, grid, present = _grid_of_tokens(tower, inputs, states)
        tokens = PatchTokens(states[:, prefix:], grid, present)
    if how == "patches":
        return tokens
    if not (prefix and tower.class_token):
        raise ValueError("output: this encoder has no class token here; take 'patches'")
    return tokens._replace(class_token=states[:, 0])


def _grid_of_tokens(
    tower: Tower, inputs: Inputs, states: Tensor
) -> tuple[int, tuple[int, int] | Tensor, Tensor | None]:
    """Return how many tokens (B, T, d) come before the patches, the grid, and which are no padding.

    Raises:
        ValueError: the grid is not known.
    """
    before = tower.prefix_tokens or 0
    present = _present(inputs, states[:, before:])
    if isinstance(inputs, Mapping) and "spatial_shapes" in inputs and present is not None:
        return before, inputs["spatial_shapes"], present
    pixels = inputs.get("pixel_values") if isinstance(inputs, Mapping) else inputs
    image = tuple(pixels.shape[-2:]) if isinstance(pixels, Tensor) and pixels.ndim == 4 else None
    for prefix in (before, 0):  # a layer may lie before the class token is added
        count = states.shape[1] - prefix
        for grid in _possible_grids(tower.patch_size, image, count):
            if grid[0] * grid[1] == count > 0:
                return prefix, grid, present
    count = states.shape[1] - before
    side = math.isqrt(max(count, 0))
    if side * side == count > 0 and (image is None or image[0] == image[1]):
        return before, (side, side), present
    size = "" if image is None else f" of an image of {image[0]} x {image[1]} pixels"
    raise ValueError(
        f"output: the grid of {count} patches{size} is not known; pass an Encoder of your own, "
        "whose forward returns PatchTokens"
    )


def _possible_grids(
    patch: tuple[int, int] | None, image: tuple[int, ...] | None, count: int
) -> Iterator[tuple[int, int]]:
    """Yield grids that an image of so many pixels may have: by its patches' size, or a stride."""
    if image is None:
        return
    if patch is not None:
        yield image[0] // patch[0], image[1] // patch[1]
        yield -(-image[0] // patch[0]), -(-image[1] // patch[1])  # the image was padded
    # Later layers may join patches; they have one stride in both directions.
    stride = math.isqrt(image[0] * image[1] // max(count, 1))
    if stride and not (image[0] % stride or image[1] % stride):
        yield image[0] // stride, image[1] // stride


class _LayerReached(Exception):  # noqa: N818  # it ends a forward pass, and is no error
    """The forward pass has reached the layer, and need not go on."""


def _output_of_layer(tower: Tower, layer: str) -> Callable[[Inputs], Tensor]:
    """Return a function that runs the tower up to a module and returns the module's output."""
    modules = dict(tower.model.named_modules())
    if layer not in modules or not layer:
        near = get_close_matches(layer, modules, n=3, cutoff=0.3)
        raise ValueError(f"layer: no module {layer!r} in this encoder; near: {', '.join(near)}")

    def states(inputs: Inputs) -> Tensor:
        reached: list[Tensor] = []

        def stop(_module: nn.Module, _args: Any, output: Any) -> None:
            reached.append(output if isinstance(output, Tensor) else output[0])
            raise _LayerReached

        handle = modules[layer].register_forward_hook(stop)
        try:
            tower.pooled(inputs)
        except _LayerReached:
            return reached[0]
        finally:
            handle.remove()
        raise ValueError(f"layer: the encoder's forward pass never reaches {layer!r}")

    return states


def as_pair(size: Any) -> tuple[int, int] | None:
    """Return a size in pixels as height and width; None if it is none."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, (tuple, list)) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def weights_sha256(model: nn.Module) -> str:
    """Return a checksum of all parameters and buffers. Equal weights have equal checksums."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {flat.dtype} {tuple(flat.shape)}".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
