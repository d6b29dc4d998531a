"""Checks of arguments. Each error names the argument, what came, and what is wanted."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from monoloss_plugin._places import kind_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that latents, embeddings and features may have."""

_MOST = 2**31 - 1


def visible(text: object) -> str:
    """Return a text from outside in one line, with control characters escaped for terminals."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
        for c in " ".join(str(text).splitlines())
    )


def as_tensor(value: Any, name: str) -> Tensor:
    """Return a tensor, a numpy array or a list of numbers as a tensor.

    Raises:
        TypeError: anything else.
        ValueError: a tensor on the meta device, which has no values.
    """
    if isinstance(value, Tensor):
        if value.is_meta:
            raise ValueError(f"{name}: expected a tensor with values, got one on the meta device")
        return value
    if isinstance(value, (list, tuple)) or hasattr(value, "__array_interface__"):
        try:
            with warnings.catch_warnings():
                # torch warns that writing to the tensor would change the array; we never write.
                warnings.filterwarnings("ignore", message=".*not writable.*")
                return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(
                f"{name}: expected a tensor, a numpy array or a list of numbers, got "
                f"a {type(value).__name__} that cannot become a tensor: {error}"
            ) from None
    raise TypeError(
        f"{name}: expected a tensor, a numpy array or a list of numbers, got {kind_of(value)}"
    )


def as_labels(value: Any, name: str = "labels") -> Tensor:
    """Return integer classes, from a tensor, a numpy array or a list, as a tensor.

    Raises:
        TypeError: the values are not integers.
    """
    tensor = as_tensor(value, name)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {tensor.dtype}")
    return tensor


def as_rows(value: Any, name: str, *, keep_sparse: bool = False) -> Tensor:
    """Return a tensor, a numpy array or a list (..., width) as dense rows (N, width).

    This looks at shape and dtype, never at values, so it never makes an accelerator wait.

    Args:
        value: (..., width).
        name: the argument's name, for the error.
        keep_sparse: leave (N, width) sparse COO tensors as they are.

    Raises:
        TypeError: the values are not floating-point numbers of 16 bits or more.
        ValueError: there are fewer than two dimensions.
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
    """Return latents as (N, M) and embeddings as (N, d), with one row for each sample.

    With ``keep_sparse``, sparse COO latents stay sparse.

    Raises:
        TypeError: as :func:`as_rows`.
        ValueError: as :func:`as_rows`, or if the leading dimensions or the devices differ.
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
    """Return whether code may read a value to choose a path, without making a device wait."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def may_hold_any(tensor: Tensor) -> bool:
    """Return whether some entry may be true, or not zero. True if looking is not free."""
    return not looks_are_free(tensor) or bool(tensor.any())


def require_finite(tensor: Tensor, name: str) -> None:
    """Raise ValueError if a tensor holds a NaN or an infinity.

    This reads a value. Use it in evaluation, never in a training step.
    """
    if tensor.numel() and not bool(torch.stack((tensor.amin(), tensor.amax())).isfinite().all()):
        raise ValueError(f"{name}: contains NaN or infinite values; expected finite numbers")


def as_device(device: Any) -> torch.device:
    """Return a device that this machine can use now.

    Raises:
        TypeError: not a device or the name of one.
        ValueError: no such device, or this machine does not have it.
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device: expected a torch.device or its name, got {_shown(device)}")
    try:
        return torch.empty(0, device=device).device
    # torch raises these without CUDA, without a driver, and for an unknown name.
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device: cannot use {str(device)!r} here: {reason}") from error


def device_or_gpu(device: Any) -> torch.device:
    """Return a device as :func:`as_device`; for None a GPU if there is one.

    Under torchrun, it is the GPU with the number ``LOCAL_RANK``.
    """
    if device is not None:
        return as_device(device)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def require_choice(value: str, name: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError if an option is not one of the allowed words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: expected one of {list(allowed)}, got {value!r}")


def require_at_least(least: int, given: int, name: str) -> None:
    """Raise ValueError for an integer below ``least``, and TypeError for anything else."""
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{name}: expected an integer, got {_shown(given)}")
    if given < least:
        raise ValueError(f"{name}: expected at least {least}, got {given}")
    if given > _MOST:
        raise ValueError(f"{name}: expected at most {_MOST}, got {given}")


def require_number(given: Any, name: str) -> None:
    """Raise TypeError if something is not a real number."""
    if not isinstance(given, (int, float)) or isinstance(given, bool):
        raise TypeError(f"{name}: expected a number, got {_shown(given)}")
    if abs(given) > 1e308 and given not in (float("inf"), -float("inf")):
        raise ValueError(f"{name}: expected a number that a float can hold, got {given}")


def require_flag(given: Any, name: str) -> None:
    """Raise TypeError if something is neither True nor False."""
    if not isinstance(given, bool):
        raise TypeError(f"{name}: expected True or False, got {_shown(given)}")


def _shown(given: Any) -> str:
    """Return a short text that shows a value in an error."""
    return repr(given) if isinstance(given, (str, int, float, type(None))) else kind_of(given)


def require_text(text: Any, argument: str) -> None:
    """Check an optional text: None, or a string that is not empty.

    Raises:
        TypeError: neither None nor a string.
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
        TypeError: anything else, such as a string.
    """
    plain = not isinstance(values, (str, bytes, type)) and isinstance(values, Iterable)
    if not plain or getattr(values, "shape", None) == ():
        raise TypeError(f"{name}: expected a list, got {kind_of(values)}")
    if isinstance(values, Tensor) and (values.is_meta or values.layout != torch.strided):
        raise TypeError(f"{name}: expected a dense tensor with values, got {values.layout}")
    return list(values.tolist() if hasattr(values, "tolist") else values)


def as_texts(values: Any, name: str) -> list[str]:
    """Return one or more texts as a list.

    Raises:
        TypeError: not a list, or an entry is not a string.
        ValueError: an empty list.
    """
    texts = as_list(values, name)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name}: expected a list of strings, got one with {_shown(text)}")
    if not texts:
        raise ValueError(f"{name}: expected at least one, got none")
    return texts


def require_share(shard: tuple[int, int]) -> tuple[int, int]:
    """Return the shard ``(i, n)``, part i of n; raise an error if there is no such part."""
    if not (isinstance(shard, (tuple, list)) and [type(part) for part in shard] == [int, int]):
        raise TypeError(f"shard: expected two integers (i, n), got {shard!r}")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard: expected (i, n) with 0 <= i < n, got {shard}")
    return shard
