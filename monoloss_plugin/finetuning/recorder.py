"""Record a layer's output while the model runs."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from monoloss_plugin.finetuning.mono_layer import MonoLayer, require_module
from monoloss_plugin.kernels.batch import GradientAt

_WRAPPERS = {"base_model", "model", "module"}
"""Names under which wrappers, such as peft and DDP, keep the model."""

_COPIES = re.compile(r"\.original_module|\.modules_to_save\.[^.]+")
"""What peft adds to the path of a layer that it copies to train."""


class LatentRecorder:
    """Records the output of a layer at each forward pass, for a loss on it.

    Args:
        model: any module; it only gets a hook.
        layer: a module in it, or its path; by default its only :class:`MonoLayer`.

    Raises:
        TypeError: the model or the layer has the wrong type.
        ValueError: there is no module of that path; you name no layer, and the model does not have
            exactly one MonoLayer; or the model is compiled already, and may never call a new hook.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with LatentRecorder(model, "1") as recorder:
        ...     logits = model(torch.randn(3, 4))
        ...     recorder.take().shape
        torch.Size([3, 8])
    """

    def __init__(self, model: nn.Module, layer: str | nn.Module | None = None) -> None:
        require_module(model)
        require_layer(layer)
        if hasattr(model, "_orig_mod"):
            raise ValueError(
                "model: it is compiled already, so a new hook may never be called; add the loss "
                "first, then compile"
            )
        modules = _find_layer(model, layer)
        self.gradient_at: GradientAt = "all"
        """Which latents pass a gradient on; all of them, if the layer does not say."""
        if isinstance(modules[0], MonoLayer):
            self.gradient_at = modules[0].gradient_at
        self._name = layer if isinstance(layer, str) else type(modules[0]).__name__
        self._recorded: Tensor | None = None
        self.runs = 0
        """How often the layer ran since its output was last taken."""
        self.gave_several = False
        """Its last output was a tuple of several tensors, of which the first is recorded."""
        self._handles = [module.register_forward_hook(self._record) for module in modules]

    def forget(self) -> None:
        """Forget what was recorded."""
        self._recorded, self.runs = None, 0

    def take_any(self) -> Tensor:
        """Return what the layer gave in the last forward pass, of any shape, and forget it.

        Raises:
            RuntimeError: there was no forward pass since the last call.
        """
        recorded = self._recorded
        self.forget()
        if recorded is None:
            raise RuntimeError(
                f"{self._name}: gave no output since it was last taken; is it part of the model's "
                "forward pass (peft trains a copy), and did you add the loss before compiling?"
            )
        return recorded

    def take(self) -> Tensor:
        """Return the latents (B, M) of the last forward pass, and forget them.

        So a step never gets the latents of the step before, and their graph is freed.

        Raises:
            RuntimeError: there was no forward pass since the last call.
            ValueError: the layer does not give one vector for each sample.
        """
        latents = self.take_any()
        if latents.ndim != 2:
            raise ValueError(
                f"{self._name}: expected one vector a sample (B, M), got "
                f"{tuple(latents.shape)}; name a layer after the pooling"
            )
        return latents

    def remove(self) -> None:
        """Take the hook away."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> LatentRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model copies its hooks, and with them the recorder. What it has recorded
        # belongs to a graph and cannot be copied.
        return {**self.__dict__, "_recorded": None, "_handles": []}

    def _record(self, module: nn.Module, inputs: Any, output: Any) -> None:
        found = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(found, Tensor):
            raise TypeError(f"{self._name}: expected a tensor from it, got {type(output).__name__}")
        self._recorded = found
        self.runs += 1
        self.gave_several = isinstance(output, (tuple, list)) and len(output) > 1


def require_layer(layer: Any) -> None:
    """Raise TypeError unless a layer is a module, its path, or None."""
    if layer is None or isinstance(layer, nn.Module) or (isinstance(layer, str) and layer):
        return
    raise TypeError(f"latents: expected a layer of the model or its path, got {layer!r}")


def _find_layer(model: nn.Module, layer: str | nn.Module | None) -> list[nn.Module]:
    """Return the layer. If peft has copied it to train, return every copy; one of them runs."""
    if isinstance(layer, nn.Module):
        return [layer]
    modules = dict(model.named_modules())
    paths = {name: _COPIES.sub("", name) for name in modules}  # as they were before peft
    if layer is None:
        names = [name for name, module in modules.items() if isinstance(module, MonoLayer)]
        places = {paths[name] for name in names}
        if len(places) != 1:
            raise ValueError(
                "latents: expected one MonoLayer in the model, found "
                f"{', '.join(sorted(places)) or 'none'}; name a layer, or put one in with "
                "insert_mono_layer or load_with_mono_layer"
            )
        return [modules[name] for name in names]
    exact = [name for name, path in paths.items() if layer in (name, path)]
    wrapped = [name for name, path in paths.items() if _is_below_wrappers(path, layer)]
    if not exact and not wrapped:
        some = ", ".join(name for name, _ in list(model.named_children())[:8])
        raise ValueError(f"latents: the model has no module {layer!r}; it has {some}, ...")
    return [modules[name] for name in exact or wrapped]


def _is_below_wrappers(path: str, layer: str) -> bool:
    """Return whether only wrappers' names stand before the layer's own path."""
    before = path.removesuffix(f".{layer}")
    return before != path and set(before.split(".")) <= _WRAPPERS
