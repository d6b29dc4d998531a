"""Load models that were saved with a MonoLayer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from monoloss_plugin._places import local_hint, local_path, require_place
from monoloss_plugin.finetuning.mono_layer import (
    RECORD,
    insert_mono_layer,
    options_of,
    require_module,
)

Model = TypeVar("Model", bound=nn.Module)

_WEIGHT = ".mono.linear.weight"


def load_with_mono_layer(
    model: Model | type[Model], checkpoint: Mapping[str, Tensor] | str | Path, **options: Any
) -> Model:
    """Load a model together with the MonoLayer that it was saved with.

    Args:
        model: for Hugging Face a class with ``from_pretrained``, which may be an Auto class.
            Otherwise the model without the layer, such as
            ``timm.create_model("resnet50", num_classes=10)``; it changes in place.
        checkpoint: for Hugging Face a folder (a ``Path``, or a string that starts with ``./``,
            ``../``, ``/`` or ``~``), or a name on the Hub. Otherwise a state dict, such as
            ``timm.models.load_state_dict(path)`` gives.
        options: passed on to ``from_pretrained``.

    Returns:
        The model, with the layer's options and all weights of the checkpoint.

    Raises:
        TypeError: the model or the checkpoint has the wrong type.
        ValueError: the checkpoint has no MonoLayer.
        RuntimeError: the weights do not fit the model.

    Examples:
        >>> def build():
        ...     return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> model = build()
        >>> layer = insert_mono_layer(model, "1", width=8, relu=True)
        >>> again = load_with_mono_layer(build(), model.state_dict())
        >>> x = torch.randn(2, 4)
        >>> torch.equal(again(x), model(x))
        True
    """
    if isinstance(model, type) and hasattr(model, "from_pretrained"):
        loaded: Model = _from_pretrained(model, checkpoint, options)
        return loaded
    require_module(model)
    assert isinstance(model, nn.Module)
    if not isinstance(checkpoint, Mapping) or options:
        raise TypeError(
            "checkpoint: expected a state dict for a model, such as timm.models.load_state_dict("
            f"path) gives, got {', '.join([type(checkpoint).__name__, *options])}; for Hugging "
            "Face give the model's class"
        )
    paths = [key.removesuffix(_WEIGHT) for key in checkpoint if key.endswith(_WEIGHT)]
    if len(paths) != 1:
        raise ValueError(f"checkpoint: expected one key ...{_WEIGHT}, found {len(paths)}")
    width = len(checkpoint[paths[0] + _WEIGHT])
    saved = options_of(checkpoint[f"{paths[0]}.mono._extra_state"])
    insert_mono_layer(model, paths[0], width=width, **saved)
    model.load_state_dict(checkpoint)
    return model


def _from_pretrained(model: Any, checkpoint: Any, options: dict[str, Any]) -> Any:
    """Have Hugging Face load into a subclass that inserts the layer when it is made."""
    require_place(checkpoint, "checkpoint", "a folder or a name on the Hub")
    folder = local_path(checkpoint)
    if folder is None and (hint := local_hint(checkpoint)):
        raise ValueError(f"checkpoint: {checkpoint!r} is a name on the Hub{hint}")
    checkpoint = checkpoint if folder is None else str(folder)
    plain = model
    if hasattr(model, "from_config"):  # an Auto class, which chooses the class by the config
        from transformers import AutoConfig

        config, _ = AutoConfig.from_pretrained(
            checkpoint, return_unused_kwargs=True, **{**options, "trust_remote_code": False}
        )
        with torch.device("meta"):
            plain = type(model.from_config(config, trust_remote_code=False))

    class WithMonoLayer(plain):  # type: ignore[misc,valid-type]
        def __init__(self, config: Any, *rest: Any, **more: Any) -> None:
            super().__init__(config, *rest, **more)
            record = self.config.__dict__.pop(RECORD, None)
            if record is None:
                raise ValueError(f"checkpoint: {str(checkpoint)!r} was not saved with a MonoLayer")
            insert_mono_layer(self, **record)

    WithMonoLayer.__name__ = plain.__name__  # the host derives the loss from it
    WithMonoLayer.__module__ = plain.__module__
    loaded, report = WithMonoLayer.from_pretrained(checkpoint, output_loading_info=True, **options)
    missing = [key for key in report["missing_keys"] if key.endswith(_WEIGHT)]
    if missing:
        raise ValueError(f"checkpoint: {str(checkpoint)!r} has no {missing[0]}")
    loaded.__class__ = plain
    return loaded
