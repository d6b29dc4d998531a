"""An encoder, and the choice of which of its outputs become the features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

Output = Literal["pooled", "cls", "mean"]
Inputs = Any
"""What the preprocessing makes of an image: a tensor, or a dict of tensors."""


@dataclass(frozen=True)
class Encoder:
    """A frozen image encoder, which gives one feature vector for each image.

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
    forward: Callable[[Inputs], Tensor]
    """Takes a batch of inputs and returns features (B, d)."""
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
    """Number of tokens before the patches, the class token first; None if it is not known."""
    record: Mapping[str, Any]
    """What is to be recorded beside the library and the name."""
    channels_last: bool = False
    """Whether a map is (B, H, W, d) and not (B, d, H, W)."""
    mode: Literal["RGB", "L"] = "RGB"


def encoder_of(tower: Tower, output: Output | None, layer: str | None) -> Encoder:
    """Make an encoder of a tower; see :func:`load_encoder` for ``output`` and ``layer``.

    Raises:
        ValueError: the tower does not have this output or layer.
    """
    chosen: Output = output or ("pooled" if layer is None else "mean")
    forward = tower.pooled
    if chosen != "pooled":
        states = tower.tokens if layer is None else _output_of_layer(tower, layer)
        if states is None:
            raise ValueError(
                f"output: {tower.record['name']} offers no last hidden state; take 'pooled', or "
                "name a layer"
            )
        forward = partial(_pooled_states, tower, states, chosen)
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
        if states.ndim != 3 or not tower.prefix_tokens:
            raise ValueError("output: this encoder has no class token here; take 'mean'")
        return states[:, 0]
    if states.ndim == 4:
        return torch.mean(states, (1, 2) if tower.channels_last else (2, 3))
    if states.ndim != 3:
        raise ValueError(f"layer: expected tokens or a map, got shape {tuple(states.shape)}")
    if tower.prefix_tokens is None:
        raise ValueError("output: it is not known which tokens are patches here; take 'pooled'")
    patches = states[:, tower.prefix_tokens :]
    # Encoders that take images of any shape add padding, and say where it is.
    mask = inputs.get("pixel_attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None or mask.shape != patches.shape[:2]:
        return patches.mean(1)
    weights: Tensor = mask.to(patches.dtype).unsqueeze(2)
    return (patches * weights).sum(1) / weights.sum(1)


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


def weights_sha256(model: nn.Module) -> str:
    """Return a checksum of all parameters and buffers. Equal weights have equal checksums."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {flat.dtype} {tuple(flat.shape)}".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
