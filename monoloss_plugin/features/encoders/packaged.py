"""Pretrained weights that come as a Python package, so that they need no Hub."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


class WeightsPackage(NamedTuple):
    """A package that holds one file of weights, a state dict."""

    name: str
    """What pip calls it."""
    version: str
    file: str
    """The file's path in the package's installation."""
    sha256: str
    """Checksum of the file."""

    def read(self) -> dict[str, Tensor]:
        """Return the weights. Nothing of the package is imported, and no code in the file is run.

        Raises:
            ModuleNotFoundError: the package is not installed.
            ValueError: the file is missing, or not the one that is expected.
        """
        try:
            found = Path(str(distribution(self.name).locate_file(self.file)))
        except PackageNotFoundError:
            raise ModuleNotFoundError(
                f"needs {self.name}, which is not installed: pip install {self.name}",
                name=self.name,
            ) from None
        again = f"pip install --force-reinstall {self.name}=={self.version}"
        if not found.is_file():
            raise ValueError(f"encoder: {self.name} is installed without its {self.file}: {again}")
        content = found.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != self.sha256:
            raise ValueError(
                f"encoder: {found} is not the file that this package knows: its SHA-256 is "
                f"{digest}, not {self.sha256}: {again}"
            )
        state: dict[str, Tensor] = torch.load(BytesIO(content), "cpu", weights_only=True)
        return state


def load_in_order(model: nn.Module, given: dict[str, Tensor]) -> None:
    """Load a state dict whose names differ from the model's, but whose tensors have its order.

    Raises:
        ValueError: the tensors do not have the model's number, last names and shapes.
    """
    wanted = model.state_dict()
    if not _kinds(given) == _kinds(wanted):
        raise ValueError("its weights do not fit the model that this version of timm makes")
    model.load_state_dict(dict(zip(wanted, given.values(), strict=True)))


def _kinds(state: dict[str, Tensor]) -> list[tuple[str, torch.Size]]:
    """Return what each tensor is, such as ("running_mean", its shape)."""
    return [(name.rpartition(".")[2], tensor.shape) for name, tensor in state.items()]
