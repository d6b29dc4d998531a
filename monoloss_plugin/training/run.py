"""``train``: a recipe on a feature set, from the first step to a folder that others can load."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from monoloss_plugin._checks import device_or_gpu
from monoloss_plugin._places import as_path, kind_of, require_folder, without
from monoloss_plugin._samples import own_record
from monoloss_plugin.comparison import Comparison, compare
from monoloss_plugin.features import FeatureBatches, FeatureSet
from monoloss_plugin.features.feature_set import require_set
from monoloss_plugin.features.store import write_json
from monoloss_plugin.saes.baselines import QUICK
from monoloss_plugin.saes.refit import refit_decoder
from monoloss_plugin.training.recipes import Recipe
from monoloss_plugin.training.trainer import batches_for, make_trainer

# After the modules above, whose import errors name the extra to install.
from sae_lens import SAE, SAETrainer  # isort: skip
from sae_lens.config import LoggingConfig  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Sequence

EVALUATION = "evaluation.json"
CHECKPOINTS = "checkpoint"
_SETTINGS = "settings.json"
_SAVE_EVERY = 60.0
"""Seconds between two checkpoints."""
_HELD_OUT = 0.1
"""The share of the rows that is held out if there are no held-out features."""


@dataclass(frozen=True)
class Trained:
    """What :func:`train` made."""

    sae: SAE[Any]
    """The SAE as it was saved."""
    comparison: Comparison
    """It and baselines on held-out features."""
    recipe: Recipe
    """The recipe, with every number that was chosen."""
    folder: Path
    """Where the SAE is, for ``SAE.load_from_disk``."""


def train(
    features: FeatureSet,
    recipe: Recipe,
    *,
    out: str | os.PathLike[str],
    held_out: FeatureSet | None = None,
    device: torch.device | str | None = None,
    logger: LoggingConfig | None = None,
    baselines: Sequence[str] = QUICK,
) -> Trained:
    """Train an SAE on features with SAELens's trainer, save it and measure it.

    You can interrupt it with Ctrl-C, or kill it. Call it again with the same arguments, and it goes
    on where it was; the result is the same as without a break. (After a kill, up to a minute of
    work is done again.)

    Args:
        features: training features.
        recipe: how to train: one of :func:`~monoloss_plugin.training.get_recipe`, or your own.
        out: folder for the SAE and its measures, ``evaluation.json``.
        held_out: features to measure it on. By default a random tenth of ``features``, which are
            then not trained on. They also decide whether a refitted decoder is kept.
        device: where to train; by default a GPU if there is one.
        logger: SAELens's own, such as ``LoggingConfig(log_to_wandb=True)`` after ``wandb.init()``.
        baselines: SAEs that have learnt nothing, to compare with: names of
            :data:`~monoloss_plugin.saes.BASELINES`.

    Raises:
        FileExistsError: ``out`` holds a trained SAE already, or files that are not of such a run.
        NotADirectoryError: ``out`` is a file.
        TypeError: an argument of another kind.
        ValueError: ``out`` holds an unfinished run with other settings; features of another width;
            or what :func:`make_trainer` refuses.
        KeyboardInterrupt: Ctrl-C. During training, a checkpoint is saved first.
    """
    require_sets(features, held_out, recipe)
    folder = as_path(out, "out", "a folder")
    require_free(folder)
    if held_out is None:
        features, held_out = split(features, recipe.seed)
    recipe = recipe.fitted_to(len(features), features.width, features.num_images)
    found = device_or_gpu(device)
    batches = batches_for(features, recipe, found)
    trainer = make_trainer(batches, recipe, logger=logger)
    checkpoints = Checkpoints(folder / CHECKPOINTS, _settings(recipe, features, held_out))
    checkpoints.resume(trainer, batches)
    with checkpoints.watching(trainer):
        trainer.fit()
    said = {"inputs": "unit norm", "from_data": recipe.from_data}
    trainer.sae.cfg.metadata.monoloss = {**own_record(trainer.sae), **said}
    trainer.sae.save_inference_model(folder)
    sae = SAE.load_from_disk(folder, device=str(found))
    if recipe.refit:
        refit_decoder(sae, features, held_out=held_out)
        sae.save_model(folder)
    comparison = compare(
        {"trained": sae}, held_out, train=features, baselines=baselines, groups=(), progress=True
    )
    write_json(folder, EVALUATION, comparison.to_dict())  # it says that the run is finished
    without(folder / CHECKPOINTS)
    return Trained(sae, comparison, recipe, folder)


def require_free(folder: Path) -> None:
    """Raise FileExistsError or NotADirectoryError unless a run can start or go on in a folder."""
    if not folder.exists():
        return
    require_folder(folder, "out")
    if (folder / EVALUATION).exists():
        raise FileExistsError(f"out: {folder} holds a trained SAE already; give another folder")
    # A run overwrites and deletes files, so all of them must be its own.
    if not (folder / CHECKPOINTS / _SETTINGS).exists() and any(folder.iterdir()):
        raise FileExistsError(f"out: {folder} holds other files; give a new folder")


def require_sets(features: Any, held_out: Any, recipe: Any) -> None:
    """Raise TypeError or ValueError unless these can be trained with and measured on."""
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected a Recipe, got {kind_of(recipe)}; see get_recipe")
    require_set(features, "features")
    if held_out is None:
        return
    require_set(held_out, "held_out")
    if held_out.width != features.width:
        raise ValueError(f"held_out: expected width {features.width}, got {held_out.width}")


def split(features: FeatureSet, seed: int) -> tuple[FeatureSet, FeatureSet]:
    """Return all images but a random tenth, and that tenth; both in the order of the set."""
    order = torch.randperm(features.num_images, generator=torch.Generator().manual_seed(seed))
    cut = max(1, round(_HELD_OUT * features.num_images))
    held_out, rest = order[:cut].sort().values, order[cut:].sort().values
    tenth = features.select(held_out)
    source = {**tenth.record.source, "split": "a tenth that was held out"}
    return features.select(rest), FeatureSet(tenth.dataset, replace(tenth.record, source=source))


class Checkpoints:
    """The newest checkpoint of a run, in a folder that only this run writes to."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings

    def resume(self, trainer: SAETrainer[Any, Any], batches: FeatureBatches) -> None:
        """Continue the folder's run, if it holds one.

        The next batch follows from the number of steps, so a checkpoint needs no more than what
        SAELens saves.

        Raises:
            ValueError: it is a run with other settings.
        """
        settings = self.folder / _SETTINGS
        if not settings.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder, _SETTINGS, self.settings)
            return
        then = json.loads(settings.read_text())
        now = json.loads(json.dumps(self.settings))
        if changed := [name for name in now if now[name] != then.get(name)]:
            name = changed[0]
            raise ValueError(
                f"out: {self.folder} holds an unfinished run with other settings ({name} was "
                f"{then.get(name)!r}, is now {now[name]!r}); give another folder, or delete it"
            )
        if newest := max(self._saved(), key=lambda path: int(path.name), default=None):
            trainer.load_trainer_state(newest)
            trainer.sae.load_weights_from_checkpoint(newest)
            epoch, batch = divmod(trainer.n_training_steps, len(batches))
            batches.load_state_dict({**batches.state_dict(), "epoch": epoch, "batch": batch})

    @contextmanager
    def watching(self, trainer: SAETrainer[Any, Any]) -> Iterator[None]:
        """Save a checkpoint now and then, and at Ctrl-C, always between two steps."""
        stop = threading.Event()
        in_main = threading.current_thread() is threading.main_thread()

        def ask(*_: Any) -> None:
            if stop.is_set():  # a second Ctrl-C does not wait
                raise KeyboardInterrupt
            stop.set()

        before = signal.signal(signal.SIGINT, ask) if in_main else None
        trainer.data_provider = self._between_steps(trainer, trainer.data_provider, stop)
        try:
            yield
        finally:
            if in_main:
                signal.signal(signal.SIGINT, before)
        if stop.is_set():  # it came in the last step
            raise KeyboardInterrupt

    def _between_steps(
        self, trainer: SAETrainer[Any, Any], batches: Iterator[Tensor], stop: threading.Event
    ) -> Iterator[Tensor]:
        due = time.monotonic() + _SAVE_EVERY
        for batch in batches:
            if stop.is_set() or time.monotonic() >= due:
                self.save(trainer)
                due = time.monotonic() + _SAVE_EVERY
            if stop.is_set():
                raise KeyboardInterrupt
            yield batch

    def save(self, trainer: SAETrainer[Any, Any]) -> None:
        """Save a checkpoint, and delete older ones once it is complete."""
        partial = without(self.folder / "partial")
        partial.mkdir()
        trainer.sae.save_model(partial)
        trainer.save_trainer_state(partial)
        newest = without(self.folder / str(trainer.n_training_steps))
        os.replace(partial, newest)
        for path in self._saved():
            if path != newest:
                without(path)

    def _saved(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.name.isdigit()]


def _settings(recipe: Recipe, features: FeatureSet, held_out: FeatureSet) -> dict[str, Any]:
    """Return what the result depends on, as JSON can hold it."""
    return {
        **vars(recipe),
        "settings": dict(recipe.settings),
        "terms": [{"term": type(term).__name__, **asdict(term)} for term in recipe.terms],
        "features": [len(features), features.fingerprint()],
        "held_out": [len(held_out), held_out.fingerprint()],
    }
