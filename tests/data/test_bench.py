"""irpe_ds.data.bench: that it runs; its figures are for whoever runs it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep.synthetic_imagenet import write
from irpe_ds.data.bench.__main__ import main
from irpe_ds.data.beton.convert import convert
from irpe_ds.data.beton.options import StorageOptions
from irpe_ds.data.beton.sources import open_source
from irpe_ds.errors import ConfigError

ROOT = Path(__file__).parents[2]
BENCH = [sys.executable, "-m", "irpe_ds.data.bench"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "data"
    write(out, images=24, classes=2, seed=0)
    return out


def bench(
    data: Path, out: Path, part: str, *options: str, source: str = "--data"
) -> dict[str, Any]:
    """The report of one round, whose text must have every row of it."""
    command = [*BENCH, part, source, str(data), "--rounds", "1", "--out", str(out), *options]
    before = sorted(data.glob("*"))
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert sorted(data.glob("*")) == before
    report = json.loads(out.read_text())
    assert report["images"] == 24
    assert report["command"].startswith("python ")
    assert report["versions"].keys() >= {"torch", "ffcv"}
    for title, rows in report["tables"].items():
        assert title in process.stdout
        for name, row in rows.items():
            assert f"\n{name} " in process.stdout
            assert row["median"] > 0
            assert row["rates"] == [row["median"]]
            for other, ratio in row["ratios"].items():
                assert ratio == pytest.approx(row["median"] / rows[other]["median"])
    return report["tables"]


def test_convert(data: Path, tmp_path: Path) -> None:
    tables = bench(data, tmp_path / "report.json", "convert")
    assert len(tables) == 2
    for rows in tables.values():
        assert set(rows) == {"ours", "ours, --check header", "ffcv-imagenet", "disk"}


def test_load(data: Path, tmp_path: Path) -> None:
    tables = bench(data, tmp_path / "report.json", "load", "--batch", "8", "--size", "32")
    title = "load, workers 1, 32 pixels, batches of 8"
    assert list(tables) == [title, f"{title}, per second of CPU time"]
    loaders = {"ours", "ours, scaled", "ffcv", "torchvision", "decode only", "ours, normalised"}
    for rows in tables.values():
        assert set(rows) == loaders | {"ours, 3a, normalised"}


def test_storage(data: Path, tmp_path: Path) -> None:
    source, path = open_source([data / "folder/train"]), tmp_path / "train.beton"
    convert(source, path, StorageOptions(), workers=1)
    options = ["--batch", "8", "--size", "32", "--window", "16"]
    tables = bench(path, tmp_path / "report.json", "storage", *options, source="--beton")
    title = "storage, workers 1, 32 pixels, window 16"
    assert list(tables) == [title, f"{title}, per second of CPU time"]
    for rows in tables.values():
        assert list(rows) == ["sequential", "blocks", "global", "not-ahead", "ffcv"]


@pytest.mark.parametrize("option", ["--data", "--workers", "--rounds", "--batch", "--out"])
def test_refuses(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    value = {"--data": str(tmp_path), "--out": str(tmp_path / "none/report.json")}.get(option, "0")
    arguments = ["load", "--data", str(data), "--batch", "8", option, value]
    monkeypatch.setattr(sys, "argv", ["irpe_ds.data.bench", *arguments])
    with pytest.raises(ConfigError, match=f"^{option}: expected"):
        main()
