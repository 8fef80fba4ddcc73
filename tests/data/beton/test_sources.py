"""The same images from every kind of source; kills, full disks and damaged archives."""

import math
import resource
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from data_prep.synthetic_imagenet import Synthetic, write
from irpe_ds.data.beton.convert import convert
from irpe_ds.data.beton.manifest import SKIPPED, DatasetManifest, beside, read_hashes, read_manifest
from irpe_ds.data.beton.options import SourceOptions, StorageOptions
from irpe_ds.data.beton.reader import read_beton
from irpe_ds.data.beton.sources import Source, open_source
from irpe_ds.data.beton.verify import verify
from irpe_ds.errors import ConfigError, DataError
from tests.forks import start

ImageNet = tuple[Path, Synthetic]


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageNet]:
    """800 photos of 10 classes in ImageNet's own layouts, with odd and bad files among them."""
    out = tmp_path_factory.mktemp("imagenet") / "out"
    yield (
        out,
        write(out, images=800, classes=10, oddities=True, bad=True, seed=0),
    )
    shutil.rmtree(out)


def opened(paths: Sequence[Path], **options: Any) -> Source:
    return open_source(paths, SourceOptions(**options))


def train_sources(root: Path) -> dict[str, dict[str, Any]]:
    shards = sorted((root / "wds").glob("train-*.tar"))
    return {
        "folder": {"paths": [root / "folder/train"]},
        "tar": {"paths": [root / "train.tar"]},
        "class tars": {"paths": [root / "ILSVRC2012_img_train.tar"]},
        "webdataset": {"paths": shards, "classes": root / "wds/classes.txt"},
    }


@pytest.fixture(scope="session")
def converted(
    imagenet: ImageNet, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Path]]:
    """`imagenet`'s training images, from each of the four sources."""
    folder = tmp_path_factory.mktemp("converted")
    made = {}
    for name, source in train_sources(imagenet[0]).items():
        made[name] = folder / f"{name}.beton"
        convert(opened(**source), made[name], StorageOptions(), workers=2, on_bad="skip")
    yield made
    shutil.rmtree(folder)


def names(path: Path) -> list[str]:
    manifest = read_manifest(path)
    assert manifest is not None
    return [line.name for line in read_hashes(path, manifest)]


def test_every_source_gives_the_same_file(converted: dict[str, Path]) -> None:
    manifests = {name: read_manifest(path) for name, path in converted.items()}
    first = manifests["folder"]
    assert first is not None
    assert len({manifest.kind for manifest in manifests.values() if manifest}) == 4
    for manifest in manifests.values():
        assert manifest is not None
        assert (manifest.sha256, manifest.classes) == (first.sha256, first.classes)
    for path in converted.values():
        assert [Path(n).stem for n in names(path)] == [
            Path(n).stem for n in names(converted["folder"])
        ]


def test_samples_are_the_files_bytes_with_their_labels(
    imagenet: ImageNet, converted: dict[str, Path]
) -> None:
    root, made = imagenet
    beton = read_beton(converted["folder"], "test")
    manifest = read_manifest(converted["folder"])
    assert manifest is not None
    bad = {file.path for file in made.planted if file.bad}
    found = names(converted["folder"])
    assert found == sorted(set(made.train) - bad)
    pixels = {file.path for file in made.planted if file.kind in ("cmyk", "png")}
    assert (manifest.changed, manifest.skipped) == (len(pixels), len(bad))
    assert manifest.duplicates == sum(file.kind == "duplicate" for file in made.planted)
    for sample, name in enumerate(found):
        assert made.synsets[beton.entries["label"][sample]] == name.split("/")[0]
        if name not in pixels:
            data = (root / "folder/train" / name).read_bytes()
            assert beton.payload(sample).tobytes() == data


def test_bad_files_are_listed(imagenet: ImageNet, converted: dict[str, Path]) -> None:
    made = imagenet[1]
    for path in converted.values():
        lines = dict(line.split("\t") for line in beside(path, SKIPPED).read_text().splitlines())
        bad = {Path(file.path).stem: file.kind for file in made.planted if file.bad}
        assert {Path(name).stem for name in lines} == set(bad)
        for name, reason in lines.items():
            assert reason == {
                "empty": "0 bytes",
                "text": "not a JPEG, PNG, BMP, PPM, TIFF or WebP image",
            }.get(bad[Path(name).stem], "JPEG data that does not decode cleanly")


def test_whole_file_verifies(converted: dict[str, Path]) -> None:
    verify(converted["class tars"], workers=2)


def test_every_source_of_validation_gives_the_same_file(imagenet: ImageNet, tmp_path: Path) -> None:
    root, made = imagenet
    shutil.unpack_archive(root / "ILSVRC2012_devkit_t12.tar.gz", tmp_path)
    flat = [root / "ILSVRC2012_img_val.tar"]
    sources: list[dict[str, Any]] = [
        {"paths": [root / "folder/val"]},
        {"paths": flat, "labels": root / "ILSVRC2012_devkit_t12.tar.gz"},
        {"paths": flat, "labels": tmp_path / "ILSVRC2012_devkit_t12"},
        {"paths": flat, "labels": root / "val_synsets.txt"},
    ]
    manifests = [
        convert(opened(**source), tmp_path / f"{n}.beton", StorageOptions(), workers=2)
        for n, source in enumerate(sources)
    ]
    assert len({manifest.sha256 for manifest in manifests}) == 1
    assert manifests[0].classes == made.synsets
    assert names(tmp_path / "1.beton") == sorted(made.val)


def cpu_seconds(pid: int | None) -> float:
    """Of a process and its children: how far it is, however loaded the machine."""
    try:
        own = psutil.Process(pid)
        times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0.0
    return sum(each.user + each.system for each in times)


def test_killed_at_random_moments_the_file_is_the_same(
    imagenet: ImageNet, converted: dict[str, Path], tmp_path: Path
) -> None:
    source = open_source([imagenet[0] / "ILSVRC2012_img_train.tar"])
    rng = np.random.default_rng(0)
    out = tmp_path / "killed.beton"
    expected = read_manifest(converted["folder"])
    assert expected is not None
    kills, finished, resumed = 0, 0, 0
    while kills < 20 or not finished:
        before = beside(out, ".partial").exists()
        process = start(convert, source, out, StorageOptions(), workers=1, on_bad="skip")
        limit, since = rng.uniform(0.02, 0.5) if kills < 20 else math.inf, 0.0
        while process.is_alive() and (spent := cpu_seconds(process.pid)) - since < limit:
            if kills % 2 and not beside(out, ".partial").exists():
                since = spent  # every second one is killed while it writes
            process.join(0.005)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            resumed += before
            continue
        assert process.exitcode == 0
        finished += 1
        assert read_manifest(out) == DatasetManifest(
            **vars(expected) | {"source": [str(source.paths[0])], "kind": source.kind}
        )
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            f"killed.beton{suffix}" for suffix in ("", ".json", ".sha256", ".skipped")
        )
        for path in tmp_path.iterdir():
            path.unlink()
    assert resumed > 5


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 5 MB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_full_disk(imagenet: ImageNet, small_disk: Path) -> None:
    source = open_source([imagenet[0] / "folder/val"])  # 9 MB
    out = small_disk / "val.beton"
    with pytest.raises(DataError, match=r"--out: .*(No space|is full).*what is done is kept"):
        convert(source, out, StorageOptions(), workers=2)
    assert not out.exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    convert(source, out, StorageOptions(), workers=2)
    verify(out, workers=2)


def test_file_that_may_not_grow(imagenet: ImageNet, tmp_path: Path) -> None:
    source = open_source([imagenet[0] / "folder/val"])
    out = tmp_path / "val.beton"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, before[1]))
    try:
        with pytest.raises(DataError, match=r"--out: .*File too large"):
            convert(source, out, StorageOptions(), workers=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not out.exists()
    made = convert(source, out, StorageOptions(), workers=2)
    again = convert(source, tmp_path / "again.beton", StorageOptions(), workers=2)
    assert made.sha256 == again.sha256


class TestArchives:
    """Small archives that are wrong in one way each."""

    @pytest.fixture
    def jpeg(self, folder: Path) -> bytes:
        return (folder / "001" / "image.jpg").read_bytes()

    @pytest.fixture
    def write(self, tmp_path: Path) -> Callable[..., Path]:
        def write(name: str, files: dict[str, bytes | None]) -> Path:
            with tarfile.open(tmp_path / name, "w") as archive:
                for file, data in files.items():
                    entry = tarfile.TarInfo(file)
                    if data is None:
                        entry.type, entry.linkname = tarfile.LNKTYPE, next(iter(files))
                        archive.addfile(entry)
                    else:
                        (tmp_path / "file").write_bytes(data)
                        entry.size = len(data)
                        with (tmp_path / "file").open("rb") as content:
                            archive.addfile(entry, content)
            return tmp_path / name

        return write

    def read(self, *paths: Path, **options: Any) -> DatasetManifest:
        out = paths[0].parent / "out.beton"
        source = opened(paths, **options)
        return convert(source, out, StorageOptions(), workers=1, overwrite=True)

    def test_tar_may_have_a_folder_above_the_classes(self, write: Any, jpeg: bytes) -> None:
        files = {f"./train/{name}/1.jpg": jpeg for name in ("cat", "dog")}
        manifest = self.read(write("a.tar", files | {"./train/eel/._2.jpg": b"", "x": b""}))
        assert (manifest.classes, manifest.left_out) == (("cat", "dog"), 2)

    def test_flat_tar_needs_labels(self, write: Any, jpeg: bytes, tmp_path: Path) -> None:
        path = write("a.tar", {"2.jpg": jpeg, "1.jpg": jpeg})
        with pytest.raises(DataError, match=r"or --labels, got 2\.jpg without a folder"):
            self.read(path)
        labels = tmp_path / "labels.txt"
        labels.write_text("cat\n")
        with pytest.raises(DataError, match=r"--labels: expected 2 labels.* got 1 in"):
            self.read(path, labels=labels)
        labels.write_text("3\n5\n")
        with pytest.raises(DataError, match="or the development kit, which explains the numbers"):
            self.read(path, labels=labels)
        labels.write_text("dog\ncat\n")
        assert self.read(path, labels=labels).classes == ("cat", "dog")
        assert read_beton(path.parent / "out.beton", "test").entries["label"].tolist() == [0, 1]
        assert names(path.parent / "out.beton") == ["cat/2.jpg", "dog/1.jpg"]

    def test_repeated_name_is_not_taken_silently(self, write: Any, jpeg: bytes) -> None:
        path = write("a.tar", {"cat/1.jpg": jpeg, "./cat/1.jpg": jpeg, "dog/1.jpg": jpeg})
        with pytest.raises(DataError, match="an image with the name of another one"):
            self.read(path)

    def test_links_are_refused(self, write: Any, jpeg: bytes) -> None:
        path = write("a.tar", {"cat/1.jpg": jpeg, "cat/2.jpg": None})
        with pytest.raises(DataError, match=r"regular files, got cat/2\.jpg, a link"):
            self.read(path)

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
    def test_archive_cut_short(self, write: Any, jpeg: bytes, share: float) -> None:
        path = write("a.tar", {f"cat/{n}.jpg": jpeg for n in range(20)})
        content = 20 * (512 + -(-len(jpeg) // 512) * 512)
        with path.open("r+b") as file:
            file.truncate(int(share * content))
        with pytest.raises(DataError, match=r"a\.tar: expected a complete, uncompressed tar"):
            self.read(path)

    def test_archive_cut_short_between_files(self, write: Any, jpeg: bytes) -> None:
        path = write("a.tar", {f"cat/{n}.jpg": jpeg for n in range(20)})
        with path.open("r+b") as file:
            file.truncate(10 * (512 + -(-len(jpeg) // 512) * 512))
        with pytest.raises(DataError, match="uncompressed tar, got damage at byte"):
            self.read(path)

    def test_damaged_header(self, write: Any, jpeg: bytes) -> None:
        path = write("a.tar", {f"cat/{n}.jpg": jpeg for n in range(20)})
        with path.open("r+b") as file:
            file.seek(10 * (512 + -(-len(jpeg) // 512) * 512) + 20)
            file.write(b"damage")
        with pytest.raises(DataError, match="uncompressed tar, got damage at byte"):
            self.read(path)

    def test_compressed_archive_is_refused(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w:gz"):
            pass
        with pytest.raises(DataError, match="a complete, uncompressed tar"):
            self.read(tmp_path / "a.tar")

    def test_shards_with_numbers_or_names(self, write: Any, jpeg: bytes, tmp_path: Path) -> None:
        one = write("1.tar", {"a.jpg": jpeg, "a.cls": b"11", "a.json": b"{}", "b.cls": b"2\n"})
        with pytest.raises(DataError, match=r"one image and one \.cls per key.*got b\.cls"):
            self.read(one)
        one = write("1.tar", {"a.jpg": jpeg, "a.cls": b"11"})
        two = write("2.tar", {"x/a.jpg": jpeg, "x/a.cls": b"2"})
        with pytest.raises(DataError, match=r"--classes: .* labels reach 11 \(different"):
            self.read(one, two)
        (tmp_path / "classes.txt").write_text("cat\ndog\n")
        with pytest.raises(DataError, match=r"labels below 2.*got 11"):
            self.read(one, two, classes=tmp_path / "classes.txt")
        one = write("1.tar", {"a.jpg": jpeg, "a.cls": b"dog", "b.jpg": jpeg, "b.cls": b"cat"})
        assert self.read(one).classes == ("cat", "dog")

    def test_sources_that_are_none(self, tmp_path: Path, folder: Path, write: Any) -> None:
        for paths in ([], [tmp_path / "absent"]):
            with pytest.raises(ConfigError, match="--source: expected a folder"):
                open_source(paths)
        with pytest.raises(ConfigError, match="--source: expected one folder, got 2"):
            open_source([folder, folder])
        with pytest.raises(DataError, match=r"images in .*, got no images"):
            self.read(write("empty.tar", {"readme": b"x"}))
