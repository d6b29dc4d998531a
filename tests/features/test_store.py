"""The folder of a feature set: equal whatever is killed, shared, damaged or joined on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from monoloss_plugin.features import FeatureSet, extraction, store
from monoloss_plugin.features.encoders import Encoder
from monoloss_plugin.features.extraction import extract
from monoloss_plugin.features.shards import EncodedRows, ShardWriter, features_schema, shards_in
from monoloss_plugin.features.sources import open_source
from monoloss_plugin.features.store import BusyError, SettingsError, join, verify
from tests.features.test_sources import digits_dataset

OPTIONS = {"batch_size": 10, "workers": 0, "progress": False, "save_every": 0}
"""Every batch is a shard."""


@pytest.fixture
def small_files(monkeypatch) -> None:
    """A set has several files, of about 40 rows each."""
    monkeypatch.setattr(store, "_LARGEST_FILE", 50_000)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def assert_equal(one: Path, other: Path) -> None:
    """Every feature, label and id is equal, and so are the records."""
    a, b = FeatureSet.open(one), FeatureSet.open(other)
    assert a.ids.to_pylist() == b.ids.to_pylist()
    assert torch.equal(a.labels, b.labels)
    assert torch.equal(a.tensor(), b.tensor())
    assert a.record == b.record
    assert verify(one) == []


# One process imports what extraction needs, and copies of it are killed.
KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import numpy, torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from monoloss_plugin.features.encoders import Encoder, PatchTokens
from monoloss_plugin.features import store
from monoloss_plugin.features.extraction import extract

store._LARGEST_FILE = 2_000
torch.set_num_threads(1)
root = Path(sys.argv[1])
images = root / "images"
images.mkdir()
for number in range(30):
    pixels = numpy.random.default_rng(number).integers(0, 256, (8, 8), numpy.uint8)
    Image.fromarray(pixels).save(images / f"{number:02d}.png")
(images / "17.png").write_bytes(b"")

def run(out, before=lambda: None, save_every=0.0, seconds=0.0, log=None):
    "Start an extraction in a copy of this process, and return the copy's number."
    process = os.fork()
    if process == 0:
        def forward(inputs):
            time.sleep(seconds)
            if log is not None:
                os.write(log, b".")
            if sys.argv[2] == "patches":
                return PatchTokens(inputs[:, 0], (2, 4), class_token=inputs[:, 0, 0])
            return torch.flatten(inputs, 1)
        before()
        model = torch.nn.Identity()
        encoder = Encoder(model, lambda image: pil_to_tensor(image) / 255, forward, {}, "L")
        options = {"save_every": save_every, "workers": 0, "progress": False}
        if sys.argv[2] == "patches":
            options["keep_patches"] = 6
        extract(images, encoder, root / out, batch_size=10, **options)
        os._exit(0)
    return process

def ended(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

def kill_before(change):
    "Make this process kill itself before a change of the folder, counted from 0."
    left = change
    def counting(function):
        def counted(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return counted
    os.replace, shutil.rmtree = counting(os.replace), counting(shutil.rmtree)

assert ended(run("whole")) == 0

change, code = 0, -9
while code == -9:
    out = f"killed-before-{change}"
    code = ended(run(out, lambda: kill_before(change)))
    assert code == 0 or ended(run(out)) == 0
    change += 1
assert code == 0

random.seed(0)
for _ in range(6):
    process = run("killed-at-random", seconds=0.05)
    time.sleep(random.uniform(0, 0.5))
    os.kill(process, signal.SIGKILL)
    ended(process)
assert ended(run("killed-at-random")) == 0

read, write = os.pipe()
process = run("unfinished", save_every=0.3, seconds=0.2, log=write)
encoded = -1  # the first is the one that tells the width
while encoded < 3:
    encoded += len(os.read(read, 1))
os.kill(process, signal.SIGKILL)
ended(process)
"""


@pytest.fixture(scope="module", params=["vectors", "patches"])
def killed(request, tmp_path_factory) -> Path:
    """A folder of sets whose extraction was killed and started again, and one that was not."""
    if not hasattr(os, "fork"):
        pytest.skip("needs copies of a process")
    root = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILLED, root, request.param]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root


def test_a_run_that_is_killed_and_started_again_gives_the_same_files(killed) -> None:
    whole = content(killed / "whole")
    assert len([name for name in whole if name.endswith(".arrow")]) > 2
    again = list(killed.glob("killed-*"))
    # Three shards and the settings; then every file of the complete set, and its parts' end.
    assert len(again) > 2 + 2 * 3 + len(whole) - 1
    for folder in again:
        assert content(folder) == whole, folder


def test_a_killed_run_loses_at_most_the_work_since_it_last_saved(killed) -> None:
    with pytest.raises(ValueError, match="is not complete; run it again to go on"):
        FeatureSet.open(killed / "unfinished")
    # Killed at its third batch; each takes 0.2 s, and it saves every 0.3 s.
    assert 10 <= shards_in(killed / "unfinished")[-1].rows.stop < 30


def test_two_processes_give_what_one_gives(pixels, image_folder, tmp_path, small_files) -> None:
    for part, images in ((1, 74), (0, 76)):  # of 153 files, 3 of them damaged
        done = extract(image_folder, pixels, tmp_path / "two", shard=(part, 2), **OPTIONS)
        assert done.images == images
    assert done.complete
    extract(image_folder, pixels, tmp_path / "one", **{**OPTIONS, "save_every": 60})
    assert_equal(tmp_path / "two", tmp_path / "one")


def test_processes_may_divide_the_work_in_other_ways(pixels, image_folder, tmp_path) -> None:
    """Shards that overlap do no harm, and the gaps between them are filled."""
    out = tmp_path / "out"
    extract(image_folder, pixels, out, shard=(1, 3), **OPTIONS)
    extract(image_folder, pixels, out, shard=(0, 2), **{**OPTIONS, "save_every": 60})
    # A process that knew nothing of the others: its shard overlaps two of theirs.
    writer = ShardWriter(out, features_schema(480, "float16", True, list("0123456789")), 0)
    writer.add(EncodedRows(range(45, 61), np.zeros((16, 480), np.float16), [0] * 16, ["x"] * 16))
    done = extract(image_folder, pixels, out, shard=(0, 1), **OPTIONS)
    assert done.complete
    extract(image_folder, pixels, tmp_path / "whole", **OPTIONS)
    assert_equal(out, tmp_path / "whole")


@pytest.mark.parametrize("streaming", [False, True])
def test_shares_of_separate_machines_join(
    streaming, pixels, image_folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(extraction, "_BLOCK", 20)
    source = image_folder
    if streaming:
        source = open_source(image_folder).rows.to_iterable_dataset()
    shares = [extract(source, pixels, tmp_path / f"{i}", shard=(i, 3), **OPTIONS) for i in range(3)]
    assert not any(share.complete for share in shares)
    assert sum(share.images for share in shares) == 150
    assert join(tmp_path / "0", [tmp_path / "1", tmp_path / "2"])
    extract(source, pixels, tmp_path / "whole", **OPTIONS)
    assert_equal(tmp_path / "0", tmp_path / "whole")
    extract(image_folder, pixels, tmp_path / "other", dtype="float32", **OPTIONS)
    with pytest.raises(SettingsError, match="begun with other settings"):
        join(tmp_path / "other", [tmp_path / "1"])


def test_joining_refuses_damaged_files_and_complete_sets(pixels, image_folder, tmp_path) -> None:
    extract(image_folder, pixels, tmp_path / "a", shard=(0, 2), **OPTIONS)
    file = next((tmp_path / "a" / "parts").glob("*.arrow"))
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=rf"{file.name} differs from its checksum; run its"):
        join(tmp_path / "b", [tmp_path / "a"])
    assert not list((tmp_path / "b").glob(".unfinished-*"))
    file.write_bytes(whole)
    assert not join(tmp_path / "b", [tmp_path / "a"])
    extract(image_folder, pixels, tmp_path / "a", shard=(1, 2), **OPTIONS)
    with pytest.raises(ValueError, match="a is complete already; open it as it is"):
        join(tmp_path / "b", [tmp_path / "a"])


@pytest.mark.parametrize("rows", [40, 45])
def test_a_stream_may_be_shared_by_more_processes_than_it_has_blocks(
    rows, pixels, digit_images, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(extraction, "_BLOCK", 20)
    stream = digits_dataset(digit_images[:rows]).to_iterable_dataset()
    for part in (5, 4, 3, 2, 1, 0):
        done = extract(stream, pixels, tmp_path / "out", shard=(part, 6), **OPTIONS)
    assert done.complete
    record = json.loads((tmp_path / "out" / "features.json").read_text())
    assert (record["rows"], record["source_rows"]) == (rows, rows)


def test_a_stream_killed_at_its_end_is_completed_by_other_shares(
    pixels, digit_images, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(extraction, "_BLOCK", 20)
    stream = digits_dataset(digit_images[:40]).to_iterable_dataset()

    with monkeypatch.context() as patched:
        patched.setattr(store, "note_total", lambda *_: None)
        for part in (0, 1):
            done = extract(stream, pixels, tmp_path / "out", shard=(part, 2), **OPTIONS)
    assert (done.rows, done.complete) == (40, False)
    done = [extract(stream, pixels, tmp_path / "out", shard=(i, 3), **OPTIONS) for i in range(3)]
    assert done[-1].complete
    assert (done[-1].rows, sum(one.images for one in done)) == (40, 0)


def test_a_folder_of_something_else_is_left_alone(pixels, image_folder, tmp_path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "thesis.txt").write_text("years of work")
    with pytest.raises(SettingsError, match="holds something else"):
        extract(image_folder, pixels, tmp_path, **OPTIONS)
    assert (tmp_path / "parts" / "thesis.txt").exists()


def test_a_run_that_another_one_overtakes_leaves_its_result_alone(
    pixels, image_folder, tmp_path
) -> None:
    out, calls = tmp_path / "out", []

    def overtaken(inputs):
        calls.append(len(inputs))
        if len(calls) == 3:
            extract(image_folder, pixels, out, shard=(0, 2), **OPTIONS)
            extract(image_folder, pixels, out, shard=(1, 2), **OPTIONS)
            before.update(content(out))
        return pixels.forward(inputs)

    before: dict[str, bytes] = {}
    slow = Encoder(pixels.model, pixels.preprocess, overtaken, pixels.record, pixels.mode)
    done = extract(image_folder, slow, out, **{**OPTIONS, "save_every": 60})
    assert done.complete
    assert before
    assert content(out) == before
    assert verify(out) == []


def busy(folder: Path) -> bool:
    """Say whether another process is refused the same share."""
    process = os.fork()
    if process == 0:
        try:
            with store.claim(folder, "share-0-of-1"):
                os._exit(0)
        except BusyError as error:
            os._exit(1 if "another process holds" in str(error) else 2)
    return {0: False, 1: True}[os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="copies of a process")
def test_two_processes_at_the_same_share_are_told(tmp_path) -> None:
    with store.claim(tmp_path, "share-0-of-1"):
        assert busy(tmp_path)
    assert not busy(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="copies of a process")
def test_processes_that_end_together_wait_for_the_one_that_completes(
    pixels, image_folder, tmp_path, monkeypatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(store, "complete", lambda _: False)
        extract(image_folder, pixels, out, **OPTIONS)
    write, started = store._write_set, time.perf_counter()
    monkeypatch.setattr(store, "_WAIT", 0.1)
    monkeypatch.setattr(store, "_write_set", lambda *given: (time.sleep(1), write(*given)))
    processes = []
    for _ in range(3):
        processes.append(os.fork())
        if processes[-1] == 0:
            try:
                os._exit(0 if store.complete(out) else 1)
            finally:  # whatever it raises, the copy must not go on with the other tests
                os._exit(2)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    assert codes == [0, 0, 0]
    assert time.perf_counter() - started >= 1
    assert verify(out) == []


def test_what_a_killed_process_left_goes_when_the_set_is_complete(
    pixels, image_folder, tmp_path
) -> None:
    out = tmp_path / "out"
    extract(image_folder, pixels, out, shard=(0, 2), **OPTIONS)
    (out / f".unfinished-{32 * '0'}").write_bytes(b"half of it")
    extract(image_folder, pixels, out, shard=(1, 2), **OPTIONS)
    names = {path.name for path in out.iterdir()}
    assert names == {
        f"{name}.json" for name in ("extraction", "features", "state", "dataset_info")
    } | {"data-00000-of-00001.arrow"}


def test_nothing_is_written_through_a_link(pixels, image_folder, tmp_path) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    extract(image_folder, pixels, out, shard=(0, 2), **OPTIONS)
    outside.write_text("years of work")
    for name in ("parts/0000000076-0000000086-01234567.arrow", "state.json", "features.json"):
        (out / name).symlink_to(outside)
    for name in ("share-1-of-2.lock", "total.json"):
        link = out / "parts" / name
        link.unlink(missing_ok=True)
        link.symlink_to(outside)
        (out / "features.json").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=rf"{name} (was cut or overwritten|is a link)"):
            extract(image_folder, pixels, out, shard=(1, 2), **OPTIONS)
        link.unlink()
    assert extract(image_folder, pixels, out, shard=(1, 2), **OPTIONS).complete
    assert not any(path.is_symlink() for path in out.iterdir())
    assert verify(out) == []
    (tmp_path / "joined").mkdir()
    (tmp_path / "joined" / "extraction.json").symlink_to(tmp_path / "nowhere")
    extract(image_folder, pixels, tmp_path / "part", shard=(0, 2), **OPTIONS)
    join(tmp_path / "joined", [tmp_path / "part"])
    assert not any(path.is_symlink() for path in (tmp_path / "joined").iterdir())
    assert outside.read_text() == "years of work"
    assert not (tmp_path / "nowhere").exists()


def test_parts_that_are_a_link_are_refused(pixels, image_folder, tmp_path) -> None:
    extract(image_folder, pixels, tmp_path / "out", shard=(0, 2), **OPTIONS)
    (tmp_path / "out" / "parts").rename(tmp_path / "elsewhere")
    (tmp_path / "out" / "parts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SettingsError, match="parts is a link, which is not followed"):
        extract(image_folder, pixels, tmp_path / "out", shard=(1, 2), **OPTIONS)


def data_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("data-*.arrow"))


@pytest.mark.parametrize("lost", ["data", "state.json", "dataset_info.json"])
def test_a_damaged_set_is_made_anew_by_running_again(
    lost, pixels, image_folder, tmp_path, small_files, caplog
) -> None:
    out = tmp_path / "out"
    extract(image_folder, pixels, out, **OPTIONS)
    before = content(out)
    path = data_files(out)[1] if lost == "data" else out / lost
    path.unlink()
    assert verify(str(out)) == [f"{path.name}: missing"]
    with pytest.raises(ValueError, match=f"is damaged .{path.name}: missing.; run its extraction"):
        FeatureSet.open(out)
    done = extract(image_folder, pixels, out, **OPTIONS)
    assert (done.complete, done.images) == (True, 150)
    assert f"is damaged ({path.name}: missing); making all of it again" in caplog.text
    assert content(out) == before


def test_settings_that_were_cut_or_overwritten_are_found(pixels, image_folder, tmp_path) -> None:
    out = tmp_path / "out"
    extract(image_folder, pixels, out, **OPTIONS)
    before = content(out)
    for name in ("state.json", "dataset_info.json"):
        for altered in (before[name][:-20], b"", before[name].replace(b"1", b"2")):
            (out / name).write_bytes(altered)
            (problem,) = verify(out)
            assert problem.startswith(f"{name}: ")
            with pytest.raises(ValueError, match=f"is damaged .{name}: "):
                FeatureSet.open(out)
        (out / name).write_bytes(before[name])
    (out / "features.json").write_bytes(b"")
    for look in (verify, FeatureSet.open):
        with pytest.raises(
            ValueError, match=r"features\.json was cut or overwritten .*; delete it"
        ):
            look(out)
    (out / "features.json").unlink()
    assert extract(image_folder, pixels, out, **OPTIONS).images == 150
    assert content(out) == before


def test_a_shard_in_the_making_that_is_damaged_is_made_again(
    pixels, image_folder, tmp_path
) -> None:
    out = tmp_path / "out"
    extract(image_folder, pixels, out, shard=(0, 2), **OPTIONS)
    cut, lost = sorted((out / "parts").glob("*.arrow"))[1:3]
    cut.write_bytes(cut.read_bytes()[:-10])
    lost.unlink()
    assert verify(out) == [f"parts/{cut.name}: altered, its checksum differs"]
    assert extract(image_folder, pixels, out, shard=(0, 2), **OPTIONS).images == 20
    assert verify(out) == []


def test_verify_finds_what_was_cut_altered_or_lost(
    pixels, image_folder, tmp_path, small_files
) -> None:
    out = tmp_path / "out"
    extract(image_folder, pixels, out, **OPTIONS)
    read: list[int] = []
    assert verify(out, read.append) == []
    first, second, third, *_ = data_files(out)
    assert sum(read) == sum(file.bytes for file in store.files_of(out).values())
    altered = bytearray(first.read_bytes())
    altered[len(altered) // 2] ^= 1
    first.write_bytes(altered)
    size = second.stat().st_size
    second.write_bytes(second.read_bytes()[:-100])
    third.unlink()
    assert verify(out) == [
        f"{first.name}: altered, its checksum differs",
        f"{second.name}: {size - 100} bytes instead of {size}",
        f"{third.name}: missing",
    ]
    with pytest.raises(FileNotFoundError, match="no feature dataset in"):
        verify(image_folder)


def test_other_versions_are_said_and_not_refused(pixels, image_folder, tmp_path, caplog) -> None:
    out = tmp_path / "out"
    extract(image_folder, pixels, out, shard=(0, 2), **OPTIONS)
    settings = json.loads((out / "extraction.json").read_text())
    settings["versions"]["torch"] = "2.3.0"
    (out / "extraction.json").write_text(json.dumps(settings))
    assert extract(image_folder, pixels, out, **OPTIONS).complete
    assert "was begun with {" in caplog.text


def test_a_set_of_an_earlier_format_says_how_to_open_it(pixels, image_folder, tmp_path) -> None:
    extract(image_folder, pixels, tmp_path / "out", **OPTIONS)
    (tmp_path / "out" / "features.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match=r"another version .*FeatureSet\(datasets.load_from_disk"):
        FeatureSet.open(tmp_path / "out")
