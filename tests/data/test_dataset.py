"""Opening a .beton file, and verifying one."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from irpe_ds.data.dataset import open_dataset, read_beton
from irpe_ds.data.ffcv_api import FieldDescType, HeaderType
from irpe_ds.data.manifest import file_sha256, manifest_path
from irpe_ds.data.verify import verify
from irpe_ds.errors import ConfigError


def change(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_says_what_the_file_holds(beton: Path) -> None:
    info = open_dataset(beton, "data.train")
    assert (info.path, info.num_samples, info.num_classes) == (beton, 37, 37)
    assert info.classes is not None
    assert info.classes[7] == "007"
    assert info.sha256 == file_sha256(beton)


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_file_of_someone_elses_opens(folder: Path, tmp_path: Path, mode: str) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    files = sorted(folder.rglob("*.jpg"))
    samples = [(np.asarray(Image.open(f).convert("RGB")), n) for n, f in enumerate(files)]
    path = tmp_path / "theirs.beton"
    fields = {"image": RGBImageField(mode), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=2).from_indexed_dataset(samples, chunksize=5)
    info = open_dataset(path, "data.train")
    assert (info.num_samples, info.classes, info.num_classes, info.sha256) == (37, None, None, None)
    verify(path, workers=1)
    if mode == "raw":
        beton = read_beton(path, "data.train")
        for (image, label), entry in zip(samples, beton.entries, strict=True):
            stored = beton.bytes[entry["start"] : entry["start"] + entry["bytes"]]
            assert np.array_equal(stored.reshape(entry["height"], entry["width"], 3), image)
            assert entry["label"] == label


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.val: expected a \.beton file, got .*absent"):
        open_dataset(tmp_path / "absent.beton", "data.val")


@pytest.mark.parametrize("share", [0.0, 1e-6, 1e-3, 0.5, 0.99999])
@pytest.mark.parametrize("manifest", [True, False])
def test_file_cut_short(own_beton: Path, share: float, manifest: bool) -> None:
    with own_beton.open("r+b") as file:
        file.truncate(int(share * own_beton.stat().st_size))
    if not manifest:
        manifest_path(own_beton).unlink()
    with pytest.raises(ConfigError, match=r"^data\.train: expected .*own\.beton"):
        open_dataset(own_beton, "data.train")


def test_other_file(tmp_path: Path) -> None:
    path = tmp_path / "text.beton"
    path.write_text("not FFCV's format " * 1000)
    with pytest.raises(ConfigError, match=r"data\.train: expected a \.beton file of FFCV"):
        open_dataset(path, "data.train")


def test_file_whose_writer_was_killed(own_beton: Path) -> None:
    manifest_path(own_beton).unlink()
    change(own_beton, HeaderType.fields["alloc_table_ptr"][1], bytes(8))
    with pytest.raises(ConfigError, match="an unfinished file"):
        open_dataset(own_beton, "data.train")


def test_other_fields(own_beton: Path) -> None:
    change(own_beton, HeaderType.itemsize + FieldDescType.fields["name"][1], b"photo")
    with pytest.raises(ConfigError, match=r"the fields image \(RGBImageField\), label"):
        open_dataset(own_beton, "data.train")


def test_tables_that_disagree(own_beton: Path) -> None:
    change(own_beton, own_beton.stat().st_size - 16, (1 << 40).to_bytes(8, "little"))
    with pytest.raises(ConfigError, match=r"data\.train: expected tables that agree"):
        read_beton(own_beton, "data.train")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "size": 3}', '{"format": 2}'])
def test_damaged_manifest(own_beton: Path, text: str) -> None:
    manifest_path(own_beton).write_text(text)
    with pytest.raises(ConfigError, match=r"own\.beton\.json: expected .*manifest"):
        open_dataset(own_beton, "data.train")


def test_verify_accepts_the_file_as_it_was_written(own_beton: Path) -> None:
    assert verify(own_beton, workers=2).num_samples == 37


def test_damaged_sample_is_named(own_beton: Path) -> None:
    for sample in (30, 21):
        entry = read_beton(own_beton, "test").entries[sample]
        change(own_beton, int(entry["start"] + entry["bytes"] // 2), bytes(30))
    with pytest.raises(ConfigError, match=r"damage in sample 21 \(class 021\)"):
        verify(own_beton, workers=2)


def test_hash_finds_what_decodes_nonetheless(own_beton: Path) -> None:
    first = read_beton(own_beton, "test").entries[0]
    change(own_beton, int(first["start"]) - 1, b"x")  # between the tables and the first page
    with pytest.raises(ConfigError, match="SHA-256"):
        verify(own_beton, workers=1)


def test_class_counts_are_compared(own_beton: Path) -> None:
    path = manifest_path(own_beton)
    counts = '"class_counts": [\n  1,\n  1'
    assert counts in path.read_text()
    path.write_text(path.read_text().replace(counts, '"class_counts": [\n  2,\n  0'))
    with pytest.raises(ConfigError, match="images of each class"):
        verify(own_beton, workers=1)
