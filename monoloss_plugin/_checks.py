"""What every public function checks of its arguments, and rows from leading dimensions."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from monoloss_plugin._places import kind_of

_MOST = 2**31 - 1
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def visible(text: object) -> str:
    """Return a text of others in one line, with escapes for what a terminal would obey."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
        for c in " ".join(str(text).splitlines())
    )


def as_tensor(value: Any, name: str) -> Tensor:
    """Return a tensor as it is, and a numpy array or a list of numbers as a tensor.

    Raises:
        TypeError: anything else; the error names the argument.
        ValueError: a tensor without values, on the meta device.
    """
    if isinstance(value, Tensor):
        if value.is_meta:
            raise ValueError(f"{name}: expected a tensor with values, got one on the meta device")
        return value
    if isinstance(value, (list, tuple)) or hasattr(value, "__array_interface__"):
        try:
            with warnings.catch_warnings():
                # Nothing here writes to what it is given.
                warnings.filterwarnings("ignore", message=".*not writable.*")
                return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(
                f"{name}: expected a tensor, a numpy array or a list of numbers, got "
                f"{type(value).__name__} that is none: {error}"
            ) from None
    raise TypeError(
        f"{name}: expected a tensor, a numpy array or a list of numbers, got {kind_of(value)}"
    )


def as_labels(value: Any, name: str = "labels") -> Tensor:
    """Return integer classes, of a tensor, a numpy array or a list, as a tensor of integers.

    Raises:
        TypeError: not integers.
    """
    tensor = as_tensor(value, name)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {tensor.dtype}")
    return tensor


def as_rows(value: Any, name: str, *, keep_sparse: bool = False) -> Tensor:
    """Return a tensor (..., width), a numpy array or a list as rows (N, width), dense.

    Only shape and dtype are looked at, never values, so that no check makes an accelerator wait.

    Args:
        value: (..., width).
        name: of the argument, for the error.
        keep_sparse: leave sparse COO rows as they are.

    Raises:
        TypeError: not floating-point numbers of 16 bits or more.
        ValueError: fewer than two dimensions.
    """
    tensor = as_tensor(value, name)
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected a floating-point tensor of 16 bits or more, got {tensor.dtype}"
        )
    if tensor.ndim < 2:
        raise ValueError(
            f"{name}: expected at least 2 dimensions (samples, width), got shape "
            f"{tuple(tensor.shape)}"
        )
    plain = tensor.layout == torch.sparse_coo and tensor.ndim == tensor.sparse_dim() == 2
    if keep_sparse and plain:
        return tensor
    # A COO tensor's _values() carries no gradient; to_dense() does.
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return dense.flatten(0, -2)


def paired_rows(
    latents: Any, embeddings: Any, *, keep_sparse: bool = False
) -> tuple[Tensor, Tensor]:
    """Return latents as (N, M) and embeddings as (N, d), one row for each sample.

    With ``keep_sparse``, latents that are sparse COO stay so.

    Raises:
        TypeError, ValueError: as :func:`as_rows`, or the leading dimensions differ.
    """
    latents, embeddings = as_tensor(latents, "latents"), as_tensor(embeddings, "embeddings")
    latent_rows = as_rows(latents, "latents", keep_sparse=keep_sparse)
    embedding_rows = as_rows(embeddings, "embeddings")
    if latents.shape[:-1] != embeddings.shape[:-1]:
        wanted = ", ".join(str(size) for size in latents.shape[:-1])
        raise ValueError(
            f"embeddings: expected ({wanted}, d) to match latents of shape "
            f"{tuple(latents.shape)}, got {tuple(embeddings.shape)}"
        )
    if latents.device != embeddings.device:
        raise ValueError(
            f"embeddings: expected on {latents.device} with the latents, got {embeddings.device}"
        )
    return latent_rows, embedding_rows


def looks_are_free(tensor: Tensor) -> bool:
    """Say whether a value may be read to choose a way: not where a device would have to wait."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def may_hold_any(tensor: Tensor) -> bool:
    """Say whether some entry may be true, or not zero; where a look is not free, always."""
    return not looks_are_free(tensor) or bool(tensor.any())


def require_finite(tensor: Tensor, name: str) -> None:
    """Raise ValueError where a tensor holds a NaN or an infinity.

    Reads a value, so it belongs in evaluation, never in a training step.
    """
    if tensor.numel() and not bool(torch.stack((tensor.amin(), tensor.amax())).isfinite().all()):
        raise ValueError(f"{name}: contains NaN or infinite values; expected finite numbers")


def as_device(device: Any) -> torch.device:
    """Return a device that can be used now.

    Raises:
        TypeError: not a device or its name.
        ValueError: no such device, or not on this machine.
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device: expected a torch.device or its name, got {_shown(device)}")
    try:
        return torch.empty(0, device=device).device
    except (
        AssertionError,
        NotImplementedError,
        RuntimeError,
    ) as error:  # without CUDA, without a driver, no such name
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device: cannot use {str(device)!r} here: {reason}") from error


def require_choice(value: str, name: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError where an option is not one of the allowed words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: expected one of {list(allowed)}, got {value!r}")


def require_at_least(least: int, given: int, name: str) -> None:
    """Raise ValueError for an integer below the least that makes sense, TypeError for another."""
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{name}: expected an integer, got {_shown(given)}")
    if given < least:
        raise ValueError(f"{name}: expected at least {least}, got {given}")
    if given > _MOST:
        raise ValueError(f"{name}: expected at most {_MOST}, got {given}")


def require_number(given: Any, name: str) -> None:
    """Raise TypeError where something is no real number."""
    if not isinstance(given, (int, float)) or isinstance(given, bool):
        raise TypeError(f"{name}: expected a number, got {_shown(given)}")
    if abs(given) > 1e308 and given not in (float("inf"), -float("inf")):
        raise ValueError(f"{name}: expected a number that a float can hold, got {given}")


def require_flag(given: Any, name: str) -> None:
    """Raise TypeError where something is neither True nor False."""
    if not isinstance(given, bool):
        raise TypeError(f"{name}: expected True or False, got {_shown(given)}")


def _shown(given: Any) -> str:
    """Return a value as an error shows it: short."""
    return repr(given) if isinstance(given, (str, int, float, type(None))) else kind_of(given)


def require_text(text: Any, argument: str) -> None:
    """Raise an error for an optional argument that is neither None nor a string with something in.

    Raises:
        TypeError: another kind.
        ValueError: an empty string.
    """
    if text is None:
        return
    if not isinstance(text, str):
        raise TypeError(f"{argument}: expected a string, got {kind_of(text)}")
    if not text:
        raise ValueError(f"{argument}: expected a string, got an empty one; leave it out instead")


def as_list(values: Any, name: str) -> list[Any]:
    """Return the items of a list, an array or a tensor.

    Raises:
        TypeError: something else, or a string.
    """
    plain = not isinstance(values, (str, bytes, type)) and isinstance(values, Iterable)
    if not plain or getattr(values, "shape", None) == ():
        raise TypeError(f"{name}: expected a list, got {kind_of(values)}")
    if isinstance(values, Tensor) and (values.is_meta or values.layout != torch.strided):
        raise TypeError(f"{name}: expected a dense tensor with values, got {values.layout}")
    return list(values.tolist() if hasattr(values, "tolist") else values)


def require_share(shard: tuple[int, int]) -> tuple[int, int]:
    """Return ``(i, n)``, the i-th of n processes; raise ValueError where there is no such one."""
    if not (isinstance(shard, (tuple, list)) and [type(part) for part in shard] == [int, int]):
        raise TypeError(f"shard: expected two integers (i, n), got {shard!r}")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard: expected (i, n) with 0 <= i < n, got {shard}")
    return shard
