"""Every public function, with about fifty wrong arguments in the place of each right one.

What comes of it is a TypeError or a ValueError (of paths and tokens, also the errors that
files have) that names the argument, or a defined result; never anything else.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from timm.data.mixup import Mixup
from timm.task import ClassificationTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

import monoloss_plugin.adapters.sae_lens as of_sae_lens
import monoloss_plugin.adapters.timm as of_timm
import monoloss_plugin.adapters.transformers as of_transformers
from monoloss_plugin import (
    ClassPurity,
    L1L2Ratio,
    MonoLoss,
    MonoScore,
    OffSupportL1,
    functional,
    list_pretrained,
    load_features,
    load_pretrained,
    name_latents,
    publish_features,
    publish_sae,
    show_latents,
    top_images,
    write_report,
)
from monoloss_plugin.adapters.lightning import MonoLossCallback
from monoloss_plugin.comparison import compare
from monoloss_plugin.convert import (
    from_dictionary_learning,
    from_monoloss,
    from_overcomplete,
    from_sparsify,
)
from monoloss_plugin.dictionary import nearest_latents, redundancy, stability
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import (
    FeatureBatches,
    FeatureSet,
    extract,
    load_encoder,
    load_text_encoder,
    verify,
)
from monoloss_plugin.features.sources import open_source
from monoloss_plugin.features.store import join
from monoloss_plugin.figures import plot_curves
from monoloss_plugin.finetuning import (
    LatentRecorder,
    MonoLayer,
    WithEmbeddings,
    aligned_embeddings,
    gather_rows,
    insert_mono_layer,
    load_with_mono_layer,
)
from monoloss_plugin.gallery import activating_samples, names_from_means, open_pictures
from monoloss_plugin.hub import publish_all
from monoloss_plugin.hub.repository import bundled_folder
from monoloss_plugin.losses import lam_factor
from monoloss_plugin.metrics import R2
from monoloss_plugin.probing import probe, small_budget_probe
from monoloss_plugin.saes import make_baseline
from monoloss_plugin.saes.selection import k_robustness, with_l0

ALLOWED = (TypeError, ValueError, FileNotFoundError, FileExistsError, PermissionError)

B, M, D = 4, 3, 2


class Case(NamedTuple):
    """A function and a right call of it."""

    call: Callable[..., Any]
    arguments: Mapping[str, Any]
    names: Mapping[str, str] = {}
    """What an error may call an argument instead of by its own name."""
    leave: tuple[str, ...] = ()
    """Arguments that may be anything."""
    runs: bool = True
    """The call is right as it is, and quick; otherwise it ends at what is not there."""


def wrong_values() -> Iterator[tuple[str, Any]]:
    """Yield values of every kind that may come where something else is wanted."""
    x = torch.rand(B, M)
    yield from {
        "None": None,
        "True": True,
        "0": 0,
        "-1": -1,
        "1.5": 1.5,
        "nan": float("nan"),
        "inf": float("inf"),
        "10**30": 10**30,
        "empty string": "",
        "string": "some",
        "string with a null": "a\0b",
        "bytes": b"some",
        "path": Path("nowhere"),
        "class": nn.Linear,
        "object": object(),
        "function": lambda *_: None,
        "module": nn.Linear(2, 2),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "empty list": [],
        "list of numbers": [1, 2],
        "ragged list": [[1.0, 2.0], [3.0]],
        "list of strings": ["a", "b"],
        "tuple": (),
        "dict": {"a": 1},
        "set": {1, 2},
        "range": range(3),
        "generator": (i for i in range(3)),
        "DataLoader": DataLoader(TensorDataset(x), batch_size=2),
        "Dataset": TensorDataset(x),
        "exception": ValueError("some"),
        "array of floats": np.random.default_rng(0).random((B, M)),
        "array of ints": np.arange(B * M).reshape(B, M),
        "array of strings": np.array(["a", "b"]),
        "array of objects": np.array([object(), None]),
        "complex array": np.ones((B, M), dtype=complex),
        "number of numpy": np.float32(1.5),
        "scalar": torch.tensor(1.0),
        "vector": torch.rand(B),
        "no rows": torch.rand(0, M),
        "no columns": torch.rand(B, 0),
        "fewer rows": torch.rand(B - 1, M),
        "more columns": torch.rand(B, M + 2),
        "three dimensions": torch.rand(2, 2, M),
        "int64": torch.ones(B, M, dtype=torch.int64),
        "bool": torch.ones(B, M, dtype=torch.bool),
        "complex": torch.ones(B, M, dtype=torch.complex64),
        "float8": torch.ones(B, M).to(torch.float8_e4m3fn),
        "half": x.half(),
        "COO": x.to_sparse(),
        "CSR": x.to_sparse_csr(),
        "NaN": torch.full((B, M), float("nan")),
        "infinite": torch.full((B, M), float("inf")),
        "huge": torch.full((B, M), 3e38),
        "denormal": torch.full((B, M), 1e-44),
        "negative": -x,
        "with a gradient": x.clone().requires_grad_(),
        "meta": torch.empty(B, M, device="meta"),
    }.items()


def outcome_of(case: Case, name: str, value: Any) -> str | None:
    """Return what is wrong with the outcome of a call with a wrong argument; None if nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.call(**{**case.arguments, name: value})
    except ALLOWED as error:
        said = str(error)
        called = case.names.get(name, name)
        if not re.search(rf"\b({called})\b", said):
            return f"{type(error).__name__}, which does not name it: {said[:120]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    return None


def updated(metric: Any) -> Callable[..., Any]:
    def update(**arguments: Any) -> Any:
        made = metric()
        made.update(**arguments)
        return made.compute() if made.state_dict() else None

    return update


def of_r2(**arguments: Any) -> float:
    metric = R2()
    metric.update(**arguments)
    return metric.compute() if metric.n else 0.0


class Tied:
    """An SAE."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().relu()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def sae_of_the_digits() -> Any:
    return load_pretrained("digits").sae


def cases() -> dict[str, Case]:
    latents, embeddings = torch.rand(B, M), torch.rand(B, D)
    labels, mask = torch.tensor([0, 1, 1, 0]), torch.rand(B, M) > 0.5
    pair = {"latents": latents, "embeddings": embeddings}
    regularizer = {"pre_acts": latents, "selected": mask}
    term = {"lam": 0.1, "lam_units": "nmse", "name": "some"}
    digits = load_features("digits", "held_out")
    ids = digits.ids_of(torch.arange(3))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(M, 3))
    saved = nn.Sequential(nn.Flatten(), nn.Linear(M, 3))
    insert_mono_layer(saved, "1")

    def inserted(**arguments: Any) -> Any:
        fresh = nn.Sequential(nn.Flatten(), nn.Linear(M, 3))
        return insert_mono_layer(**{"model": fresh, **arguments})

    def loaded(**arguments: Any) -> Any:
        fresh = nn.Sequential(nn.Flatten(), nn.Linear(M, 3))
        return load_with_mono_layer(**{"model": fresh, **arguments})

    return {
        "monoscore": Case(functional.monoscore, {**pair, "undefined": 0.0}),
        "monoscore_pairwise": Case(functional.monoscore_pairwise, {**pair, "undefined": 0.0}),
        "monoloss": Case(functional.monoloss, {**pair, "gradient_at": "all"}),
        "off_support_l1": Case(
            functional.off_support_l1,
            {**regularizer, "units": "all", "rectify": True, "over_units": "sum"},
        ),
        "l1_l2_ratio": Case(
            functional.l1_l2_ratio,
            {**regularizer, "units": "all", "rectify": True, "normalize": False},
        ),
        "class_purity": Case(
            functional.class_purity, {"latents": latents, "labels": labels, "num_classes": 2}
        ),
        "MonoLoss": Case(MonoLoss, term),
        "MonoLoss()": Case(MonoLoss(lam=0.1), {**pair, "gradient_at": "active"}),
        "OffSupportL1": Case(
            OffSupportL1, {**term, "units": "all", "rectify": True, "over_units": "sum"}
        ),
        "OffSupportL1()": Case(OffSupportL1(lam=0.1), regularizer),
        "L1L2Ratio": Case(L1L2Ratio, {**term, "units": "all", "rectify": True, "normalize": False}),
        "L1L2Ratio()": Case(L1L2Ratio(lam=0.1), regularizer),
        "lam_factor": Case(
            lam_factor,
            {
                "lam_units": "mse",
                "width": 8,
                "mean_square_norm": 1.0,
                "reduction": "sum",
                "degree": 0,
            },
        ),
        "MonoScore.update": Case(updated(MonoScore), pair),
        "MonoScore.merge": Case(MonoScore().merge, {"other": MonoScore()}),
        "MonoScore.load_state_dict": Case(MonoScore().load_state_dict, {"state": {}}),
        "ClassPurity": Case(ClassPurity, {"num_classes": 2}),
        "ClassPurity.update": Case(
            updated(lambda: ClassPurity(2)), {"latents": latents, "labels": labels}
        ),
        "ClassPurity.merge": Case(ClassPurity(2).merge, {"other": ClassPurity(2)}),
        "ClassPurity.load_state_dict": Case(ClassPurity(2).load_state_dict, {"state": {}}),
        "R2.update": Case(
            of_r2,
            {"targets": latents, "reconstructions": latents},
            names={
                "targets": "targets|reconstructions",
                "reconstructions": "targets|reconstructions",
            },
        ),
        "R2.merge": Case(R2().merge, {"other": R2()}),
        "evaluate": Case(
            evaluate,
            {
                "sae": Tied(),
                "features": latents,
                "labels": labels,
                "num_classes": 2,
                "embeddings": embeddings,
                "normalize": None,
                "batch_size": 2,
                "device": None,
                "progress": False,
            },
            names={"features": "features|labels|embeddings"},
            leave=("progress",),
        ),
        "evaluate a feature set": Case(
            evaluate,
            {
                "sae": sae_of_the_digits(),
                "features": digits,
                "num_classes": 10,
                "normalize": True,
                "batch_size": 300,
                "device": "cpu",
            },
            names={"features": "features|num_classes|labels", "num_classes": "num_classes|labels"},
        ),
        "LatentRecorder": Case(
            LatentRecorder,
            {"model": plain, "layer": "1"},
            names={"layer": "layer|latents", "model": "model|latents"},
        ),
        "MonoLayer": Case(
            MonoLayer,
            {"in_features": 4, "width": 8, "relu": True, "selection": "topk", "k": 2},
            names={"selection": "selection|k"},
        ),
        "insert_mono_layer": Case(
            inserted,
            {"classifier": "1", "width": 8, "relu": True, "selection": "topk", "k": 2},
            names={"selection": "selection|k"},
        ),
        "insert_mono_layer of a model": Case(
            insert_mono_layer,
            {"model": nn.Sequential(nn.Linear(2, 2)), "classifier": "0"},
            names={"classifier": "classifier|model", "model": "classifier|model"},
        ),
        "load_with_mono_layer": Case(loaded, {"checkpoint": saved.state_dict()}),
        "load_with_mono_layer of a model": Case(
            load_with_mono_layer,
            {"model": plain, "checkpoint": saved.state_dict()},
            names={"model": "model|checkpoint|classifier"},
            leave=("checkpoint",),
        ),
        "gather_rows": Case(gather_rows, {"rows": latents}),
        "aligned_embeddings": Case(aligned_embeddings, {"features": digits, "ids": ids}),
        "WithEmbeddings": Case(
            WithEmbeddings,
            {"dataset": TensorDataset(latents), "embeddings": embeddings, "key": "embeddings"},
            names={"dataset": "dataset|embeddings"},
        ),
    }


def removed(add_loss: Callable[..., Any]) -> Callable[..., None]:
    """Attach a term, and take it away again."""

    def attach(**arguments: Any) -> None:
        add_loss(**arguments).remove()

    return attach


def cases_of_hosts() -> dict[str, Case]:
    data = Dataset.from_dict({"pixel_values": [[0.0] * 4] * 4, "labels": [0, 1, 0, 1]})
    model = nn.Sequential(nn.Linear(4, 3))
    insert_mono_layer(model, "0")
    arguments = TrainingArguments("unused", report_to=[], use_cpu=True)
    loss = MonoLoss(lam=0.1, lam_units="raw")
    fine_tuning = {
        "loss": loss,
        "embeddings": torch.sin,
        "latents": None,
        "warm_up_steps": 0,
        "start": 0,
        "sync": False,
    }
    config = BatchTopKTrainingSAEConfig(d_in=4, d_sae=8, k=2)
    return {
        "SAELens's add_loss": Case(
            removed(of_sae_lens.add_loss),
            {
                "target": BatchTopKTrainingSAE(config),
                "loss": MonoLoss(lam=0.1),
                "warm_up_steps": 0,
                "start": 0,
                "embeddings": None,
                "saes": None,
            },
        ),
        "strip_checkpoint": Case(
            of_sae_lens.strip_checkpoint, {"checkpoint": "nowhere"}, runs=False
        ),
        "Trainer.add_loss": Case(
            removed(of_transformers.add_loss),
            {"trainer": Trainer(model, arguments, train_dataset=data), **fine_tuning},
        ),
        "timm's add_loss": Case(
            removed(of_timm.add_loss),
            {"task": ClassificationTask(model, nn.CrossEntropyLoss()), **fine_tuning},
        ),
        "MonoLossCallback": Case(MonoLossCallback, fine_tuning),
        "mix_with_embeddings": Case(
            of_timm.mix_with_embeddings,
            {
                "mixup": Mixup(mixup_alpha=0.3, num_classes=2),
                "images": torch.rand(4, 1, 2, 2),
                "target": torch.tensor([0, 1, 0, 1]),
                "embeddings": torch.rand(4, 2),
            },
        ),
    }


def cases_of_features() -> dict[str, Case]:
    digits = load_features("digits", "held_out")
    x, labels = torch.rand(B, M), torch.tensor([0, 1, 1, 0])
    arguments = {"x": x, "labels": labels, "ids": list("abcd"), "classes": ["no", "yes"]}
    return {
        "FeatureSet": Case(FeatureSet, {"dataset": digits.dataset, "record": None}),
        "FeatureSet.from_tensors": Case(
            FeatureSet.from_tensors,
            {**arguments, "record": {}},
            names={"labels": "labels?", "classes": "classes|labels?"},
        ),
        "FeatureSet.open": Case(FeatureSet.open, {"source": digits.dataset}),
        "FeatureSet.take": Case(digits.take, {"numbers": torch.arange(3)}),
        "FeatureBatches": Case(
            FeatureBatches,
            {
                "features": digits,
                "embeddings": (),
                "batch_size": 100,
                "shuffle": "all",
                "seed": 0,
                "drop_last": True,
                "normalize": True,
                "device": "cpu",
                "resident": None,
                "buffer_rows": 1024,
                "shard": (0, 1),
            },
            names={"shard": "shard|batch_size"},
        ),
        "verify": Case(verify, {"folder": "nowhere"}, runs=False),
        "join": Case(
            join,
            {"folder": "nowhere", "others": ["nowhere"]},
            names={"folder": "folder|others"},
            runs=False,
        ),
        "extract": Case(
            extract,
            {"source": "nowhere", "encoder": "nowhere", "out": "nowhere"},
            names={"out": "out|source", "encoder": "source"},
            runs=False,
        ),
        "open_source": Case(
            open_source,
            {"source": "./nowhere", "split": None},
            names={"split": "source"},
            runs=False,
        ),
        "load_encoder": Case(
            load_encoder,
            {"name": "timm:no", "revision": None, "output": None, "layer": None},
            names=dict.fromkeys(
                ("name", "revision", "output", "layer"), "encoder|name|revision|output|layer"
            ),
            runs=False,
        ),
        "load_text_encoder": Case(
            load_text_encoder,
            {"encoder": "transformers:./no", "revision": None},
            names={"revision": "encoder|revision"},
            runs=False,
        ),
        "plot_curves": Case(
            plot_curves,
            {"curves": {"some": [torch.rand(3)]}, "chance": 0.1, "title": None, "ax": None},
        ),
    }


def cases_of_the_hub() -> dict[str, Case]:
    digits = load_features("digits", "held_out")
    load = {
        "revision": None,
        "token": None,
        "cache_dir": None,
        "local_files_only": True,
    }
    publish = {"license": None, "tags": (), "private": False, "overwrite": False, "token": None}
    return {
        "load_pretrained": Case(
            load_pretrained,
            {"repo_id": "digits", "sae_id": None, "device": "cpu", "dtype": None, **load},
        ),
        "list_pretrained": Case(list_pretrained, {"repo_id": "digits", **load}),
        "load_features": Case(load_features, {"repo_id": "digits", "split": "held_out", **load}),
        "publish_sae": Case(
            partial(publish_sae, dry_run=True),
            {
                "sae": sae_of_the_digits(),
                "repo_id": "alice/saes",
                "sae_id": "some",
                "evaluation": {"r2": 1.0},
                "baseline": None,
                "features": None,
                "images": None,
                "report": None,
                "unit_norm": None,
                "take_any_norm": False,
                "base_model": None,
                "dataset": None,
                **publish,
            },
        ),
        "publish_features": Case(
            partial(publish_features, dry_run=True),
            {
                "features": digits,
                "repo_id": "alice/features",
                "split": "held_out",
                "config": "default",
                "source_dataset": None,
                **publish,
            },
            names={"features": "features|source"},
        ),
        "publish_all": Case(
            partial(publish_all, dry_run=True),
            {
                "folder": bundled_folder("digits"),
                "repo_id": "alice/saes",
                "features": True,
                **publish,
            },
        ),
        "from_monoloss": Case(
            from_monoloss,
            {"source": "nowhere", "features": None},
            names={"features": "features|source"},
            runs=False,
        ),
        "from_dictionary_learning": Case(
            from_dictionary_learning,
            {"source": "nowhere", "dict_class": None},
            names={"dict_class": "dict_class|source"},
            runs=False,
        ),
        "from_overcomplete": Case(
            from_overcomplete,
            {"source": "nowhere", "sae_class": None, "top_k": None, "threshold": None},
            names=dict.fromkeys(
                ("source", "top_k", "threshold"), "source|sae_class|top_k|threshold"
            ),
            runs=False,
        ),
        "from_sparsify": Case(from_sparsify, {"source": "nowhere"}, runs=False),
    }


def cases_of_looking() -> dict[str, Case]:
    x = torch.rand(B, M)
    few = FeatureSet.from_tensors(x, torch.tensor([0, 1, 1, 0]))
    images = np.zeros((B, 6, 6), "uint8")
    sae = Tied()
    shared = {"sae": sae, "features": few, "count": 1, "progress": False}
    return {
        "activating_samples": Case(
            activating_samples,
            {**shared, "normalize": None, "batch_size": 2, "device": "cpu"},
        ),
        "show_latents": Case(
            show_latents,
            {
                **shared,
                "images": images,
                "latents": [0],
                "top": 2,
                "by": "score",
                "bands": ["top"],
            },
            names={"features": "features|images"},
        ),
        "top_images": Case(top_images, {**shared, "latents": [0]}),
        "open_pictures": Case(
            open_pictures,
            {"images": images, "features": few},
            names={"features": "features|images"},
        ),
        "write_report": Case(
            write_report,
            {
                "saes": {"some": sae},
                "features": few,
                "out": "report.html",
                "images": images,
                "train": None,
                "texts": (),
                "encoder": None,
                "count": 1,
                "progress": False,
            },
            names={"features": "features|images", "saes": "saes?", "texts": "texts|encoder"},
            leave=("encoder",),
        ),
    }


def cases_for_referees() -> dict[str, Case]:
    x, labels = torch.rand(B, M), torch.tensor([0, 1, 1, 0])
    alive = torch.ones(B, dtype=torch.bool)
    sae = Tied()
    probed = {"train_labels": labels, "held_out_labels": labels}
    few = FeatureSet.from_tensors(torch.rand(8, M), torch.arange(8) % 2)
    return {
        "compare": Case(
            compare,
            {
                "saes": {"some": sae},
                "features": few,
                "train": few,
                "spaces": {"other": few},
                "baselines": False,
                "match": None,
                "groups": (),
                "progress": False,
            },
            names={"saes": "saes?"},
        ),
        "make_baseline": Case(
            make_baseline,
            {
                "kind": "PCA",
                "features": x,
                "num_latents": 2,
                "l0": 1,
                "selection": "topk",
                "seed": 0,
                "normalize": True,
            },
            leave=("features",),
        ),
        "with_l0": Case(
            with_l0,
            {"sae": sae, "features": x, "l0": 1.5, "normalize": None},
            names={"features": "features|l0"},
        ),
        "k_robustness": Case(
            k_robustness,
            {"sae": sae, "features": x, "ks": [1, 2], "normalize": None},
            names={"features": "features|ks"},
        ),
        "stability": Case(
            stability,
            {"dictionaries": [x, x], "alive": [alive, alive]},
            names={"dictionaries": "dictionaries|alive"},
        ),
        "redundancy": Case(redundancy, {"dictionary": x, "threshold": 0.5, "alive": alive}),
        "nearest_latents": Case(
            nearest_latents, {"dictionary": x, "other": x, "count": 1, "alive": alive}
        ),
        "names_from_means": Case(
            names_from_means,
            {
                "mean_embeddings": x,
                "mean_embedding": x[0],
                "texts": ["a", "b"],
                "text_embeddings": torch.rand(2, M),
                "count": 1,
            },
            names={
                "mean_embeddings": "mean_embeddings|mean_embedding|text_embeddings",
                "texts": "texts|text_embeddings",
            },
        ),
        "name_latents": Case(
            name_latents,
            {
                "sae": sae,
                "features": x,
                "texts": ["a", "b"],
                "encoder": lambda texts: torch.rand(len(texts), M),
                "count": 1,
                "normalize": None,
                "batch_size": 2,
                "device": "cpu",
                "progress": False,
            },
            # A function of one's own raises what it likes; a module names its own "input".
            names={"features": "features|text_embeddings", "encoder": "encoder|input"},
        ),
        "probe": Case(probe, {"train": x, "held_out": x, **probed}, leave=("train",)),
        "small_budget_probe": Case(
            small_budget_probe,
            {"train_latents": x, "held_out_latents": x, **probed, "budgets": (1, 2)},
            names={"train_latents": "train_latents|held_out_latents"},
        ),
        "monoscore_shuffled": Case(
            functional.monoscore_shuffled,
            {"latents": x, "embeddings": torch.rand(B, D), "shuffles": 5, "seed": 0},
        ),
    }


CASES = cases() | cases_for_referees() | cases_of_hosts() | cases_of_features() | cases_of_the_hub()
CASES |= cases_of_looking()


@pytest.mark.parametrize("name", CASES)
def test_wrong_arguments_are_named_or_have_a_defined_result(name: str, hub, monkeypatch, tmp_path):
    case = CASES[name]
    monkeypatch.chdir(tmp_path)  # where nothing has the strange names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case.runs:
            case.call(**case.arguments)
    wrong = {
        f"{argument}={kind}": found
        for argument in case.arguments
        if argument not in case.leave
        for kind, value in wrong_values()
        if (found := outcome_of(case, argument, value)) is not None
    }
    assert not wrong, "\n".join(f"{call}: {said}" for call, said in wrong.items())
