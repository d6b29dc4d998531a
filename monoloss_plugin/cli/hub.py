"""``monoloss publish``, ``monoloss pretrained`` and ``monoloss convert``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from monoloss_plugin._places import local_path
from monoloss_plugin.cli.output import Output, command, one_of, table

if TYPE_CHECKING:
    from monoloss_plugin.hub import Publication

publish = typer.Typer(
    help="Publish SAEs and features to the Hugging Face Hub. Log in first: hf auth login.",
    no_args_is_help=True,
)

_Repository = Annotated[
    str, typer.Argument(help="USER/NAME on the Hub. It is made if there is none.")
]


def _upload_options(
    license: Annotated[
        str | None, typer.Option("--license", help="Licence for the card, such as mit.")
    ] = None,
    tags: Annotated[
        list[str] | None, typer.Option("--tag", help="A tag for the card. You can give several.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files of the same name.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Upload nothing; list the files that would be uploaded."),
    ] = False,
) -> None:
    """Show typer the options of every command that uploads."""


@command(publish, _upload_options)
def sae(
    folder: Annotated[
        Path, typer.Argument(help="The folder that SAELens's save_inference_model wrote.")
    ],
    repository: _Repository,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", help="Its sae_id; by default made of architecture, size and losses."
        ),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            help="Held-out features to measure it on: a folder that monoloss extract wrote."
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="An SAE trained without the losses, to compare with."),
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(
            help="Training features. The card then shows SAEs that have learnt nothing beside it."
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="The images of --features: a folder such as ./photos, or a dataset on the Hub. "
            "The card then shows six latents with their images. Check first that the images' "
            "licence allows it."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="A page that monoloss report wrote, to publish with its images."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="It was trained on features as the encoder gives them.")
    ] = False,
    take_any_norm: Annotated[
        bool,
        typer.Option("--take-any-norm", help="Make it scale its inputs to unit norm itself."),
    ] = False,
    base_model: Annotated[
        str | None, typer.Option(help="The encoder's repository on the Hub, for the card.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="The images' repository on the Hub, for the card.")
    ] = None,
    **upload: Any,
) -> Output:
    """Publish an SAE. With --features, measure it, and publish its numbers and curves too."""
    from monoloss_plugin.features import FeatureSet
    from monoloss_plugin.hub import publish_sae
    from monoloss_plugin.hub.illustrations import find_pictures, require_report
    from monoloss_plugin.hub.measuring import measure

    for option, given in (("--baseline", baseline), ("--train", train), ("--images", images)):
        if given is not None and features is None:
            raise typer.BadParameter("needs --features to measure on", param_hint=option)
    if report is not None:
        require_report(report)  # before the long work
    opened = None if features is None else FeatureSet.open(features)
    pictures, measured = None, {}
    if images is not None:
        pictures = find_pictures(local_path(images) or images, opened)
    if opened is not None:
        measured = measure(
            folder,
            opened,
            baseline=baseline,
            train=None if train is None else FeatureSet.open(train),
            raw=raw,
            find_images=pictures is not None,
        )
    done = publish_sae(
        folder,
        repository,
        **measured,
        sae_id=name,
        features=opened,
        images=pictures,
        report=report,
        unit_norm=False if raw else None,
        take_any_norm=take_any_norm,
        base_model=base_model,
        dataset=dataset,
        **{**upload, "tags": upload["tags"] or ()},
    )
    return _output(done, f"SAE.from_pretrained({done.repo_id!r}, {done.name!r})")


@command(publish, _upload_options)
def features(
    folder: Annotated[Path, typer.Argument(help="A folder that monoloss extract wrote.")],
    repository: _Repository,
    split: Annotated[
        str | None,
        typer.Option(help="The split's name; by default that of the source, or else train."),
    ] = None,
    config: Annotated[
        str, typer.Option(help="A name that tells the features of several encoders apart.")
    ] = "default",
    source_dataset: Annotated[
        str | None, typer.Option(help="The images' repository on the Hub, for the card.")
    ] = None,
    **upload: Any,
) -> Output:
    """Publish features as a dataset of Parquet files."""
    from monoloss_plugin.hub import publish_features

    done = publish_features(
        folder,
        repository,
        split=split,
        config=config,
        source_dataset=source_dataset,
        **{**upload, "tags": upload["tags"] or ()},
    )
    return _output(
        done, f"datasets.load_dataset({done.repo_id!r}, {config!r}, split={done.name!r})"
    )


@command(publish, _upload_options, "all")
def publish_collection(
    folder: Annotated[
        Path,
        typer.Argument(help="A folder with SAEs in models/ and features in datasets/."),
    ],
    repository: Annotated[
        str,
        typer.Argument(help="USER/NAME for the SAEs; the features go to USER/NAME-features."),
    ],
    features: Annotated[
        bool, typer.Option("--features/--no-features", help="Publish the features too.")
    ] = True,
    **upload: Any,
) -> Output:
    """Publish a folder of SAEs and features, and a page of the Hub that links to both."""
    from monoloss_plugin.cli.hub_errors import explain
    from monoloss_plugin.hub import CollectionPageError, publish_all

    failure = ""
    try:
        done = publish_all(
            folder, repository, features=features, **{**upload, "tags": upload["tags"] or ()}
        )
    except CollectionPageError as error:
        done, reason = error.published, error.__cause__ or error
        failure = str(CollectionPageError(done, explain(reason) or reason))
    rows = [
        (one.repo_id, file.path, decimal(file.size), file.change)
        for one in done.repositories
        for file in one.files
    ]
    said = [_summary(one) for one in done.repositories]
    said.append(f"in all: {len(rows)} files; {decimal(done.size)} of them new or changed")
    if done.page is not None:
        said.append(f"page: {done.page}")
        said.append(f"list the SAEs: monoloss pretrained {repository}")
    content = {
        "saes": _content(done.saes),
        "features": None if done.features is None else _content(done.features),
        "page": done.page,
        "size": done.size,
    }
    return Output(content, [table("repository", "file", "size", "", rows=rows), *said], failure)


def pretrained(
    repository: Annotated[
        str,
        typer.Argument(
            help="USER/NAME on the Hub, digits or photos (bundled), or a folder such as ./saes."
        ),
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
) -> Output:
    """List the SAEs of a repository."""
    from monoloss_plugin.hub import list_pretrained

    found = list_pretrained(local_path(repository) or repository, revision)
    if not found:
        raise FileNotFoundError(f"{repository} holds no SAE in SAELens's format")
    rows = []
    for one in found:
        losses = [f"{term.get('name')} {term.get('lam')}" for term in one.record.losses]
        metrics = (one.record.metrics.get(name) for name in ("r2", "monoscore"))
        rows.append(
            (
                one.sae_id,
                f"{one.d_in} to {one.d_sae}",
                ", ".join(losses) or "none",
                *("" if value is None else f"{value:.3f}" for value in metrics),
                decimal(one.size),
            )
        )
    header = ("SAE", "size", "losses", "R²", "MonoScore", "bytes")
    content = {"repository": repository, "saes": [asdict(one) for one in found]}
    return Output(content, [table(*header, rows=rows)])


def convert(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint's file, or the folder that the library wrote.")
    ],
    out: Annotated[Path, typer.Argument(help="A new folder for the SAE.")],
    library: Annotated[
        str,
        typer.Option(
            "--from",
            help="What wrote it: monoloss, dictionary-learning, overcomplete, sparsify.",
            callback=one_of("monoloss", "dictionary-learning", "overcomplete", "sparsify"),
        ),
    ],
    features: Annotated[
        Path | None,
        typer.Option(
            help="For a BatchTopK SAE of monoloss: features. 32 batches of them set its threshold."
        ),
    ] = None,
    dict_class: Annotated[
        str | None, typer.Option("--class", help="The SAE's class, if there is no config.json.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="k of overcomplete's TopKSAE.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="The running_threshold of overcomplete's BatchTopKSAE.")
    ] = None,
) -> Output:
    """Convert another library's SAE to SAELens's format, to load or publish it."""
    from monoloss_plugin import convert as converters
    from monoloss_plugin.features import FeatureSet

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out: {out} is there already; give a new folder")
    if library == "monoloss":
        opened = None if features is None else FeatureSet.open(features)
        converted = converters.from_monoloss(source, features=opened)
    elif library == "dictionary-learning":
        converted = converters.from_dictionary_learning(source, dict_class=dict_class)
    elif library == "overcomplete":
        converted = converters.from_overcomplete(
            source, sae_class=dict_class, top_k=top_k, threshold=threshold
        )
    else:
        converted = converters.from_sparsify(source)
    converted.save_model(out)
    cfg = converted.cfg
    content = {
        "folder": out,
        "architecture": cfg.architecture(),
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
    }
    return Output(content, [f"{cfg.architecture()}, {cfg.d_in} to {cfg.d_sae} latents: {out}"])


def _output(done: Publication, loading: str) -> Output:
    files = [(file.path, decimal(file.size), file.change) for file in done.files]
    said = [_summary(done)]
    if done.commit is not None:
        said.append(f"load it: {loading}")
    content = {**_content(done), "loading": loading}
    return Output(content, [table("file", "size", "", rows=files), *said])


def _summary(done: Publication) -> str:
    """Return a line that says what was uploaded, or would be."""
    size = decimal(done.size)
    if done.commit is None:
        return f"dry run: {size} would be uploaded to {done.url}"
    if done.size:
        return f"{size} uploaded to {done.url} (commit {done.commit[:8]})"
    return f"nothing to upload: {done.url} has all files already"


def _content(done: Publication) -> dict[str, Any]:
    return {**asdict(done), "size": done.size}
