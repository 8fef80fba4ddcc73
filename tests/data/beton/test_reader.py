"""Opening a .beton file, and verifying one."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from irpe_ds.data.beton.format import ENTRY_TYPE, HEAD_BYTES, FieldDescType, HeaderType
from irpe_ds.data.beton.manifest import (
    HASHES,
    MANIFEST,
    beside,
    file_hashes,
    file_sha256,
    hash_line,
)
from irpe_ds.data.beton.reader import beton_info, read_beton, tables_sha256
from irpe_ds.data.beton.verify import verify
from irpe_ds.errors import DataError


def change(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_says_what_the_file_holds(beton: Path) -> None:
    info = beton_info(beton, "data.train")
    assert (info.path, info.num_samples, info.num_classes) == (beton, 37, 37)
    assert info.classes is not None
    assert info.classes[7] == "007"
    assert info.manifest is not None
    assert info.manifest.sha256 == file_sha256(beton)


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_file_of_someone_elses_opens(folder: Path, tmp_path: Path, mode: str) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    files = sorted(folder.rglob("*.jpg"))
    samples = [(np.asarray(Image.open(f).convert("RGB")), n) for n, f in enumerate(files)]
    path = tmp_path / "theirs.beton"
    fields = {"image": RGBImageField(mode), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=2).from_indexed_dataset(samples, chunksize=5)
    info = beton_info(path, "data.train")
    assert (info.num_samples, info.classes, info.num_classes, info.manifest) == (
        37,
        None,
        None,
        None,
    )
    verify(path, workers=1, needs_manifest=False)
    if mode == "raw":
        beton = read_beton(path, "data.train")
        for sample, ((image, label), entry) in enumerate(zip(samples, beton.entries, strict=True)):
            stored = beton.payload(sample)
            assert np.array_equal(stored.reshape(entry["height"], entry["width"], 3), image)
            assert entry["label"] == label


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data\.val: expected a \.beton file, or a folder .*, got .*absent"
    ):
        beton_info(tmp_path / "absent.beton", "data.val")


def test_manifest_of_the_format_before(own_beton: Path) -> None:
    path = beside(own_beton, MANIFEST)
    stored = json.loads(path.read_text())
    assert (stored.pop("selection"), stored["format"]) == ({}, 3)
    path.write_text(json.dumps(stored | {"format": 2}))
    manifest = beton_info(own_beton, "test").manifest
    assert manifest is not None
    assert (manifest.format, manifest.selection) == (2, {})


@pytest.mark.parametrize("share", [0.0, 1e-6, 1e-3, 0.5, 0.99999])
@pytest.mark.parametrize("manifest", [True, False])
def test_file_cut_short(own_beton: Path, share: float, manifest: bool) -> None:
    with own_beton.open("r+b") as file:
        file.truncate(int(share * own_beton.stat().st_size))
    if not manifest:
        beside(own_beton, MANIFEST).unlink()
    with pytest.raises(DataError, match=r"^data\.train: expected .*own\.beton"):
        beton_info(own_beton, "data.train")


def test_other_file(tmp_path: Path) -> None:
    path = tmp_path / "text.beton"
    path.write_text("not FFCV's format " * 1000)
    with pytest.raises(DataError, match=r"data\.train: expected a \.beton file of FFCV"):
        beton_info(path, "data.train")


def test_file_whose_writer_was_killed(own_beton: Path) -> None:
    beside(own_beton, MANIFEST).unlink()
    change(own_beton, HeaderType.fields["alloc_table_ptr"][1], bytes(8))
    with pytest.raises(DataError, match=r"a complete \.beton file, got .*unfinished"):
        beton_info(own_beton, "data.train")


def test_other_fields(own_beton: Path) -> None:
    beside(own_beton, MANIFEST).unlink()
    change(own_beton, HeaderType.itemsize + FieldDescType.fields["name"][1], b"photo")
    with pytest.raises(DataError, match=r"the fields image \(RGBImageField\), label"):
        beton_info(own_beton, "data.train")


def test_tables_that_disagree(own_beton: Path) -> None:
    beside(own_beton, MANIFEST).unlink()
    change(own_beton, own_beton.stat().st_size - 16, (1 << 40).to_bytes(8, "little"))
    with pytest.raises(DataError, match=r"data\.train: expected consistent tables"):
        read_beton(own_beton, "data.train")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "size": 3}', '{"format": 2}'])
def test_damaged_manifest(own_beton: Path, text: str) -> None:
    beside(own_beton, MANIFEST).write_text(text)
    with pytest.raises(DataError, match=r"own\.beton\.json: expected .*manifest"):
        beton_info(own_beton, "data.train")


def test_verify_accepts_the_file_as_it_was_written(own_beton: Path) -> None:
    assert verify(own_beton, workers=2).num_samples == 37


def test_damaged_sample_is_named(own_beton: Path) -> None:
    for sample in (30, 21):
        entry = read_beton(own_beton, "test").entries[sample]
        change(own_beton, int(entry["start"] + entry["bytes"] // 2), bytes(30))
    with pytest.raises(DataError, match=r"sample 21 \(021/image\.jpg\): bytes that differ"):
        verify(own_beton, workers=2)
    beside(own_beton, MANIFEST).unlink()
    with pytest.raises(DataError, match=r"sample 21 \(label 21\): JPEG data that does not"):
        verify(own_beton, workers=2, needs_manifest=False)


def test_hash_finds_what_decodes_nonetheless(own_beton: Path) -> None:
    first = read_beton(own_beton, "test").entries[0]
    change(own_beton, int(first["start"]) - 1, b"x")  # between the tables and the first page
    with pytest.raises(DataError, match="SHA-256"):
        verify(own_beton, workers=1)


def test_class_counts_are_compared(own_beton: Path) -> None:
    path = beside(own_beton, MANIFEST)
    counts = '"class_counts": [\n  1,\n  1'
    assert counts in path.read_text()
    path.write_text(path.read_text().replace(counts, '"class_counts": [\n  2,\n  0'))
    with pytest.raises(DataError, match="images of each class"):
        verify(own_beton, workers=1)


@pytest.mark.parametrize("count", [0, 36, 38, 10**9])
def test_number_of_samples_is_compared(own_beton: Path, count: int) -> None:
    path = beside(own_beton, MANIFEST)
    path.write_text(path.read_text().replace('"num_samples": 37', f'"num_samples": {count}'))
    for check in (lambda: verify(own_beton, workers=1), lambda: read_beton(own_beton, "test")):
        with pytest.raises(DataError, match=r"own\.beton"):
            check()


def test_swapped_labels_are_named(own_beton: Path) -> None:
    label = ENTRY_TYPE.fields["f1"][1]
    for sample, other in ((5, 9), (9, 5)):
        place = HEAD_BYTES + sample * ENTRY_TYPE.itemsize + label
        change(own_beton, place, other.to_bytes(8, "little"))
    with pytest.raises(DataError, match=r"label 9 \(009\) in sample 5 \(005/image\.jpg\)"):
        verify(own_beton, workers=1)
    with pytest.raises(DataError, match=r"data\.train: expected the tables .* changed"):
        beton_info(own_beton, "data.train")


def test_truncated_tail_is_found(own_beton: Path) -> None:
    with own_beton.open("r+b") as file:
        file.truncate(own_beton.stat().st_size - 1)
    with pytest.raises(DataError, match=r"expected \d+ bytes, as in the manifest"):
        verify(own_beton, workers=1)


def test_missing_manifest_and_hashes_are_found(own_beton: Path) -> None:
    beside(own_beton, HASHES).rename(beside(own_beton, ".moved"))
    with pytest.raises(DataError, match=r"own\.beton\.sha256: expected the file of sample hashes"):
        verify(own_beton, workers=1)
    beside(own_beton, HASHES).write_bytes(beside(own_beton, ".moved").read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"own\.beton\.sha256: expected the file of hashes in the"):
        read_beton(own_beton, "data.train")
    beside(own_beton, MANIFEST).unlink()
    with pytest.raises(DataError, match=r"expected .*own\.beton\.json, its manifest"):
        verify(own_beton, workers=1)
    assert verify(own_beton, workers=1, needs_manifest=False).num_samples == 37


def test_every_flipped_byte_of_a_sample_is_found(own_beton: Path) -> None:
    rng = np.random.default_rng(0)
    whole = own_beton.read_bytes()
    entries = read_beton(own_beton, "test").entries
    for sample in rng.choice(37, 10, replace=False).tolist():
        entry = entries[sample]
        place = int(entry["start"] + rng.integers(entry["bytes"]))
        change(own_beton, place, bytes([whole[place] ^ 1 << rng.integers(8)]))
        with pytest.raises(DataError, match=rf"sample {sample} \({sample:03d}/image"):
            verify(own_beton, workers=1)
        change(own_beton, place, whole[place : place + 1])
    verify(own_beton, workers=1)


def test_names_with_any_characters_come_back(tmp_path: Path) -> None:
    names = ["a b.jpg", "\udcff.jpg", "new\nline.jpg", "back\\slash\\n.jpg", "ünïcode.jpg"]
    path = beside(tmp_path / "x.beton", HASHES)
    path.write_bytes(b"".join(hash_line(bytes(range(32)), f"cat/{name}") for name in names))
    found = list(file_hashes(tmp_path / "x.beton", file_sha256(path)))
    assert [line.name for line in found] == [f"cat/{name}" for name in names]
    assert all(line.sha256 == bytes(range(32)) for line in found)


def test_hashes_are_those_of_sha256sum(own_beton: Path, folder: Path) -> None:
    checked = subprocess.run(
        ["sha256sum", "-c", "--quiet", beside(own_beton, HASHES)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert (checked.returncode, checked.stdout) == (0, "")


class TestLabels:
    """Labels outside of the classes, with and without a manifest."""

    def set_label(self, path: Path, sample: int, label: int) -> None:
        place = HEAD_BYTES + sample * ENTRY_TYPE.itemsize + ENTRY_TYPE.fields["f1"][1]
        change(path, place, label.to_bytes(8, "little", signed=True))

    @pytest.mark.parametrize("label", [-1, -100, 37, 1 << 62])
    def test_with_manifest(self, own_beton: Path, label: int) -> None:
        self.set_label(own_beton, 5, label)
        edit_manifest(own_beton, tables_sha256=tables_sha256(own_beton, 37))
        expected = r"labels from 0 to 36, as its manifest has 37 classes"
        for check in (beton_info, read_beton):
            with pytest.raises(DataError, match=rf"{expected}, got label {label} in sample 5 of"):
                check(own_beton, "data.train")

    def test_without_manifest(self, own_beton: Path) -> None:
        beside(own_beton, MANIFEST).unlink()
        self.set_label(own_beton, 7, 99)
        assert beton_info(own_beton, "data.train").largest_label == (99, 7)
        self.set_label(own_beton, 5, -100)
        with pytest.raises(DataError, match=r"labels from 0, got label -100 in sample 5 of"):
            beton_info(own_beton, "data.train")


@pytest.mark.parametrize("values", [{"height": 65535, "width": 65535}, {"width": 0}, {"mode": 7}])
def test_size_that_no_image_has(own_beton: Path, values: dict[str, int]) -> None:
    beside(own_beton, MANIFEST).unlink()
    image, start = ENTRY_TYPE.fields["f0"]
    for name, value in values.items():
        kind, place = image.fields[name]
        data = np.array(value, kind).tobytes()
        change(own_beton, HEAD_BYTES + 3 * ENTRY_TYPE.itemsize + start + place, data)
    with pytest.raises(DataError, match=r"images of 1 to 89478485 pixels.* in sample 3 of"):
        beton_info(own_beton, "data.train")


def edit_manifest(beton: Path, **values: object) -> None:
    path = beside(beton, MANIFEST)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_samples", "37", "num_samples of the manifest to be a valid integer, got '37'"),
        ("num_samples", 38, "class_counts of 37, got num_samples 38"),
        ("format", 1, "format of the manifest to be 2 or 3, got 1"),
        ("class_counts", [-1] * 37, "class_counts.0 of the manifest to be greater than or equal"),
        ("class_counts", [37], "as many classes as class_counts in the manifest, got 37 and 1"),
        ("classes", ["001"] * 37, "every class once in the manifest, got '001' twice"),
        ("classes", "abc", "classes of the manifest to be a valid tuple"),
        ("sha256", "ab", "sha256 of the manifest to be"),
        ("changed", 38, "changed 38, duplicates 0"),
        ("left_out", 1.5, "left_out of the manifest to be a valid integer"),
        ("size", 0, "size of the manifest to be greater than 0"),
        ("extra", 0, "extra of the manifest to be no such key"),
    ],
)
def test_manifest_that_contradicts_itself(
    own_beton: Path, key: str, value: object, expected: str
) -> None:
    edit_manifest(own_beton, **{key: value})
    with pytest.raises(DataError, match=r"own\.beton\.json: expected ") as error:
        beton_info(own_beton, "data.train")
    assert expected in str(error.value)


@pytest.mark.parametrize("suffix", ["", MANIFEST, HASHES])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_refused(
    own_beton: Path, suffix: str, make: Callable[[Path], None]
) -> None:
    beside(own_beton, suffix).unlink()
    make(beside(own_beton, suffix))
    for check in (lambda: read_beton(own_beton, "test"), lambda: verify(own_beton, workers=1)):
        with pytest.raises(DataError, match="not a regular file"):
            check()


@pytest.mark.parametrize(
    ("change_line", "expected"),
    [
        (lambda lines: lines[:-1], r"expected 37 lines, one for each image, got 36"),
        (lambda lines: [*lines, lines[-1]], r"expected 37 lines, one for each image, got 38"),
        (lambda lines: [*lines[:-1], b"abc\n"], r"got damage in line 37"),
        (lambda lines: [b"\\" + lines[0].replace(b"000/", b"\\x"), *lines[1:]], r"in line 1"),
        (lambda lines: [b"".join(lines).replace(b"\n", b" ")], r"got damage in line 1"),
    ],
)
def test_file_of_hashes_that_the_manifest_confirms(
    own_beton: Path, change_line: Callable[[list[bytes]], list[bytes]], expected: str
) -> None:
    path = beside(own_beton, HASHES)
    path.write_bytes(b"".join(change_line(path.read_bytes().splitlines(keepends=True))))
    edit_manifest(own_beton, hashes_sha256=file_sha256(path))
    for check in (lambda: read_beton(own_beton, "test"), lambda: verify(own_beton, workers=1)):
        with pytest.raises(DataError, match=rf"own\.beton\.sha256: {expected}|{expected}"):
            check()
