"""The trainers that losses attach to: what is installed and tested, and the line that attaches.

Nothing here imports a host. ``monoloss hosts`` prints this list.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from monoloss_plugin._optional import install_command, missing_extra

__all__ = ["HOSTS", "Host"]


@dataclass(frozen=True)
class Host:
    """A library whose trainer or training loop takes our losses."""

    name: str
    """As it calls itself."""
    package: str
    """Its name on PyPI."""
    versions: str
    """The versions that the adapter is made for, such as ">=6.53.1,<7"."""
    tested: str
    """The version that our tests train with."""
    supports: str
    """What it takes a loss for."""
    attach: str
    """The line that adds the loss."""
    extra: str
    """Our extra that installs it."""

    @property
    def installed(self) -> str | None:
        """The installed version; None if there is none."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    @property
    def install(self) -> str:
        """The command that installs what is missing."""
        return install_command(self.extra) or f"pip install '{self.package}{self.versions}'"

    @property
    def fits(self) -> bool:
        """Whether the installed version is one that the adapter is made for."""
        found = self.installed
        if found is None:
            return False
        from packaging.specifiers import SpecifierSet  # every host brings it

        return SpecifierSet(self.versions).contains(found, prereleases=True)


HOSTS = {
    "sae_lens": Host(
        "SAELens",
        "sae-lens",
        ">=6.53.1,<7",
        "6.54.12",
        "every architecture (abstopk with a regularizer alone), also on language models",
        "trainer.add_loss(MonoLoss(lam=3e-4))",
        "sae-lens",
    ),
    "overcomplete": Host(
        "overcomplete",
        "overcomplete",
        ">=0.3,<0.4",
        "0.3.0",
        "SAE, TopK, BatchTopK, JumpReLU and archetypal SAEs",
        "criterion = add_loss(criterion, MonoLoss(lam=3e-4))",
        "overcomplete",
    ),
    "dictionary_learning": Host(
        "dictionary_learning",
        "dictionary-learning",
        ">=0.1,<0.2",
        "0.1.0",
        "every trainer of SAEs, in trainSAE or in a loop of your own",
        "config = add_loss(config, MonoLoss(lam=3e-4))",
        "dictionary-learning",
    ),
    "sparsify": Host(
        "sparsify",
        "eai-sparsify",
        ">=1.3.2,<2",
        "1.3.3",
        "SAEs and transcoders, TopK and groupmax, with loss_fn='fvu'",
        "trainer.add_loss(MonoLoss(lam=3e-4))",
        "sparsify",
    ),
    "transformers": Host(
        "Hugging Face Trainer",
        "transformers",
        ">=4.49,<6",
        "5.23.0",
        "fine-tuning of image classifiers",
        "trainer.add_loss(MonoLoss(lam=0.1, lam_units='raw'), embeddings=...)",
        "vision",
    ),
    "timm": Host(
        "timm",
        "timm",
        ">=1.0.28,<2",
        "1.0.31",
        "fine-tuning with a TrainingTask",
        "task.add_loss(MonoLoss(lam=0.1, lam_units='raw'), embeddings=...)",
        "vision",
    ),
    "lightning": Host(
        "Lightning",
        "lightning",
        ">=2.4,<3",
        "2.6.6",
        "fine-tuning of a LightningModule",
        "Trainer(callbacks=[MonoLossCallback(loss, embeddings=...)])",
        "lightning",
    ),
}
"""By the name of their adapter, ``monoloss_plugin.adapters.<name>``."""

_warned: set[str] = set()


def check_version(key: str) -> None:
    """Warn, once, if the installed version of a host is not one that its adapter is made for."""
    host = HOSTS[key]
    found = host.installed
    if key in _warned or found is None or host.fits:
        return
    _warned.add(key)
    warnings.warn(
        f"{host.package} {found} is installed, and monoloss_plugin is made for "
        f"{host.package} {host.versions} and tested with {host.tested}. Losses may attach wrongly, "
        "or not at all",
        stacklevel=3,
    )


def moved_seam(key: str, what: str) -> RuntimeError:
    """Return an error for a host that no longer has what its adapter attaches to."""
    host = HOSTS[key]
    return RuntimeError(
        f"{host.package} {host.installed} has no {what}, which monoloss_plugin attaches to; it is "
        f"tested with {host.package} {host.tested}"
    )


def failed_import(error: ImportError, key: str) -> Exception:
    """Return what to raise if an adapter cannot import its host.

    If the host or a library it needs is missing, the error says what to install. If the host is
    there, but not what the adapter imports from it, the error says that it has moved.
    """
    if isinstance(error, ModuleNotFoundError):
        library = (error.name or "").partition(".")[0]
        try:
            import_module(library)
        except ImportError:
            missing = ModuleNotFoundError(str(error), name=library or None)
            return missing_extra(missing, HOSTS[key].extra)
    lost = re.match(r"cannot import name '(\w+)'", str(error))
    module = error.name or str(error)
    return moved_seam(key, f"{module}.{lost[1]}" if lost else module)
