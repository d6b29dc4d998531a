"""A linear layer before the classification head, whose outputs are the latents."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from monoloss_plugin._checks import require_at_least, require_choice
from monoloss_plugin._places import kind_of
from monoloss_plugin.kernels.batch import GradientAt

Selection = Literal["topk", "batchtopk"]

_SELECTIONS = (None, *get_args(Selection))
_HEADS = ("classifier", "fc", "head", "heads")
"""Where Hugging Face's and torchvision's classifiers keep their last linear layer."""
RECORD = "monoloss"
"""Where a Hugging Face config says which layer its model has."""


class MonoLayer(nn.Module):
    """Linear, then optionally a ReLU, then optionally a Top-k selection.

    Directly on a pretrained model's last features MonoLoss overfits to few images, so the paper
    puts a linear layer before the head and takes its outputs for the latents.

    Args:
        in_features: d, width of the features.
        width: M, number of latents; by default d.
        relu: make latents non-negative.
        selection: keep the ``k`` largest latents of each sample ("topk") or ``k`` times B of a
            batch ("batchtopk", in evaluation too). It implies a ReLU.
        k: how many.

    Shape:
        (..., d) to (..., M).

    A state dict says which options a layer has, and does not load into a layer with other ones.

    Raises:
        TypeError: sizes that are not integers.
        ValueError: sizes below 1, an unknown selection, or ``k`` without one.

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
        for name, size in (
            ("in_features", in_features),
            ("width", width),
            ("k", 0 if k is None else k),
        ):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name}: expected an integer, got {size!r}")
        if not isinstance(relu, bool):
            raise TypeError(f"relu: expected True or False, got {relu!r}")
        require_at_least(1, in_features, "in_features")
        require_at_least(1, width, "width")
        if selection is not None:
            require_choice(selection, "selection", get_args(Selection))
        if (k is None) != (selection is None) or (k is not None and not 1 <= k <= width):
            raise ValueError(
                f"k: with a selection, 1 to {width} latents; without one none, got {k}"
            )
        self.linear = nn.Linear(in_features, width)
        self.relu = relu or selection is not None
        self.selection, self.k = selection, k

    @property
    def options(self) -> dict[str, Any]:
        """What makes such a layer again, besides the width of its input."""
        width = self.linear.out_features
        return {"width": width, "relu": self.relu, "selection": self.selection, "k": self.k}

    def get_extra_state(self) -> Tensor:
        """Return the options as a state dict keeps them: ReLU, selection and k, as integers."""
        return torch.tensor([self.relu, _SELECTIONS.index(self.selection), self.k or 0])

    def set_extra_state(self, state: Tensor) -> None:
        """Check the options of a state dict.

        Raises:
            ValueError: they are not this layer's, so it would compute something else.
        """
        saved = options_of(state)
        own = {name: self.options[name] for name in saved}
        if own != saved:
            raise ValueError(
                f"state_dict: was saved from a MonoLayer with {saved}, this one has {own}; insert "
                "the layer with those options, or use load_with_mono_layer"
            )

    @property
    def gradient_at(self) -> GradientAt:
        """Which latents pass a gradient on, as MonoLoss takes it."""
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
        """What of the options the linear layer does not show."""
        chosen = f", selection={self.selection!r}, k={self.k}" if self.selection else ""
        return f"relu={self.relu}{chosen}"


class MonoHead(nn.Linear):
    """A classifier with a :class:`MonoLayer` before it, in the classifier's own place.

    It is a linear layer still, with ``weight`` and ``bias`` under their old names; new are the
    layer's own tensors, ``mono.*``. Its input has the features' width, not ``in_features``, so it
    is trained as a whole: no LoRA on it.
    """

    def __init__(self, mono: MonoLayer, num_classes: int, bias: bool = True) -> None:
        super().__init__(mono.linear.out_features, num_classes, bias)
        self.mono = mono

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits (..., classes) of features (..., d)."""
        return super().forward(self.mono(input))


def options_of(state: Tensor) -> dict[str, Any]:
    """Return the options that a state dict keeps of a MonoLayer, but for the width."""
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
    """Put a MonoLayer before a model's classifier, so that the model computes what it did.

    Logits are unchanged at the start where the width allows: without ReLU from the number of
    classes on. With one from twice the number of classes on, but for widths from d to 2 d, which
    are exact for features that are not negative, such as a ResNet's. A selection drops what it
    does not keep.

    Args:
        model: a classifier of timm, Hugging Face or torchvision, or any module whose classifier
            you name; it is changed in place. Insert before peft wraps it.
        classifier: path of its last linear layer, such as ``"fc"`` or ``"head.fc"``. By default
            what timm's ``get_classifier`` gives, or else the last linear layer of ``classifier``,
            ``fc``, ``head`` or ``heads``.
        width: number of latents M, as for :class:`MonoLayer`; by default the features' width.
        relu: whether latents are rectified, as there.
        selection: a Top-k selection, as there.
        k: how many it keeps, as there.

    Returns:
        The layer, which is in the model.

    Raises:
        TypeError: not a module, not a linear layer, or one that has a MonoLayer already.
        ValueError: no classifier was found, or options as for :class:`MonoLayer`.

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
    path = _find_classifier(model) if classifier is None else classifier
    if not isinstance(path, str):
        raise TypeError(f"classifier: expected a path in the model, got {type(path).__name__}")
    if not path:
        raise ValueError("classifier: expected a path in the model, such as 'fc', got ''")
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
    """Raise TypeError where a model is something else, such as a class or a path."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module, got {kind_of(model)}")


def warn_of_lost_layer(model: nn.Module) -> None:
    """Warn where a Hugging Face model was saved with a layer that was not loaded."""
    lost = _has_config(model) and hasattr(model.config, RECORD)
    if lost and not any(isinstance(module, MonoLayer) for module in model.modules()):
        name = type(model).__name__
        warnings.warn(
            f"{name}: its config says that it was saved with a MonoLayer, and it has none: "
            "from_pretrained does not load the layer's weights (mono.*), so it computes something "
            f"else. Use load_with_mono_layer({name}, checkpoint)",
            stacklevel=3,
        )


def _has_config(model: nn.Module) -> bool:
    """Say whether a model keeps a config of Hugging Face's beside its weights."""
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
            f"classifier: {type(model).__name__} has no one linear layer that get_classifier() "
            f"gives, and none in {', '.join(_HEADS)}; name one, such as classifier='fc'"
        )
    return paths[-1]


def _start_as(head: MonoHead, old: nn.Linear) -> None:
    """Give a head weights with which it computes what the classifier did, where it can."""
    linear, d = head.mono.linear, old.in_features
    width, relu = linear.out_features, head.mono.relu
    classifier = old.weight.float()
    into = torch.zeros(width, d, device=classifier.device)
    out = torch.zeros(len(classifier), width, device=classifier.device)
    if width >= d:
        directions, shares = torch.eye(d, device=classifier.device), classifier
    else:  # those that the classifier tells its classes apart by
        left, singular, directions = torch.linalg.svd(classifier, full_matrices=False)
        shares = left * singular
    # With a ReLU, x is relu(x) less relu(-x); at the features' own width it is left at relu(x),
    # which is x where they are not negative.
    signs = (1, -1) if relu and (width < d or width >= 2 * d) else (1,)
    rank = min(len(directions), width // len(signs))
    used = 0
    for sign in signs:
        into[used : used + rank] = sign * directions[:rank]
        out[:, used : used + rank] = sign * shares[:, :rank]
        used += rank
    if width > used:  # more latents see directions of their own, and wait for the head to use them
        fresh = torch.randn(width - used, d, device=into.device)
        into[used:] = nn.functional.normalize(fresh, dim=1)
    linear.weight.copy_(into)
    linear.bias.zero_()
    head.weight.copy_(out)
    if old.bias is not None:
        head.bias.copy_(old.bias)
