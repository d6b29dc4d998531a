"""Extraction on real encoders and image files: equal to a plain loop, whatever happens to it."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from monoloss_plugin.features import FeatureSet, forward, shards, whole
from monoloss_plugin.features.encoders import Encoder, load_encoder
from monoloss_plugin.features.extraction import TooManyUnreadableError, extract
from monoloss_plugin.features.shards import SettingsError
from monoloss_plugin.features.sources import open_source
from tests.features.conftest import BAD
from tests.features.test_sources import digits_dataset

NAMES = [
    "timm:local-dir:{}/timm/vit",
    "transformers:{}/transformers/clip",
    "open_clip:local-dir:{}/open_clip/vit",
]
QUIET = {"progress": False, "workers": 0}


def plain_loop(encoder: Encoder, folder: Path) -> dict[str, Tensor]:
    """One image at a time, in float32."""
    features = {}
    for path in sorted(folder.rglob("*.*g")):
        name = path.relative_to(folder).as_posix()
        if name in BAD:
            continue
        inputs = encoder.preprocess(Image.open(path).convert(encoder.mode))
        inputs = (
            {k: v[None] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[None]
        )
        with torch.no_grad():
            features[name] = encoder.forward(inputs)[0]
    return features


@pytest.fixture
def vit(encoders: Path) -> str:
    return NAMES[0].format(encoders)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", NAMES, ids=["timm", "transformers", "open_clip"])
def test_a_folder_of_images_becomes_their_features(
    name, workers, encoders, image_folder, tmp_path
) -> None:
    name = name.format(encoders)
    expected = plain_loop(load_encoder(name), image_folder)
    assert len(expected) == 150
    done = extract(
        image_folder,
        name,
        tmp_path / "out",
        dtype="float32",
        workers=workers,
        batch_size=16,
        shard_size=50,
        progress=False,
    )
    assert done.complete
    assert (done.images, done.rows) == (150, 150)
    assert {bad["image_id"] for bad in done.unreadable} == BAD
    features = FeatureSet.open(tmp_path / "out")
    ids = features.ids_of(torch.arange(150))
    assert ids == sorted(expected)
    torch.testing.assert_close(features.tensor(), torch.stack([expected[i] for i in ids]))
    assert [features.classes[y] for y in features.labels] == [i.split("/")[0] for i in ids]
    assert features.record.encoder == json.loads(json.dumps(load_encoder(name).record)) | {
        "mode": "RGB"
    }
    # Every batch of a shard is in one piece.
    assert features.dataset.data.column("features").num_chunks == 4


def test_the_folder_is_a_dataset_for_anyone(vit, image_folder, tmp_path) -> None:
    extract(image_folder, vit, tmp_path / "out", shard_size=64, **QUIET)
    dataset = datasets.load_from_disk(tmp_path / "out")
    assert dataset.features["features"].length == 32
    assert dataset.features["features"].feature.dtype == "float16"
    assert dataset.features["label"].names[3] == "digit-3"
    assert len(dataset) == 150
    said = json.loads(dataset.info.description)
    assert said["encoder"]["library"] == "timm"
    assert said["source"] == open_source(image_folder).record
    assert said["versions"]["torch"] == version("torch")
    assert str(tmp_path) not in (tmp_path / "out" / "features.json").read_text()
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        "data-00000.arrow",
        "data-00001.arrow",
        "data-00002.arrow",
        "dataset_info.json",
        "extraction.json",
        "features.json",
        "state.json",
    }


def test_doing_it_again_does_nothing(vit, image_folder, tmp_path) -> None:
    first = extract(image_folder, vit, tmp_path / "out", **QUIET)
    again = extract(image_folder, vit, tmp_path / "out", **QUIET)
    assert (again.images, again.rows, again.complete) == (0, first.rows, True)
    assert again.unreadable == first.unreadable


class StopsAfter:
    """An encoder that is interrupted after some batches."""

    def __init__(self, encoder: Encoder, batches: int) -> None:
        self.forward, self.left = encoder.forward, batches + 3  # the probes of width and memory

    def __call__(self, inputs):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.forward(inputs)


@pytest.mark.parametrize("batches", [1, 3, 7, 12])
@pytest.mark.parametrize("streaming", [False, True])
def test_an_interrupted_run_goes_on_where_it_was(
    batches, streaming, vit, image_folder, tmp_path
) -> None:
    whole = load_encoder(vit)
    source = image_folder
    if streaming:
        source = open_source(image_folder).rows.to_iterable_dataset()
    options = {"batch_size": 10, "shard_size": 40, **QUIET}
    extract(source, whole, tmp_path / "whole", **options)
    stopping = Encoder(
        whole.model, whole.preprocess, StopsAfter(whole, batches - 2), whole.record, whole.mode
    )
    with pytest.raises(KeyboardInterrupt):
        extract(source, stopping, tmp_path / "out", **options)
    resumed = extract(source, whole, tmp_path / "out", **options)
    assert resumed.complete
    assert resumed.images == 150 - (150 - resumed.images)
    assert resumed.images < 150 or batches == 1
    assert {bad["image_id"] for bad in resumed.unreadable} == BAD
    assert same_rows(tmp_path / "out", tmp_path / "whole")


def same_rows(one: Path, other: Path) -> bool:
    a, b = FeatureSet.open(one), FeatureSet.open(other)
    assert a.ids.to_pylist() == b.ids.to_pylist()
    assert torch.equal(a.labels, b.labels)
    torch.testing.assert_close(a.tensor(), b.tensor(), rtol=2e-3, atol=2e-3)
    return True


SCRIPT = """
import sys, time
from monoloss_plugin.features.encoders import Encoder, load_encoder
from monoloss_plugin.features.extraction import extract

encoder = load_encoder(sys.argv[1])
def slowly(inputs):
    time.sleep(float(sys.argv[4]))
    return encoder.forward(inputs)
slow = Encoder(encoder.model, encoder.preprocess, slowly, encoder.record, encoder.mode)
extract(sys.argv[2], slow, sys.argv[3], batch_size=8, shard_size=48, workers=1, progress=False)
"""


def test_a_killed_process_loses_nothing_that_was_written(vit, image_folder, tmp_path) -> None:
    """SIGKILL in the middle of a shard, then to the end."""
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, vit, image_folder, out, "0.2"])
    deadline = time.monotonic() + 60
    while written(out) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = written(out)
    assert kept >= 3
    assert not shards.is_complete(out)
    with pytest.raises(ValueError, match="is not complete; run it again to go on"):
        FeatureSet.open(out)
    done = extract(image_folder, vit, out, batch_size=8, shard_size=48, **QUIET)
    assert done.complete
    assert done.images <= 150 - 8 * (kept - 2)  # a batch of three unreadable images at most
    extract(image_folder, vit, tmp_path / "whole", batch_size=8, shard_size=48, **QUIET)
    assert same_rows(out, tmp_path / "whole")


def written(out: Path) -> int:
    """Batches that are safe: in finished shards and in journals."""
    if not out.exists():
        return 0
    whole = len(list(out.glob("data-*.json"))) * 6
    for journal in out.glob("data-*.journal"):
        whole += journal.read_bytes().count(b"source_rows")
    return whole


def test_a_torn_end_of_a_journal_is_left_out(vit, image_folder, tmp_path) -> None:
    whole = load_encoder(vit)
    options = {"batch_size": 10, "shard_size": 200, **QUIET}
    extract(image_folder, whole, tmp_path / "whole", **options)
    for cut in range(0, 3000, 250):
        out = tmp_path / f"cut-{cut}"
        stopping = Encoder(
            whole.model, whole.preprocess, StopsAfter(whole, 3), whole.record, whole.mode
        )
        with pytest.raises(KeyboardInterrupt):
            extract(image_folder, stopping, out, **options)
        (journal,) = out.glob("*.journal")
        content = bytearray(journal.read_bytes())
        assert len(content) > 3000
        torn = content[: len(content) - cut]
        if cut % 500 == 0:
            torn[-200:-100] = bytes(100)  # a page that never reached the disk
        journal.write_bytes(torn)
        extract(image_folder, whole, out, **options)
        assert same_rows(out, tmp_path / "whole")


def test_two_processes_give_what_one_gives(vit, image_folder, tmp_path) -> None:
    options = ["--batch-size", "8", "--shard-size", "20", "--workers", "0"]
    command = [sys.executable, "-m", "monoloss_plugin", "extract", str(image_folder)]
    command += ["--encoder", vit, *options]
    processes = [
        subprocess.Popen(
            [*command, "--out", str(tmp_path / "two")],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    extract(image_folder, vit, tmp_path / "one", batch_size=8, shard_size=20, **QUIET)
    for one in sorted((tmp_path / "one").glob("*.arrow")):
        assert one.read_bytes() == (tmp_path / "two" / one.name).read_bytes()
    records = [json.loads((tmp_path / n / "features.json").read_text()) for n in ("one", "two")]
    assert records[0] == records[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_shares_of_separate_machines_join(streaming, vit, image_folder, tmp_path) -> None:
    source = image_folder
    if streaming:
        source = open_source(image_folder).rows.to_iterable_dataset()
    options = {"batch_size": 8, "shard_size": 20, **QUIET}
    shares = [extract(source, vit, tmp_path / f"{i}", shard=(i, 3), **options) for i in range(3)]
    assert not any(share.complete for share in shares)
    assert sum(share.images for share in shares) == 150
    whole.join(tmp_path / "0", [tmp_path / "1", tmp_path / "2"])
    extract(source, vit, tmp_path / "whole", **options)
    assert same_rows(tmp_path / "0", tmp_path / "whole")
    extract(image_folder, vit, tmp_path / "other", batch_size=8, shard_size=30, **QUIET)
    with pytest.raises(SettingsError, match="begun with other settings"):
        whole.join(tmp_path / "other", [tmp_path / "1"])


def test_a_stream_gives_what_the_files_give(vit, digit_images, tmp_path) -> None:
    dataset = digits_dataset(digit_images)
    options = {"batch_size": 7, "shard_size": 25, "progress": False, "workers": 2}
    extract(dataset, vit, tmp_path / "mapped", **options)
    streamed = extract(dataset.to_iterable_dataset(), vit, tmp_path / "streamed", **options)
    assert streamed.complete
    assert same_rows(tmp_path / "streamed", tmp_path / "mapped")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "float32"}, "dtype: 'float16' there, 'float32' now"),
        ({"output": "cls"}, "encoder.output: 'pooled' there, 'cls' now"),
        ({"shard_size": 30}, "shard_size: 1024 there, 30 now"),
        ({"autocast": "bfloat16"}, "autocast: None there, 'bfloat16' now"),
        ({"split": "digit-3"}, "source.images: 153 there"),
    ],
)
def test_a_run_with_other_settings_is_refused(change, said, vit, image_folder, tmp_path) -> None:
    extract(image_folder, vit, tmp_path / "out", **QUIET)
    with pytest.raises(SettingsError, match=said):
        extract(image_folder, vit, tmp_path / "out", **{**QUIET, **change})


def test_a_folder_of_something_else_is_left_alone(vit, image_folder, tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SettingsError, match="holds something else"):
        extract(image_folder, vit, tmp_path, **QUIET)


def test_too_many_unreadable_images_stop_the_run_and_it_can_go_on(
    vit, image_folder, tmp_path
) -> None:
    with pytest.raises(
        TooManyUnreadableError,
        match=r"3 images .* max_unreadable=2, the last of them digit-4/trunc",
    ):
        extract(image_folder, vit, tmp_path / "out", max_unreadable=2, batch_size=8, **QUIET)
    done = extract(image_folder, vit, tmp_path / "out", max_unreadable=3, batch_size=8, **QUIET)
    assert done.complete
    assert 0 < done.images < 150


def test_the_limit_holds_when_the_run_is_started_again(vit, image_folder, tmp_path) -> None:
    options = {"max_unreadable": 2, "batch_size": 8, **QUIET}
    for _ in range(5):
        with pytest.raises(TooManyUnreadableError):
            extract(image_folder, vit, tmp_path / "out", **options)
    assert not shards.is_complete(tmp_path / "out")


def test_an_image_whose_features_are_not_finite_is_left_out(vit, image_folder, tmp_path) -> None:
    named = load_encoder(vit)

    def sometimes(inputs: Tensor) -> Tensor:
        features = named.forward(inputs)
        features[2::7] = float("nan")
        return features

    own = Encoder(named.model, named.preprocess, sometimes, {"name": "sometimes"})
    done = extract(image_folder, own, tmp_path / "out", batch_size=150, shard_size=200, **QUIET)
    extract(image_folder, vit, tmp_path / "whole", batch_size=150, shard_size=200, **QUIET)
    listed = [bad for bad in done.unreadable if "not finite" in bad["error"]]
    whole = FeatureSet.open(tmp_path / "whole")
    ids = whole.ids.to_pylist()
    source = open_source(image_folder)
    assert len(listed) > 15
    assert all(source[bad["row"]].image_id == bad["image_id"] for bad in listed)
    kept = [i for i, name in enumerate(ids) if name not in {bad["image_id"] for bad in listed}]
    found = FeatureSet.open(tmp_path / "out")
    assert found.ids.to_pylist() == [ids[i] for i in kept]
    torch.testing.assert_close(found.tensor(), whole.tensor()[kept])


def test_a_split_of_any_name_can_be_opened(vit, image_folder, tmp_path) -> None:
    (image_folder / "digit-3").rename(image_folder / "train-clean")
    extract(image_folder, vit, tmp_path / "out", split="train-clean", **QUIET)
    assert FeatureSet.open(tmp_path / "out").record.source["split"] == "train-clean"


def test_another_dataset_of_the_same_length_is_refused(vit, digit_images, tmp_path) -> None:
    dataset = digits_dataset(digit_images)
    extract(dataset, vit, tmp_path / "out", shard=(0, 2), shard_size=20, **QUIET)
    with pytest.raises(SettingsError, match="sample_sha256"):
        extract(dataset.shuffle(seed=1), vit, tmp_path / "out", shard_size=20, **QUIET)


@pytest.mark.parametrize("rows", [40, 45])
def test_a_stream_may_be_shared_by_more_processes_than_it_has_shards(
    rows, vit, digit_images, tmp_path
) -> None:
    stream = digits_dataset(digit_images[:rows]).to_iterable_dataset()
    options = {"shard_size": 20, "batch_size": 7, **QUIET}
    for part in (5, 4, 3, 2, 1, 0):
        done = extract(stream, vit, tmp_path / "out", shard=(part, 6), **options)
    assert done.complete
    record = json.loads((tmp_path / "out" / "features.json").read_text())
    assert (record["rows"], record["source_rows"]) == (rows, rows)


def test_a_stream_killed_at_its_end_is_completed_by_other_shares(
    vit, digit_images, tmp_path, monkeypatch
) -> None:
    stream = digits_dataset(digit_images[:40]).to_iterable_dataset()
    options = {"shard_size": 20, "batch_size": 20, **QUIET}

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shards, "note_source_rows", killed)
        for part in (0, 1):
            with pytest.raises(KeyboardInterrupt):
                extract(stream, vit, tmp_path / "out", shard=(part, 2), **options)
    assert sorted(shards.finished(tmp_path / "out")) == [0, 1]
    done = [extract(stream, vit, tmp_path / "out", shard=(i, 3), **options) for i in range(3)]
    assert done[-1].complete
    assert (done[-1].rows, sum(one.images for one in done)) == (40, 0)


def test_a_run_that_another_one_overtakes_leaves_its_result_alone(
    vit, image_folder, tmp_path
) -> None:
    named, out = load_encoder(vit), tmp_path / "out"
    options = {"batch_size": 16, "shard_size": 40, **QUIET}
    calls = []

    def overtaken(inputs: Tensor) -> Tensor:
        calls.append(len(inputs))
        if len(calls) == 3:
            extract(image_folder, vit, out, **options)
            before.update({path.name: path.stat().st_mtime_ns for path in out.iterdir()})
        return named.forward(inputs)

    before: dict[str, int] = {}
    slow = Encoder(named.model, named.preprocess, overtaken, named.record)
    done = extract(image_folder, slow, out, **options)
    assert done.complete
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert whole.verify(out) == []


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def unfinished(folder: Path, name: str, machine: str, process: int) -> Path:
    """Leave what a killed process leaves of a file."""
    path = folder / f".{name}.unfinished-{machine}-{process}-0123abcd"
    path.write_bytes(b"half of it")
    return path


def test_what_killed_runs_left_is_swept_up(vit, image_folder, tmp_path) -> None:
    out, here = tmp_path / "out", platform.node()
    extract(image_folder, vit, out, shard=(0, 2), shard_size=40, **QUIET)
    (out / "data-00000.journal").write_bytes(b"")
    left = unfinished(out, "data-00001.arrow", here, dead_process())
    kept = [unfinished(out, "state.json", "elsewhere", 1), unfinished(out, "x", here, os.getpid())]
    extract(image_folder, vit, out, shard=(0, 2), shard_size=40, **QUIET)
    assert [path.exists() for path in (left, *kept)] == [False, True, True]
    extract(image_folder, vit, out, shard_size=40, **QUIET)
    assert {path.suffix for path in out.iterdir()} == {".arrow", ".json"}
    # Killed between its last file and its sweeping.
    (out / "data-00000.json").write_text("{}")
    unfinished(out, "features.json", "elsewhere", 1)
    extract(image_folder, vit, out, shard_size=40, **QUIET)
    assert len(list(out.iterdir())) == 4 + 4


def test_a_killed_join_is_swept_up_by_the_next(vit, image_folder, tmp_path, monkeypatch) -> None:
    for part in (0, 1):
        extract(image_folder, vit, tmp_path / f"{part}", shard=(part, 2), shard_size=40, **QUIET)
    joined = tmp_path / "joined"
    process = os.fork()
    if process == 0:
        monkeypatch.setattr(whole.shutil, "copyfileobj", lambda *_: os._exit(9))
        whole.join(joined, [tmp_path / "0"])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert [path.name[:17] for path in joined.glob(".*")] == [".data-00000.arrow"]
    assert not whole.join(joined, [tmp_path / "0"])
    assert list(joined.glob(".*")) == []
    assert whole.join(joined, [tmp_path / "1"])


def test_nothing_is_written_through_a_link(vit, image_folder, tmp_path) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    extract(image_folder, vit, out, shard=(0, 2), shard_size=40, **QUIET)
    outside.write_text("years of work")
    for name in ("data-00001.arrow", "state.json", "dataset_info.json", "source_rows.json"):
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(outside)
    with pytest.raises(ValueError, match=r"source_rows\.json was cut or overwritten"):
        extract(image_folder, vit, out, shard_size=40, **QUIET)
    (out / "source_rows.json").unlink()
    (out / "data-00001.journal").symlink_to(outside)
    with pytest.raises(ValueError, match=r"data-00001\.journal is a link, which is not followed"):
        extract(image_folder, vit, out, shard_size=40, **QUIET)
    (out / "data-00001.journal").unlink()
    assert extract(image_folder, vit, out, shard_size=40, **QUIET).complete
    (tmp_path / "joined").mkdir()
    (tmp_path / "joined" / "extraction.json").symlink_to(tmp_path / "nowhere")
    whole.join(tmp_path / "joined", [out])
    for folder in (out, tmp_path / "joined"):
        assert not any(path.is_symlink() for path in folder.iterdir())
        assert whole.verify(folder) == []
    assert outside.read_text() == "years of work"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("lost", ["data-00001.arrow", "state.json", "dataset_info.json"])
def test_a_damaged_set_is_repaired_by_running_again(lost, vit, image_folder, tmp_path) -> None:
    out = tmp_path / "out"
    extract(image_folder, vit, out, shard_size=40, **QUIET)
    before = FeatureSet.open(out).tensor().clone()
    (out / lost).unlink()
    assert whole.verify(str(out)) == [f"{lost}: missing"]
    with pytest.raises(ValueError, match=f"is damaged .{lost}: missing.; run its extraction again"):
        FeatureSet.open(out)
    repaired = extract(image_folder, vit, out, shard_size=40, **QUIET)
    assert repaired.complete
    # One of the shard's 40 images cannot be read.
    assert repaired.images == (39 if lost.startswith("data-0") else 0)
    assert whole.verify(out) == []
    torch.testing.assert_close(FeatureSet.open(out).tensor(), before, rtol=2e-3, atol=2e-3)


def test_settings_that_were_cut_or_overwritten_are_found_and_repaired(
    vit, image_folder, tmp_path
) -> None:
    out = tmp_path / "out"
    extract(image_folder, vit, out, shard_size=80, **QUIET)
    for name in ("state.json", "dataset_info.json"):
        whole_file = (out / name).read_bytes()
        for content in (whole_file[:-20], b"", b"{}", whole_file.replace(b"1", b"2")):
            (out / name).write_bytes(content)
            assert whole.verify(out) == [f"{name}: altered, its checksum differs"]
            with pytest.raises(ValueError, match=f"is damaged .{name}: altered"):
                FeatureSet.open(out)
            assert extract(image_folder, vit, out, shard_size=80, **QUIET).images == 0
            assert whole.verify(out) == []
            assert (out / name).read_bytes() == whole_file
    (out / "features.json").write_bytes(b"")
    for look in (whole.verify, FeatureSet.open):
        with pytest.raises(
            ValueError, match=r"features\.json was cut or overwritten .*; delete it"
        ):
            look(out)
    (out / "features.json").unlink()
    assert extract(image_folder, vit, out, shard_size=80, **QUIET).images == 150
    assert whole.verify(out) == []


def test_joining_takes_complete_sets_and_refuses_damaged_shards(
    vit, image_folder, tmp_path
) -> None:
    extract(image_folder, vit, tmp_path / "a", shard_size=40, **QUIET)
    assert whole.join(tmp_path / "b", [tmp_path / "a"])
    assert same_rows(tmp_path / "a", tmp_path / "b")
    shard = tmp_path / "a" / "data-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not as it was written"):
        whole.join(tmp_path / "c", [tmp_path / "a"])


def test_other_versions_are_said_and_not_refused(vit, image_folder, tmp_path, caplog) -> None:
    extract(image_folder, vit, tmp_path / "out", shard=(0, 2), shard_size=40, **QUIET)
    settings = json.loads((tmp_path / "out" / "extraction.json").read_text())
    settings["versions"]["torch"] = "2.3.0"
    (tmp_path / "out" / "extraction.json").write_text(json.dumps(settings))
    assert extract(image_folder, vit, tmp_path / "out", shard_size=40, **QUIET).complete
    assert "was begun with {" in caplog.text


def test_a_folder_of_nothing_readable_is_an_error(vit, tmp_path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not one of the first images could be read; a\.png"):
        extract(tmp_path / "images", vit, tmp_path / "out", **QUIET)


def test_an_empty_stream_is_an_error(vit, digit_images, tmp_path) -> None:
    empty = digits_dataset(digit_images).to_iterable_dataset().take(0)
    with pytest.raises(ValueError, match="empty stream"):
        extract(empty, vit, tmp_path / "out", **QUIET)


def test_an_encoder_of_your_own_need_not_resize(image_folder, tmp_path) -> None:
    """It is tried on an image of the source, never on one of another size."""
    flat = torch.nn.Flatten()
    own = Encoder(flat, lambda image: pil_to_tensor(image) / 255, flat, {"name": "pixels"}, "L")
    done = extract(image_folder, own, tmp_path / "out", **QUIET)
    assert FeatureSet.open(done.folder).width == 20 * 24


def test_features_that_overflow_are_left_out_and_listed(vit, image_folder, tmp_path) -> None:
    encoder = load_encoder(vit)
    huge = Encoder(
        encoder.model, encoder.preprocess, lambda x: encoder.forward(x) * 1e6, {"name": "huge"}
    )
    with pytest.raises(TooManyUnreadableError, match=r"features not finite as torch\.float16; fl"):
        extract(image_folder, huge, tmp_path / "out", **QUIET)
    assert extract(image_folder, huge, tmp_path / "wide", dtype="float32", **QUIET).complete


def test_verify_finds_what_was_cut_altered_or_lost(vit, image_folder, tmp_path) -> None:
    out = tmp_path / "out"
    extract(image_folder, vit, out, shard_size=30, **QUIET)
    read: list[int] = []
    assert whole.verify(out, read.append) == []
    assert sum(read) == sum(path.stat().st_size for path in out.glob("*.arrow"))
    content = bytearray((out / "data-00001.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "data-00001.arrow").write_bytes(content)
    size = (out / "data-00002.arrow").stat().st_size
    (out / "data-00002.arrow").write_bytes((out / "data-00002.arrow").read_bytes()[:-100])
    (out / "data-00004.arrow").unlink()
    assert whole.verify(out) == [
        "data-00001.arrow: altered, its checksum differs",
        f"data-00002.arrow: {size - 100} bytes instead of {size}",
        "data-00004.arrow: missing",
    ]
    with pytest.raises(FileNotFoundError, match="no feature dataset in"):
        whole.verify(image_folder)


def test_autocast_is_close_to_full_precision(vit, image_folder, tmp_path) -> None:
    for autocast in (None, "bfloat16"):
        extract(image_folder, vit, tmp_path / f"{autocast}", autocast=autocast, **QUIET)
    a, b = (FeatureSet.open(tmp_path / f"{name}").tensor().float() for name in (None, "bfloat16"))
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "int8"}, "dtype: "),
        ({"autocast": "float8"}, "autocast: "),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"workers": -1}, "workers: expected at least 0"),
        ({"max_unreadable": -1}, "max_unreadable: expected at least 0"),
        ({"shard": (2, 2)}, "shard: expected"),
    ],
)
def test_arguments_out_of_range_are_named(change, said, vit, image_folder, tmp_path) -> None:
    with pytest.raises(ValueError, match=said):
        extract(image_folder, vit, tmp_path / "out", **{**QUIET, **change})
    assert not (tmp_path / "out").exists()


def test_an_encoder_of_your_own_takes_no_name_options(vit, image_folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="given by name"):
        extract(image_folder, load_encoder(vit), tmp_path / "out", output="cls", **QUIET)


def test_other_weights_of_an_encoder_of_your_own_are_refused(vit, image_folder, tmp_path) -> None:
    named = load_encoder(vit)
    own = Encoder(named.model, named.preprocess, named.forward, {"name": "mine"})
    extract(image_folder, own, tmp_path / "out", **QUIET)
    with torch.no_grad():
        named.model.norm.weight[0] += 1e-3
    with pytest.raises(SettingsError, match="weights_sha256"):
        extract(image_folder, own, tmp_path / "out", **QUIET)


def test_a_batch_too_large_for_the_device_is_encoded_in_halves(
    vit, image_folder, tmp_path, caplog
) -> None:
    named = load_encoder(vit)
    sizes = []

    def small_device(inputs: Tensor) -> Tensor:
        sizes.append(len(inputs))
        if len(inputs) > 5:
            raise torch.cuda.OutOfMemoryError
        return named.forward(inputs)

    small = Encoder(named.model, named.preprocess, small_device, named.record)
    extract(image_folder, small, tmp_path / "small", batch_size=16, **QUIET)
    assert sizes.count(16) > 1  # as it is asked for
    assert "encoding 16 images at once does not fit; encoding halves" in caplog.text
    extract(image_folder, vit, tmp_path / "whole", batch_size=16, **QUIET)
    assert same_rows(tmp_path / "small", tmp_path / "whole")
    sizes.clear()
    extract(image_folder, small, tmp_path / "adapted", shard_size=80, **QUIET)
    assert max(sizes) > 64
    assert max(sizes[-15:]) <= 5  # what did not fit is not tried again


def test_the_batch_size_follows_the_free_memory(vit, monkeypatch) -> None:
    encoder = load_encoder(vit)
    encode = forward.Forward(encoder, torch.device("cpu"), None)
    probe = encoder.preprocess(Image.new("RGB", (256, 256)))
    assert forward.fitting_batch_size(encode, probe).now == 256
    largest = 4 * 17 * 128 * 4  # bytes: four times the hidden layer's 17 tokens of 128 floats

    class Memory:
        available = 2 * 20 * largest

    monkeypatch.setattr(forward.psutil, "virtual_memory", lambda: Memory)
    assert forward.fitting_batch_size(encode, probe).now == 16
    monkeypatch.setattr(forward, "_SECONDS", 0.0)
    assert forward.fitting_batch_size(encode, probe).now == 1


def test_the_batch_size_follows_what_batches_take() -> None:
    size = forward.BatchSize(256, seconds=2.0)  # a busy machine
    assert size.now == 2
    size.measured(2, 0.2)
    assert size.now == 32
    size.measured(32, 0.1)
    assert size.now == 256  # what fits the memory
    size.measured(256, 600.0)
    assert size.now == 256  # one batch that had to wait
    for _ in range(3):
        size.measured(256, 25.6)
    assert size.now == 32
    given = forward.BatchSize(7)
    given.measured(7, 1e3)
    assert given.now == 7


@pytest.mark.parametrize(("workers", "streaming"), [(1, False), (1, True)])
def test_a_run_that_begins_on_a_busy_machine_becomes_quick(
    workers, streaming, vit, image_folder, tmp_path, monkeypatch
) -> None:
    """Rows, order and files are as of any batch size; killed in between, it goes on."""
    monkeypatch.setattr(forward, "_SECONDS", 0.2)
    named = load_encoder(vit)
    sizes: list[int] = []
    stopped: list[int] = []

    def busy_at_first(inputs: Tensor) -> Tensor:
        quick = max(sizes, default=0) >= 16
        sizes.append(len(inputs))
        if quick and not stopped:
            stopped.append(len(sizes))
            raise KeyboardInterrupt
        time.sleep(0.1 if len(sizes) <= 4 else 0)
        return named.forward(inputs)

    source = open_source(image_folder).rows.to_iterable_dataset() if streaming else image_folder
    slow = Encoder(named.model, named.preprocess, busy_at_first, named.record)
    options = {"shard_size": 120, "workers": workers, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        extract(source, slow, tmp_path / "out", **options)
    done = extract(source, slow, tmp_path / "out", **options)
    assert (done.complete, done.rows) == (True, 150)
    assert 0 < done.images < 150 - 16
    assert sizes[3] <= 4
    extract(source, vit, tmp_path / "whole", batch_size=50, shard_size=120, **QUIET)
    assert same_rows(tmp_path / "out", tmp_path / "whole")
