"""Captures a layer's output while the model runs."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from monoloss_plugin.finetuning.mono_layer import MonoLayer, require_module
from monoloss_plugin.kernels.batch import GradientAt

_WRAPPERS = {"base_model", "model", "module"}
"""Under which names wrappers keep the model."""

_COPIES = re.compile(r"\.original_module|\.modules_to_save\.[^.]+")
"""Where peft keeps a layer, and the copies of it that it trains."""


class LatentRecorder:
    """Records the output of a layer at each forward pass, for a loss on it.

    Args:
        model: any; it is not changed but for the hook.
        layer: a module of it, or its path; by default its only :class:`MonoLayer`.

    Raises:
        TypeError: a model or layer of another kind.
        ValueError: no module of that path; no MonoLayer, or several, and none is named; or a model
            that is compiled already, where a new hook may never be called.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with LatentRecorder(model, "1") as recorder:
        ...     logits = model(torch.randn(3, 4))
        ...     recorder.take().shape
        torch.Size([3, 8])
    """

    def __init__(self, model: nn.Module, layer: str | nn.Module | None = None) -> None:
        plain = _uncompiled(model)
        modules = _modules(plain, layer)
        self.gradient_at: GradientAt = "all"
        """Which of the latents pass a gradient on, where the layer tells."""
        if isinstance(modules[0], MonoLayer):
            self.gradient_at = modules[0].gradient_at
        self._name = layer if isinstance(layer, str) else type(modules[0]).__name__
        self._recorded: Tensor | None = None
        self._handles = [module.register_forward_hook(self._record) for module in modules]

    def take(self) -> Tensor:
        """Return the latents (B, M) of the last forward pass, and forget them.

        So that no step takes those of the step before, nor their graph stays in memory.

        Raises:
            RuntimeError: none since they were last taken.
            ValueError: not one vector a sample.
        """
        latents = self.latents
        self._recorded = None
        return latents

    @property
    def latents(self) -> Tensor:
        """The latents (B, M) of the last forward pass; raises as :meth:`take`."""
        latents = self._recorded
        if latents is None:
            raise RuntimeError(
                f"{self._name}: gave no output since it was last taken; is it part of the model's "
                "forward pass (peft trains a copy), and was the loss added before compiling?"
            )
        if latents.ndim != 2:
            self._recorded = None
            raise ValueError(
                f"{self._name}: expected one vector a sample (B, M), got "
                f"{tuple(latents.shape)}; name a layer after the pooling"
            )
        return latents

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model copies its hooks, and them the recorder: without what it has recorded,
        # which belongs to a graph and cannot be copied.
        return {**self.__dict__, "_recorded": None, "_handles": []}

    def remove(self) -> None:
        """Take the hook away."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> LatentRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _record(self, module: nn.Module, inputs: Any, output: Any) -> None:
        found = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(found, Tensor):
            raise TypeError(f"{self._name}: expected a tensor from it, got {type(output).__name__}")
        self._recorded = found


def _uncompiled(model: nn.Module) -> nn.Module:
    require_module(model)
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "model: is compiled already, where a new hook may never be called; add the loss first, "
            "and compile then"
        )
    return model


def _modules(model: nn.Module, layer: str | nn.Module | None) -> list[nn.Module]:
    """Return the layer; where peft has copied it to train, all copies, of which one runs."""
    if isinstance(layer, nn.Module):
        return [layer]
    require_layer(layer)
    named = {name: _plain(name) for name, _ in model.named_modules()}
    if layer is None:
        layers = [n for n, m in model.named_modules() if isinstance(m, MonoLayer)]
        places = {named[name] for name in layers}
        if len(places) != 1:
            found = ", ".join(sorted(places)) or "none"
            raise ValueError(
                f"latents: expected one MonoLayer in the model, found {found}; name a layer, or "
                "put one in with insert_mono_layer or load_with_mono_layer"
            )
        return [model.get_submodule(name) for name in layers]
    exact = [name for name, plain in named.items() if layer in (name, plain)]
    # Where the model is wrapped, as by peft or DDP, its own paths come after the wrapper's.
    wrapped = [name for name, plain in named.items() if _below_wrappers(plain, layer)]
    if not exact and not wrapped:
        some = ", ".join(name for name, _ in list(model.named_children())[:8])
        raise ValueError(f"latents: the model has no module {layer!r}; it has {some}, ...")
    return [model.get_submodule(name) for name in exact or wrapped]


def _below_wrappers(name: str, path: str) -> bool:
    before = name.removesuffix(f".{path}")
    return before != name and set(before.split(".")) <= _WRAPPERS


def _plain(name: str) -> str:
    """Return a module's path without what peft puts in it for its copies."""
    return _COPIES.sub("", name)


def require_layer(layer: Any) -> None:
    """Raise TypeError unless a layer is a module, its path, or left out."""
    if layer is None or isinstance(layer, nn.Module) or (isinstance(layer, str) and layer):
        return
    raise TypeError(f"latents: expected a layer of the model or its path, got {layer!r}")
