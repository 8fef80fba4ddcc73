"""One set in every packing is one file; labels beside images, in shards and in Parquet."""

import io
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from irpe_ds.data.beton.cached import converted
from irpe_ds.data.beton.convert import convert
from irpe_ds.data.beton.journal import Journal
from irpe_ds.data.beton.manifest import DatasetManifest
from irpe_ds.data.beton.options import SourceOptions, StorageOptions
from irpe_ds.data.beton.sources import Files, open_source
from irpe_ds.data.parallel import map_in_order
from irpe_ds.data.pipelines.timm import open_images
from irpe_ds.errors import DataError
from tests.packing import (
    class_tars,
    in_folder,
    in_tar,
    in_zip,
    labels,
    listed,
    parquet,
    text,
    with_labels,
)


@pytest.fixture(scope="module")
def photos() -> dict[str, bytes]:
    """Three images of cats and two of dogs, by path."""
    rng, found = np.random.default_rng(0), {}
    for name in ("cat/a.jpg", "cat/b.jpg", "cat/c.jpg", "dog/d.jpg", "dog/e.jpg"):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (9, 12, 3), np.uint8)).save(file, "JPEG")
        found[name] = file.getvalue()
    return found


@pytest.mark.thorough
def test_one_set_in_every_packing_is_one_file(photos: dict[str, bytes], tmp_path: Path) -> None:
    names = text(tmp_path / "classes.txt", "cat\ndog\n")
    outer = class_tars(tmp_path / "class_tars", photos)
    tars = {path.name: path.read_bytes() for path in outer.iterdir()}
    shards = [
        in_tar(tmp_path / f"shard{n}", with_labels(dict(list(photos.items())[n::2])))
        for n in (0, 1)
    ]
    flat = in_folder(tmp_path / "flat", {path[4:]: data for path, data in photos.items()})
    caffe = text(tmp_path / "list.txt", "".join(f"{path[4:]} {path[:3]}\n" for path in photos))
    sources: list[tuple[list[Path], dict[str, Path]]] = [
        ([in_folder(tmp_path / "folder", photos)], {}),
        ([in_tar(tmp_path / "tar", photos)], {}),
        ([in_zip(tmp_path / "zip", photos)], {}),
        ([outer], {}),
        ([in_tar(tmp_path / "outer", tars)], {}),
        ([in_tar(tmp_path / "winter21", {f"whole/{name}": tars[name] for name in tars})], {}),
        (sorted(outer.iterdir()), {}),
        (shards, {"classes": names}),
        ([parquet(tmp_path / "train.parquet", photos)], {}),
        ([flat], {"labels": caffe}),
    ]
    made = [manifest(tmp_path, paths, **options) for paths, options in sources]
    assert {each.sha256 for each in made} == {made[0].sha256}
    assert {each.classes for each in made} == {("cat", "dog")}
    assert len({each.kind for each in made}) == 7


def test_few_archives_are_open_at_a_time(
    photos: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ImageNet-21k unpacked is 21,841 of them, and a process may open 1,024 files."""
    monkeypatch.setattr("irpe_ds.data.beton.sources.files._OPEN", 2)
    tree = {f"{n}/{n}.jpg": bytes([n]) for n in range(9)}
    paths = [in_tar(tmp_path / str(n), {f"{n}.jpg": bytes([n])}) for n in range(9)]
    source, before = open_source(paths), len(os.listdir("/proc/self/fd"))
    with closing(Journal(None, {})) as journal, closing(Files(source)) as files:
        journal.list_source(source)
        members = [member for _, member in journal.members()] * 30
        opened = len(os.listdir("/proc/self/fd"))
        read = list(map_in_order(files.read, members, workers=3))
        assert len(os.listdir("/proc/self/fd")) <= opened + 2
    assert read == list(tree.values()) * 30
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("packing", ["zip", "parquet", "class tars"])
def test_read_in_place(packing: str, photos: dict[str, bytes], tmp_path: Path) -> None:
    """By pipeline timm, whose worker processes are forks."""
    if packing == "zip":
        path = in_zip(tmp_path / "a", photos)
    elif packing == "parquet":
        path = parquet(tmp_path / "a.parquet", photos)
    else:
        path = class_tars(tmp_path / "a", photos)
    images = open_images(path, "data.train")
    assert (images.info.classes, images.labels.tolist()) == (("cat", "dog"), [0, 0, 0, 1, 1])
    for sample, data in enumerate(photos.values()):
        assert images.open(sample) == Image.open(io.BytesIO(data))


@pytest.mark.thorough
def test_folder_of_class_tars_is_converted_once(photos: dict[str, bytes], tmp_path: Path) -> None:
    path = class_tars(tmp_path / "a", photos)
    out = converted(path, "data.train", workers=1)
    made = out.stat().st_ino
    os.utime(path / "cat.tar")
    assert converted(path, "data.train", workers=1).stat().st_ino == made
    in_tar(path / "cat", {"f.jpg": photos["dog/d.jpg"]})
    assert converted(path, "data.train", workers=1).stat().st_ino != made


def manifest(tmp_path: Path, paths: list[Path], **options: Any) -> DatasetManifest:
    source = open_source(paths, SourceOptions(**options))
    return convert(source, tmp_path / "x.beton", StorageOptions(), workers=1, overwrite=True)


def test_what_was_chosen_is_in_the_manifest(photos: dict[str, bytes], tmp_path: Path) -> None:
    path, classes = in_folder(tmp_path / "x", photos), text(tmp_path / "two.txt", "dog\ncat\n")
    made = manifest(tmp_path, [path], limit=3, classes=classes)
    assert made.selection == {"limit": 3, "classes": str(classes)}
    assert (made.classes, made.class_counts) == (("dog", "cat"), (2, 1))
    assert manifest(tmp_path, [path]).selection == {}


class TestShards:
    def test_json_of_img2dataset(self, photos: dict[str, bytes], tmp_path: Path) -> None:
        """Its folder has tables and statistics beside the shards."""
        (tmp_path / "out").mkdir()
        in_tar(tmp_path / "out/00000", with_labels(photos))
        in_folder(tmp_path / "out", {"00000_stats.json": b"{}", "00000.parquet": b"x"})
        assert labels(tmp_path / "out") == (("0", "1"), [0, 0, 0, 1, 1])
        assert labels(tmp_path / "out", label_key="label")[1] == [0, 0, 0, 1, 1]
        with pytest.raises(DataError, match=r"00000\.tar: .*\.json: expected a field wnid"):
            listed(tmp_path / "out", label_key="wnid")

    def test_json_with_half_a_character(self, tmp_path: Path) -> None:
        path = in_tar(tmp_path / "a", {"a.jpg": b"x", "a.json": b'{"label": "\\ud800"}'})
        with pytest.raises(DataError, match=r"a\.json: expected a label in UTF-8"):
            listed(path)

    def test_a_label_under_another_ending(self, tmp_path: Path) -> None:
        path = in_tar(tmp_path / "a", {"a.jpg": b"x", "a.y": b"0", "b.jpg": b"x", "b.y": b"1"})
        assert labels(path, label_key="y") == (("0", "1"), [0, 1])

    def test_two_images_of_a_key(self, tmp_path: Path) -> None:
        tree = {f"{key}.{end}": b"x" for key in "ab" for end in ("jpg", "seg.png", "cls")}
        path = in_tar(tmp_path / "a", tree | {"a.cls": b"0", "b.cls": b"1"})
        with pytest.raises(DataError, match=r"one image per key .* or --image-key, such as jpg,"):
            listed(path)
        with pytest.raises(
            DataError, match=r"one image and one \.cls per key .* got a\.jpg, a\.seg"
        ):
            listed(path, image_key="png")
        assert listed(path, image_key="seg.png")[1] == [(0, "a.seg.png"), (1, "b.seg.png")]

    def test_hidden_files_of_macos(self, tmp_path: Path) -> None:
        tree = {"a.jpg": b"x", "._a.jpg": b"x", "a.cls": b"0", "._a.cls": b"x"}
        path = in_tar(tmp_path / "a", tree | {"b.jpg": b"x", "b.cls": b"1"})
        assert listed(path)[1] == [(0, "a.jpg"), (1, "b.jpg")]

    def test_labels_of_a_list(self, tmp_path: Path) -> None:
        paths = [
            in_tar(tmp_path / f"{n}", {f"{n}.jpg": b"x", f"{n}.cls": b"7", "info.json": b""})
            for n in (1, 2)
        ]
        lines = text(tmp_path / "list.txt", "1.jpg dog\n2.jpg cat\n")
        assert labels(*paths, labels=lines) == (("cat", "dog"), [0, 1])

    def test_synsets_with_words(self, tmp_path: Path) -> None:
        words = b"n01440764 tench, Tinca tinca", b"n01443537"
        tree = {f"{n}.{end}": word for n, word in enumerate(words) for end in ("jpg", "cls")}
        path = in_tar(tmp_path / "a", tree)
        assert labels(path) == (("n01440764", "n01443537"), [0, 1])


class TestParquet:
    def test_columns_of_other_names(self, photos: dict[str, bytes], tmp_path: Path) -> None:
        path = parquet(
            tmp_path / "a.parquet", photos, jpg=list(photos.values()), y=["a", "b"] * 2 + ["b"]
        )
        found = labels(path, image_key="jpg", label_key="y")
        assert found == (("a", "b"), [0, 0, 1, 1, 1])
        for options, message in (
            ({"image_key": "x"}, "--image-key"),
            ({"label_key": "x"}, "--label-key"),
        ):
            with pytest.raises(
                DataError, match=rf"{message}: expected the name .*: image, label, jpg, y"
            ):
                listed(path, **options)

    def test_images_that_img2dataset_could_not_get(
        self, photos: dict[str, bytes], tmp_path: Path
    ) -> None:
        some = [data if n else None for n, data in enumerate(photos.values())]
        path = parquet(tmp_path / "a.parquet", photos, image=some, label=[None, 0, 0, 1, 1])
        source = open_source([path])
        with closing(Journal(None, {})) as journal:
            assert journal.list_source(source)[:3] == (("cat", "dog"), (2, 2), 1)
            with closing(Files(source)) as files:
                found = [files.read(member) for _, member in journal.members()]
        assert found == some[1:]

    @pytest.mark.parametrize("label", [[0, 1, -1, 0, 1], [[0]] * 5, [0.0, 1.0, 0.0, 1.0, 1.0]])
    def test_labels_that_are_none(
        self, label: list[object], photos: dict[str, bytes], tmp_path: Path
    ) -> None:
        path = parquet(tmp_path / "a.parquet", photos, label=label)
        with pytest.raises(DataError, match=r"expected a (label in digits|number or a name)"):
            listed(path)

    def test_damage_after_the_listing(self, photos: dict[str, bytes], tmp_path: Path) -> None:
        path = parquet(tmp_path / "a.parquet", photos)
        source = open_source([path])
        with closing(Journal(None, {})) as journal, closing(Files(source)) as files:
            journal.list_source(source)
            ((_, member), *_) = journal.members()
            data = path.read_bytes()
            path.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
            with pytest.raises(ValueError, match="damaged Parquet: "):
                files.read(member)
            path.unlink()
            with pytest.raises(ValueError, match="No such file"):
                files.read(member)

    def test_damage(self, photos: dict[str, bytes], tmp_path: Path) -> None:
        path = parquet(tmp_path / "a.parquet", photos)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(DataError, match=r"a\.parquet: expected a complete Parquet file"):
            listed(path)


def test_tar_of_one_class_among_several_tars(tmp_path: Path) -> None:
    paths = [
        in_tar(tmp_path / f"part{n}", {f"n0{n}/1.jpg": b"x", "n03/2.jpg": b"x"}) for n in (1, 2)
    ]
    with pytest.raises(
        DataError, match=r"images of one class in .*part1\.tar, as there are several"
    ):
        listed(*paths)
