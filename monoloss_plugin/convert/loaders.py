"""Convert SAEs on the Hub while SAELens loads them: loaders for ``SAE.from_pretrained``.

::

    from monoloss_plugin.convert import dictionary_learning_loader
    sae = SAE.from_pretrained("user/repo", "trainer_0", converter=dictionary_learning_loader)

Importing this module also gives SAELens the loaders by name, in its
``NAMED_PRETRAINED_SAE_LOADERS`` and ``NAMED_PRETRAINED_SAE_CONFIG_GETTERS``: each has its library's
name after ``monoloss_``, such as ``monoloss_dictionary_learning``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from monoloss_plugin.convert.dictionary_learning import from_dictionary_learning
from monoloss_plugin.convert.monoloss import from_monoloss
from monoloss_plugin.convert.overcomplete import from_overcomplete
from monoloss_plugin.convert.prisma import from_prisma
from monoloss_plugin.convert.saev import from_saev
from monoloss_plugin.convert.sparsify import from_sparsify
from monoloss_plugin.hosts import failed_import

try:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    from sae_lens.loading.pretrained_sae_loaders import (
        NAMED_PRETRAINED_SAE_CONFIG_GETTERS,
        NAMED_PRETRAINED_SAE_LOADERS,
    )
    from sae_lens.util import str_to_dtype
except ImportError as error:
    raise failed_import(error, "sae_lens") from error

__all__ = [
    "HubLoader",
    "dictionary_learning_loader",
    "monoloss_loader",
    "overcomplete_loader",
    "prisma_loader",
    "saev_loader",
    "sparsify_loader",
]


@dataclass(frozen=True)
class HubLoader:
    """Downloads an SAE of another library and converts it, as SAELens calls its own loaders.

    Pass it as ``converter`` to ``SAE.from_pretrained`` or
    ``SAE.from_pretrained_with_cfg_and_sparsity``. To give the conversion an option, or to load one
    commit of the repository, use ``functools.partial``::

        converter=partial(overcomplete_loader, sae_class="TopKSAE", top_k=32, revision="4c3e...")
    """

    convert: Callable[..., Any]
    """A converter of :mod:`monoloss_plugin.convert`, whose first argument is a path."""
    files: tuple[str, ...] = ()
    """The files to read in the folder that ``sae_id`` names, and that must be there. If there are
    none, ``sae_id`` names the one file to read."""
    extra_files: tuple[str, ...] = ()
    """More files of the same folder, which are read if they are there."""

    def __call__(
        self,
        repo_id: str,
        folder_name: str,
        device: str = "cpu",
        force_download: bool = False,
        cfg_overrides: dict[str, Any] | None = None,
        *,
        revision: str | None = None,
        **options: Any,
    ) -> tuple[dict[str, Any], dict[str, Tensor], None]:
        """Return an SAE's configuration, its tensors, and None for its sparsity.

        Args:
            repo_id: the repository on the Hub.
            folder_name: the folder of the SAE in it, or the file; ``"."`` for the main folder.
            device: where the tensors will be.
            force_download: download the files again, even if they are in the cache.
            cfg_overrides: entries of the configuration to replace, such as ``dtype``.
            revision: a commit, branch or tag of the repository; by default its main branch.
            options: of the converter.

        Raises:
            EntryNotFoundError: the repository has no such file.
            ValueError, TypeError: those of the converter.
        """
        named = PurePosixPath(folder_name)
        folder = named if self.files else named.parent

        def download(path: PurePosixPath) -> Path:
            found = hf_hub_download(
                repo_id, str(path), revision=revision, force_download=force_download
            )
            return Path(found)

        for name in self.extra_files:
            try:
                download(folder / name)
            except EntryNotFoundError:
                continue
        paths = [download(folder / name) for name in self.files]
        sae = self.convert(paths[0].parent if paths else download(named), **options)
        config = {**sae.cfg.to_dict(), "device": device, **(cfg_overrides or {})}
        dtype: torch.dtype = str_to_dtype(config["dtype"])
        tensors = {name: t.to(device, dtype) for name, t in sae.state_dict().items()}
        return config, tensors, None

    def read_config(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Return an SAE's configuration; arguments as of a call.

        The sizes of an SAE are those of its tensors, so this downloads them too.
        """
        return self(*arguments, **options)[0]


dictionary_learning_loader = HubLoader(from_dictionary_learning, ("ae.pt",), ("config.json",))
monoloss_loader = HubLoader(from_monoloss)
overcomplete_loader = HubLoader(from_overcomplete)
prisma_loader = HubLoader(from_prisma, extra_files=("config.json",))
saev_loader = HubLoader(from_saev)
sparsify_loader = HubLoader(
    from_sparsify, ("cfg.json", "sae.safetensors"), ("monoloss_terms.json",)
)

for _name, _loader in {
    "dictionary_learning": dictionary_learning_loader,
    "monoloss": monoloss_loader,
    "overcomplete": overcomplete_loader,
    "prisma": prisma_loader,
    "saev": saev_loader,
    "sparsify": sparsify_loader,
}.items():
    NAMED_PRETRAINED_SAE_LOADERS[f"monoloss_{_name}"] = _loader
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS[f"monoloss_{_name}"] = _loader.read_config
