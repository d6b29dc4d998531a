"""The MonoLayer: a linear layer before a classifier, whose outputs are the latents."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from monoloss_plugin._checks import (
    require_at_least,
    require_choice,
    require_flag,
    require_text,
)
from monoloss_plugin._places import kind_of
from monoloss_plugin.kernels.batch import GradientAt

Selection = Literal["topk", "batchtopk"]

_SELECTIONS = (None, *get_args(Selection))
_HEADS = ("classifier", "fc", "head", "heads")
"""Attributes under which Hugging Face's and torchvision's models keep their classifier."""
RECORD = "monoloss"
"""The attribute of a Hugging Face config that says which layer its model has."""


class MonoLayer(nn.Module):
    """A linear layer, with an optional ReLU and an optional Top-k selection.

    MonoLoss on a pretrained model's last features overfits to few images. So the paper puts a
    linear layer before the head, and takes its outputs as the latents.

    Args:
        in_features: d, width of the features.
        width: M, number of latents; by default d.
        relu: make latents non-negative.
        selection: keep the ``k`` largest latents of each sample ("topk"), or the ``k`` times B
            largest of each batch ("batchtopk", in evaluation too). It implies a ReLU.
        k: how many latents the selection keeps.

    Shape:
        (..., d) to (..., M).

    A state dict contains the layer's options, and does not load into a layer with other options.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: a size is below 1, the selection is unknown, or you give only one of
            ``selection`` and ``k``.

    Source: Nasiri-Sarvi et al. 2026, section 4.2.
    """

    def __init__(
        self,
        in_features: int,
        width: int | None = None,
        *,
        relu: bool = False,
        selection: Selection | None = None,
        k: int | None = None,
    ) -> None:
        super().__init__()
        width = in_features if width is None else width
        require_flag(relu, "relu")
        require_at_least(1, in_features, "in_features")
        require_at_least(1, width, "width")
        if selection is not None:
            require_choice(selection, "selection", get_args(Selection))
        if k is not None:
            require_at_least(1, k, "k")
        if (k is None) != (selection is None) or (k is not None and k > width):
            raise ValueError(
                f"k: expected 1 to {width} with a selection, and no k without one, got {k}"
            )
        self.linear = nn.Linear(in_features, width)
        self.relu = relu or selection is not None
        self.selection, self.k = selection, k

    @property
    def options(self) -> dict[str, Any]:
        """Everything that describes such a layer, except the width of its input."""
        width = self.linear.out_features
        return {"width": width, "relu": self.relu, "selection": self.selection, "k": self.k}

    def get_extra_state(self) -> Tensor:
        """Return the options for the state dict: ReLU, selection and k, as integers."""
        return torch.tensor([self.relu, _SELECTIONS.index(self.selection), self.k or 0])

    def set_extra_state(self, state: Tensor) -> None:
        """Check the options in a state dict.

        Raises:
            ValueError: they are not this layer's, so the layer would compute something else.
        """
        saved = options_of(state)
        own = {name: self.options[name] for name in saved}
        if own != saved:
            raise ValueError(
                f"state_dict: was saved from a MonoLayer with {saved}, but this one has {own}; "
                "insert the layer with the saved options, or use load_with_mono_layer"
            )

    @property
    def gradient_at(self) -> GradientAt:
        """Which latents pass a gradient on, for MonoLoss's ``gradient_at``."""
        return "active" if self.relu else "all"

    def forward(self, features: Tensor) -> Tensor:
        """Return the latents."""
        latents: Tensor = self.linear(features)
        if self.relu:
            latents = latents.relu()
        if self.k is None:
            return latents
        if self.selection == "topk":
            values, kept = latents.topk(self.k, dim=-1)
            return torch.zeros_like(latents).scatter(-1, kept, values)
        flat = latents.flatten()
        values, kept = flat.topk(self.k * latents[..., 0].numel())
        return torch.zeros_like(flat).scatter(0, kept, values).view_as(latents)

    def extra_repr(self) -> str:
        """Return the options that the linear layer does not show."""
        chosen = f", selection={self.selection!r}, k={self.k}" if self.selection else ""
        return f"relu={self.relu}{chosen}"


class MonoHead(nn.Linear):
    """A :class:`MonoLayer` and a classifier after it, in the place of the old classifier.

    It is still a linear layer, with ``weight`` and ``bias`` under their old names. The MonoLayer's
    tensors are ``mono.*``. LoRA does not work on it, because its input is wider or narrower than
    ``in_features`` says; train it as a whole.
    """

    def __init__(self, mono: MonoLayer, num_classes: int, bias: bool = True) -> None:
        super().__init__(mono.linear.out_features, num_classes, bias)
        self.mono = mono

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits (..., classes) of features (..., d)."""
        return super().forward(self.mono(input))


def options_of(state: Tensor) -> dict[str, Any]:
    """Return the options that a state dict contains: all except the width."""
    relu, selection, k = (int(number) for number in state)
    return {"relu": bool(relu), "selection": _SELECTIONS[selection], "k": k or None}


def insert_mono_layer(
    model: nn.Module,
    classifier: str | None = None,
    *,
    width: int | None = None,
    relu: bool = False,
    selection: Selection | None = None,
    k: int | None = None,
) -> MonoLayer:
    """Put a MonoLayer before a model's classifier. At first the model computes the same as before.

    The logits stay the same if the layer is wide enough. Without a ReLU it needs at least as many
    latents as there are classes; with one, twice as many. Widths from d to below 2 d with a ReLU
    are exact only for features that are not negative, such as a ResNet's. A selection drops the
    latents that it does not keep.

    Args:
        model: a classifier of timm, Hugging Face or torchvision, or any module whose classifier
            you name. It changes in place. Insert the layer before peft wraps the model.
        classifier: path of the last linear layer, such as ``"fc"`` or ``"head.fc"``. By default
            the one that timm's ``get_classifier`` gives, or else the last linear layer in
            ``classifier``, ``fc``, ``head`` or ``heads``.
        width: number of latents M; by default the features' width.
        relu: make latents non-negative.
        selection: "topk" or "batchtopk", as for :class:`MonoLayer`.
        k: how many latents the selection keeps.

    Returns:
        The layer, which is now in the model.

    Raises:
        TypeError: the model is not a module, or the classifier is not a linear layer or has a
            MonoLayer already.
        ValueError: there is no classifier, or :class:`MonoLayer` refuses an option.

    Warns:
        UserWarning: a Hugging Face model was saved with such a layer and loaded without it.

    Examples:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> x = torch.randn(2, 4)
        >>> before = model(x)
        >>> insert_mono_layer(model, "1", width=8, relu=True)
        MonoLayer(
          relu=True
          (linear): Linear(in_features=4, out_features=8, bias=True)
        )
        >>> bool((model(x) - before).abs().max() < 1e-5)
        True
    """
    require_module(model)
    require_text(classifier, "classifier")
    path = classifier or _find_classifier(model)
    try:
        old = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"classifier: no module {path!r} in the model: {error}") from None
    parts = path.split(".")
    above = [model.get_submodule(".".join(parts[:n])) for n in range(len(parts) + 1)]
    taken: list[nn.Module] = [m for m in above if isinstance(m, (MonoHead, MonoLayer))]
    if taken or not isinstance(old, nn.Linear):
        raise TypeError(
            f"classifier: expected a linear layer as {path!r}, without a MonoLayer, got "
            f"{type((taken or [old])[0]).__name__}"
        )
    layer = MonoLayer(old.in_features, width, relu=relu, selection=selection, k=k)
    warn_of_lost_layer(model)
    head = MonoHead(layer, old.out_features, bias=old.bias is not None)
    head.to(old.weight.device, old.weight.dtype)
    with torch.no_grad():
        _start_as(head, old)
    head.train(old.training)
    setattr(above[-2], parts[-1], head)
    for depth, module in enumerate(above[:-1]):
        if _has_config(module):
            record = {"classifier": ".".join(parts[depth:]), **layer.options}
            setattr(module.config, RECORD, record)
            break
    return layer


def require_module(model: Any) -> None:
    """Raise TypeError unless a model is a module; a class or a path is not."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module, got {kind_of(model)}")


def warn_of_lost_layer(model: nn.Module) -> None:
    """Warn if a Hugging Face model was saved with a layer and loaded without it."""
    lost = _has_config(model) and hasattr(model.config, RECORD)
    if lost and not any(isinstance(module, MonoLayer) for module in model.modules()):
        name = type(model).__name__
        warnings.warn(
            f"{name}: its config says that it was saved with a MonoLayer, but it has none. "
            "from_pretrained does not load the layer's weights (mono.*), so the model computes "
            f"something else. Use load_with_mono_layer({name}, checkpoint)",
            stacklevel=3,
        )


def _has_config(model: nn.Module) -> bool:
    """Return whether a model has a Hugging Face config."""
    return hasattr(getattr(model, "config", None), "to_diff_dict")


def _find_classifier(model: nn.Module) -> str:
    paths: list[str]
    if hasattr(model, "get_classifier"):  # timm
        head: Any = model.get_classifier()  # type: ignore[operator]
        paths = [name for name, module in model.named_modules() if module is head]
    else:
        paths = [
            f"{child}.{name}".rstrip(".")
            for child, head in model.named_children()
            if child in _HEADS
            for name, module in head.named_modules()
            if isinstance(module, nn.Linear)
        ]
    if not paths:
        raise ValueError(
            f"classifier: found no linear layer in {type(model).__name__}, neither with "
            f"get_classifier() nor in {', '.join(_HEADS)}; name one, such as classifier='fc'"
        )
    return paths[-1]


def _start_as(head: MonoHead, old: nn.Linear) -> None:
    """Give a head weights with which it computes what the old classifier did, if it can."""
    linear, d = head.mono.linear, old.in_features
    width, relu = linear.out_features, head.mono.relu
    classifier = old.weight.float()
    if width >= d:
        directions, shares = torch.eye(d, device=classifier.device), classifier
    else:  # the directions by which the classifier tells its classes apart
        left, singular, directions = torch.linalg.svd(classifier, full_matrices=False)
        shares = left * singular
    # With a ReLU, x = relu(x) - relu(-x). From d to 2 d latents there is room for relu(x) only,
    # which is x if features are not negative.
    signs = (1, -1) if relu and (width < d or width >= 2 * d) else (1,)
    rank = min(len(directions), width // len(signs))
    into = torch.cat([sign * directions[:rank] for sign in signs])
    out = torch.cat([sign * shares[:, :rank] for sign in signs], dim=1)
    # More latents get random directions, which the head does not use yet.
    more = width - len(into)
    fresh = nn.functional.normalize(torch.randn(more, d, device=into.device), dim=1)
    linear.weight.copy_(torch.cat([into, fresh]))
    linear.bias.zero_()
    head.weight.copy_(nn.functional.pad(out, (0, more)))
    if old.bias is not None:
        head.bias.copy_(old.bias)
