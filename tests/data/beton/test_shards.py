"""A data set of several files: the samples of one file, written by any number of processes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from irpe_ds.config import DataConfig
from irpe_ds.data.beton import shards
from irpe_ds.data.beton.cached import converted
from irpe_ds.data.beton.claims import Claims
from irpe_ds.data.beton.convert import convert
from irpe_ds.data.beton.format import Reader
from irpe_ds.data.beton.journal import check_out
from irpe_ds.data.beton.manifest import (
    HASHES,
    MANIFEST,
    SHARDING,
    SKIPPED,
    DatasetManifest,
    beside,
    file_sha256,
    read_hashes,
    shard_path,
)
from irpe_ds.data.beton.options import StorageOptions
from irpe_ds.data.beton.reader import beton_info, read_beton
from irpe_ds.data.beton.shards import convert_shards
from irpe_ds.data.beton.sources import open_source
from irpe_ds.data.beton.verify import verify
from irpe_ds.data.loaders import EvalLoader
from irpe_ds.errors import ConfigError, DataError

COUNT = 3


def make(
    folder: Path, out: Path, count: int = COUNT, options: StorageOptions | None = None, **how: Any
) -> DatasetManifest:
    source = open_source([folder])
    return convert_shards(source, out, options or StorageOptions(), count, workers=1, **how)


def contents(out: Path) -> dict[str, bytes]:
    """The files of a set."""
    paths = [path for path in out.parent.glob(f"{out.stem}*") if path.is_file()]
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`folder` in shards; not to be changed."""
    out = tmp_path_factory.mktemp("shards") / "set.beton"
    make(folder, out)
    return out


@pytest.fixture
def own_set(tmp_path: Path, whole: Path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(whole.parent, tmp_path / "own")
    return tmp_path / "own" / whole.name


@pytest.mark.parametrize("mode", ["passthrough", "proportion"])
def test_samples_are_those_of_one_file(folder: Path, tmp_path: Path, mode: Any) -> None:
    options, single, out = StorageOptions(mode=mode), tmp_path / "a.beton", tmp_path / "b.beton"
    one = convert(open_source([folder]), single, options, workers=1)
    manifest = make(folder, out, options=options)
    for name in ("classes", "class_counts", "num_samples", "changed", "duplicates", "options"):
        assert getattr(manifest, name) == getattr(one, name)
    assert list(read_hashes(out, manifest)) == list(read_hashes(single, one))
    found, expected = read_beton(out, "test"), read_beton(single, "test")
    for name in ("bytes", "label", "height", "width", "mode"):
        assert np.array_equal(found.entries[name], expected.entries[name])
    assert found.entries["file"].tolist() == [0] * 12 + [1] * 12 + [2] * 13
    assert found.hashes is not None
    assert expected.hashes is not None
    assert np.array_equal(found.hashes, expected.hashes)
    for sample in range(37):
        assert np.array_equal(found.payload(sample), expected.payload(sample))
        assert found.is_intact(sample, found.payload(sample))
    assert verify(out, workers=2).num_samples == 37


def test_says_what_the_set_holds(whole: Path) -> None:
    assert not whole.exists()
    names = [shard_path(whole, number, COUNT).name for number in range(COUNT)]
    assert names[2] == "set-00002-of-00003.beton"
    ends = ("", MANIFEST, HASHES)
    assert set(contents(whole)) == {"set.beton.json"} | {n + end for n in names for end in ends}
    info = beton_info(whole, "data.train")
    assert (info.path, info.num_samples, info.num_classes) == (whole, 37, 37)
    assert info.manifest is not None
    files = info.manifest.files(whole)
    assert [record.sha256 for _, record in files] == [file_sha256(path) for path, _ in files]
    assert info.manifest.size == sum(path.stat().st_size for path, _ in files)


def test_each_shard_is_a_file_of_its_own(whole: Path) -> None:
    for number in range(COUNT):
        path = shard_path(whole, number, COUNT)
        assert verify(path, workers=1).num_classes == 37
        theirs = Reader(str(path))
        first, last = 37 * number // 3, 37 * (number + 1) // 3
        assert theirs.metadata["f1"].tolist() == list(range(first, last))  # labels of the whole


def test_batches_are_those_of_one_file(whole: Path, beton: Path) -> None:
    batches = []
    for path in (whole, beton):
        data = DataConfig(train=path, val=path, val_crop=1.0)
        loader = EvalLoader(data, batch_size=37, img_size=(24, 24), rank=0, world_size=1)
        ((images, labels, _),) = loader
        batches.append((images.numpy(), labels.tolist()))
    assert np.array_equal(batches[0][0], batches[1][0])
    assert batches[0][1] == batches[1][1] == list(range(37))


@pytest.mark.slow
def test_ffcv_loader_reads_a_shard(whole: Path) -> None:
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import Loader
    from ffcv.transforms import ToTensor

    decoders = {
        "image": [CenterCropRGBImageDecoder((24, 24), ratio=1.0), ToTensor()],
        "label": [IntDecoder(), ToTensor()],
    }
    last = shard_path(whole, COUNT - 1, COUNT)
    ((images_BHWC, labels),) = Loader(str(last), batch_size=13, num_workers=1, pipelines=decoders)
    data = DataConfig(train=whole, val=whole, val_crop=1.0)
    loader = EvalLoader(data, batch_size=37, img_size=(24, 24), rank=0, world_size=1)
    ((ours_BCHW, _, _),) = loader
    assert labels[:, 0].tolist() == list(range(24, 37))
    assert np.array_equal(images_BHWC.numpy(), ours_BCHW[24:].permute(0, 2, 3, 1).numpy())


def test_what_is_no_image_and_what_is_bad_is_counted_for_all(mixed: Path) -> None:
    shutil.copy(mixed / "cat" / "a.jpg", mixed / "dog" / "z.jpg")  # once in each shard
    (mixed / "cat" / "bad.jpg").write_bytes(b"no image")
    out = mixed.parent / "mixed.beton"
    with pytest.raises(DataError, match=r"bad\.jpg: expected an undamaged image"):
        make(mixed, out, 2)
    manifest = make(mixed, out, 2, on_bad="skip")
    counts = (manifest.num_samples, manifest.skipped, manifest.left_out, manifest.duplicates)
    assert counts == (5, 1, 1, 1)
    assert manifest.class_counts == (2, 3)
    assert beside(out, SKIPPED).read_text().startswith("cat/bad.jpg\t")
    verify(out, workers=1)


def test_two_processes_that_write_one_shard_write_the_same(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes the other's claims for stale: one that is late finds all done, and removed."""
    out = tmp_path / "set.beton"
    write, nested = shards._Conversion._write_shard, []

    def late(self: Any, listing: Any, number: int) -> None:
        if not nested:
            nested.append(number)
            monkeypatch.setattr(Claims, "_is_dead", lambda *_: True)
            make(folder, out)  # takes the shard over, and writes all others
        write(self, listing, number)

    monkeypatch.setattr(shards._Conversion, "_write_shard", late)
    make(folder, out)
    assert nested == [0]
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("step", [0, 4, 7, 8, 13, 25, 26])
def test_stopped_anywhere_it_ends_with_the_same_bytes(
    folder: Path, whole: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "set.beton", iter(range(1000))

    def renamed(*paths: Any) -> None:
        if next(calls) == step:
            raise KeyboardInterrupt
        replace(*paths)

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", renamed)
        with pytest.raises(KeyboardInterrupt):
            make(folder, out)
    if beside(out, SHARDING).exists() and not beside(out, MANIFEST).exists():
        with pytest.raises(DataError, match=r"a complete \.beton file, .* is unfinished"):
            beton_info(out, "data.train")
    make(folder, out)
    assert contents(out) == contents(whole)
    assert not beside(out, SHARDING).exists()


def test_a_list_that_has_changed_is_not_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set.beton"
    with monkeypatch.context() as patch:
        patch.setattr(shards._Conversion, "_write_shard", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(folder, out)
    for name, old in (("0", b"image.jpg"), ("settings.json", b"passthrough")):
        part = beside(out, SHARDING) / "listing.done" / name
        good = part.read_bytes()
        part.write_bytes(good.replace(old, b"something"))
        with pytest.raises(DataError, match=r"remove .*set\.beton\.sharding to start over"):
            make(folder, out)
        part.write_bytes(good)


def test_other_settings_and_other_files_are_refused(
    folder: Path, own_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(own_set)
    assert make(folder, own_set).num_samples == 37  # nothing to do
    raw = StorageOptions(mode="raw")
    with pytest.raises(ConfigError, match=r"which exists; .* expected mode passthrough, got raw"):
        make(folder, own_set, options=raw)
    with pytest.raises(ConfigError, match=r"expected shards 3, got 4"):
        make(folder, own_set, 4)
    with pytest.raises(ConfigError, match=r"--out: expected a new file, or --overwrite"):
        check_out(own_set, overwrite=False)
    beside(own_set, MANIFEST).unlink()
    with pytest.raises(ConfigError, match=r"--out: .* new data set, got .*set-00000-of-00003"):
        make(folder, own_set)
    del before["set.beton.json"]
    assert contents(own_set) == before
    single = tmp_path / "one.beton"
    single.touch()
    with pytest.raises(ConfigError, match=r"--out: .* new data set, got .*one\.beton, which"):
        make(folder, single)
    for count in (0, 513):
        with pytest.raises(ConfigError, match=rf"--shards: expected 1 to 512, got {count}"):
            make(folder, tmp_path / "new.beton", count)
    with pytest.raises(ConfigError, match=r"--shards: expected at most 37, .* got 38"):
        make(folder, tmp_path / "new.beton", 38)


def test_processes_with_other_options_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set.beton"
    monkeypatch.setattr(shards._Conversion, "_write_shard", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(folder, out)
    with pytest.raises(ConfigError, match=r"remove it to start over\): expected mode passthrough"):
        make(folder, out, options=StorageOptions(mode="raw"))


def remove(path: Path) -> None:
    path.unlink()


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def exchange(path: Path) -> None:
    """For another one."""
    other = path.with_name(path.name.replace("00001", "00000"))
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    ("change", "suffix", "expected"),
    [
        (remove, "", r"data\.train: expected the 3 shards of .*, got 1 missing.*00001-of-00003"),
        (shorten, "", r"data\.train: expected \d+ bytes, as in the manifest of .*00001-of"),
        (exchange, "", r"data\.train: expected .*00001-of-00003\.beton"),
        (remove, HASHES, r"00001-of-00003\.beton\.sha256: expected the file of sample hashes"),
        (exchange, HASHES, r"00001-of-00003\.beton\.sha256: .*, got another one"),
    ],
)
def test_shard_that_is_missing_foreign_or_damaged_is_named(
    own_set: Path, change: Callable[[Path], None], suffix: str, expected: str
) -> None:
    change(beside(shard_path(own_set, 1, COUNT), suffix))
    with pytest.raises(DataError, match=expected):
        read_beton(own_set, "data.train")
    with pytest.raises(DataError, match=r"00001-of-00003"):
        verify(own_set, workers=1)


def test_damaged_sample_and_padding_are_found(own_set: Path) -> None:
    shard = shard_path(own_set, 2, COUNT)
    entries = read_beton(own_set, "test").entries
    (sample, *_) = np.flatnonzero(entries["file"] == 2)
    for place, expected in (
        (int(entries["start"][sample]) + 9, rf"sample {sample} \({sample:03d}/image\.jpg\): bytes"),
        (int(entries["start"][sample]) - 1, "SHA-256"),
    ):
        whole = shard.read_bytes()
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with pytest.raises(DataError, match=expected):
            verify(own_set, workers=1)
        shard.write_bytes(whole)


def test_shard_that_shrinks_while_it_is_read_is_named(own_set: Path) -> None:
    beton = read_beton(own_set, "test")
    os.truncate(shard_path(own_set, 0, COUNT), 100)
    with pytest.raises(DataError, match=r"sample 2 of .*set\.beton \(in set-00000-of-00003\.beton"):
        beton.payload(2)


def test_index_that_contradicts_itself(own_set: Path) -> None:
    index = beside(own_set, MANIFEST)
    values = json.loads(index.read_text())
    values["shards"][0]["num_samples"] += 1
    index.write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"sums of the manifest's shards, num_samples 38, size"):
        beton_info(own_set, "data.train")


def test_set_beside_a_folder_is_used_and_not_replaced(folder: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(folder, photos)
    out = beside(photos, ".beton")
    make(photos, out)
    before = contents(out)
    assert converted(photos, "data.train", workers=1) == out
    shutil.rmtree(photos / "001")
    with pytest.raises(DataError, match=r"photos\.beton to be of the images in .*another one"):
        converted(photos, "data.train", workers=1)
    assert contents(out) == before


def test_shards_that_were_removed_too_early_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set.beton"
    with monkeypatch.context() as patch:
        patch.setattr(shards._Conversion, "_write_index", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(folder, out)
    beside(shard_path(out, 1, COUNT), MANIFEST).unlink()
    with pytest.raises(DataError, match=r"remove it to start over\), got no set-00001-of-00003"):
        make(folder, out)


def test_folder_that_the_others_removed_is_no_error(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / whole.name

    def enter(self: Claims) -> None:
        shutil.rmtree(beside(out, SHARDING))
        for path in whole.parent.iterdir():
            shutil.copy(path, out.parent)
        raise FileNotFoundError

    monkeypatch.setattr(Claims, "__enter__", enter)
    assert make(folder, out).num_samples == 37
    assert contents(out) == contents(whole)
