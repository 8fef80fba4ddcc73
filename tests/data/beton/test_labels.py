"""Labels are numbers or names; none is lost, and one that is neither is named with its file."""

import gzip
import io
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from irpe_ds.data.beton.devkit import GROUND_TRUTH, META, validation_labels
from irpe_ds.data.beton.journal import Journal
from irpe_ds.data.beton.labels import parse_label
from irpe_ds.data.beton.options import SourceOptions
from irpe_ds.data.beton.sources import Source, open_source
from irpe_ds.errors import DataError


def shard(path: Path, labels: list[str]) -> Path:
    """A shard with one image for each label; they are listed, not decoded."""
    with tarfile.open(path, "w") as archive:
        for number, label in enumerate(labels):
            for suffix, data in (("jpg", b"x"), ("cls", label.encode())):
                entry = tarfile.TarInfo(f"{number:05d}.{suffix}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return path


def listed(source: Source) -> tuple[tuple[str, ...], list[int]]:
    """The classes of a source, and the label of each image."""
    with closing(Journal(None, {})) as journal:
        classes = journal.list_source(source).classes
        return classes, [label for label, _ in journal.members()]


def with_classes(tmp_path: Path, labels: list[str], classes: str) -> Source:
    (tmp_path / "classes.txt").write_text(classes, encoding="utf-8")
    options = SourceOptions(classes=tmp_path / "classes.txt")
    return open_source([shard(tmp_path / "a.tar", labels)], options)


def test_padded_numbers_are_numbers(tmp_path: Path) -> None:
    source = open_source([shard(tmp_path / "a.tar", [f"{n:03d}" for n in range(120)] * 2)])
    assert listed(source) == (tuple(map(str, range(120))), sorted([*range(120)] * 2))


def test_numbers_and_names_of_given_classes(tmp_path: Path) -> None:
    labels = ["cat", "002\n", " dog ", "0"]
    source = with_classes(tmp_path, labels, "\ufeffcat\r\ndog\r\n\r\nbird\r\n")
    assert listed(source) == (("cat", "dog", "bird"), [0, 0, 1, 2])


@pytest.mark.parametrize("label", ["zebra", "-1", "+1", "1.0", "1e0", "", "3", "1 2", "cat\ndog"])
def test_unknown_label_is_named(tmp_path: Path, label: str) -> None:
    source = with_classes(tmp_path, ["cat", "dog", label], "cat\ndog\nbird\n")
    with pytest.raises(DataError, match=r"a\.tar: 00002\.jpg: expected .*label") as error:
        listed(source)
    assert label in str(error.value.got).encode().decode("unicode_escape")


@pytest.mark.parametrize("label", ["-1", "+1", "1.0", "1e5", "9" * 30, "٣", "[1]", "", "a\nb"])
def test_what_is_neither_a_number_nor_a_name(label: str) -> None:
    with pytest.raises(DataError, match=r"^a\.cls: expected a label in digits alone, or a class"):
        parse_label(label, "a.cls")


@pytest.mark.parametrize("label", ["n01440764", "golden retriever", "nan", "+", "2-cv", "0x1f"])
def test_names(label: str) -> None:
    assert parse_label(label, "a.cls") == label


@pytest.mark.parametrize("label", ["20000000", "10000000000", "2"])
def test_more_classes_than_labels_need_their_names(tmp_path: Path, label: str) -> None:
    source = open_source([shard(tmp_path / "a.tar", ["0", label])])
    expected = rf"the names of all classes, since labels reach {label} \(different ones seen: 2\)"
    with pytest.raises(DataError, match=f"--classes: expected {expected}"):
        listed(source)


def test_numbers_and_names_do_not_mix(tmp_path: Path) -> None:
    source = open_source([shard(tmp_path / "a.tar", ["0", "1", "nan"])])
    with pytest.raises(DataError, match=r"00002\.jpg: expected labels that are all numbers .*nan"):
        listed(source)


def test_a_name_that_is_another_class_number(tmp_path: Path) -> None:
    source = with_classes(tmp_path, ["0"], "1\n0\n")
    with pytest.raises(DataError, match=r"00000\.jpg: expected a label that is not both"):
        listed(source)


def test_label_that_is_no_text(tmp_path: Path) -> None:
    source = open_source([shard(tmp_path / "a.tar", ["1" * 2000])])
    with pytest.raises(DataError, match=r"00000\.cls: expected a label of up to 1024 bytes"):
        listed(source)


def test_class_listed_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--classes: expected every class once in .*'dog' twice"):
        listed(with_classes(tmp_path, ["0"], "cat\ndog\ndog\n"))


class TestValidation:
    """Of ImageNet's flat archive."""

    @pytest.mark.parametrize("lines", ["cat\n-1\n", "cat\n3\n", "cat\n1.0\n", "3\ncat\n", "\n"])
    def test_numbers_are_refused(self, tmp_path: Path, lines: str) -> None:
        (tmp_path / "labels.txt").write_text(lines)
        options = SourceOptions(labels=tmp_path / "labels.txt")
        with pytest.raises(DataError, match=r"^--labels: .*labels\.txt"):
            listed(open_source([shard(tmp_path / "a.tar", ["", ""])], options))

    def kit(self, folder: Path, truth: bytes, meta: bytes) -> Path:
        (folder / "data").mkdir()
        (folder / GROUND_TRUTH).write_bytes(truth)
        (folder / META).write_bytes(meta)
        return folder

    @pytest.mark.thorough
    def test_damaged_development_kit(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).bytes(2000)
        with pytest.raises(DataError, match=r"--labels: expected ILSVRC2012's meta\.mat"):
            validation_labels(self.kit(tmp_path, b"1\n", noise))
        for data in (noise, b"\x1f\x8b" + noise, gzip.compress(noise)[:-9]):
            (tmp_path / "kit.tar.gz").write_bytes(data)
            with pytest.raises(DataError, match=r"^--labels: .*kit\.tar\.gz"):
                validation_labels(tmp_path / "kit.tar.gz")

    @pytest.mark.thorough
    @pytest.mark.parametrize("number", ["+1", "x" * 999])
    def test_unknown_number(self, tmp_path: Path, number: str) -> None:
        kit = self.kit(tmp_path, f"1\n2\n{number}\n".encode(), meta_mat())
        with pytest.raises(DataError, match=r"numbers in meta\.mat of .*, got ") as error:
            validation_labels(kit)
        assert len(str(error.value)) < 400

    @pytest.mark.thorough
    def test_damage_that_ends_scipy_with_a_segmentation_fault(self, tmp_path: Path) -> None:
        meta = bytearray(meta_mat())
        kit = self.kit(tmp_path, b"2\n1\n", meta)
        assert validation_labels(kit) == ["n02", "n01"]
        meta[249:253] = b"\xff\xff\xff\x7f"
        (kit / META).write_bytes(meta)
        with pytest.raises(DataError, match=r"--labels: expected ILSVRC2012's meta\.mat"):
            validation_labels(kit)


def meta_mat() -> bytes:
    """The synsets n01 and n02, numbers 1 and 2."""
    rows = np.array([(1, "n01"), (2, "n02")], [("ILSVRC2012_ID", object), ("WNID", object)])
    file = io.BytesIO()
    savemat(file, {"synsets": rows})
    return file.getvalue()
