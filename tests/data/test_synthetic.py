"""data_prep/synthetic.py."""

import io
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

from data_prep import synthetic
from data_prep.synthetic_imagenet import DEVKIT, MIN_SHARDS, Photos, Synthetic, write
from irpe_ds.data.beton.format import imdecode
from irpe_ds.errors import ConfigError

IMAGES, CLASSES = 40, 4


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Synthetic]:
    out = tmp_path_factory.mktemp("synthetic") / "out"
    made = write(out, images=IMAGES, classes=CLASSES, oddities=True, bad=True, seed=3)
    return out, made


def members(source: Path | io.BytesIO) -> dict[str, bytes]:
    """Contents of a tar's members, in order; names are unique."""
    file = source.open("rb") if isinstance(source, Path) else source
    with file, tarfile.open(fileobj=file) as tar:
        contents = [(member.name, tar.extractfile(member).read()) for member in tar]
    assert len(dict(contents)) == len(contents)
    return dict(contents)


def tree(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def decodes(data: np.ndarray) -> bool:
    """Whether these are the bytes of an RGB or grey JPEG that decodes without a warning."""
    try:
        with Image.open(io.BytesIO(data.tobytes())) as image:
            height, width = image.height, image.width
    except OSError:
        return False
    pixels = np.empty((height, width, 3), np.uint8)
    return imdecode(data, pixels, height, width, height, width, 0, 0, 1, 1, False, False) == 0


def test_training_layouts_hold_the_same_bytes(written: tuple[Path, Synthetic]) -> None:
    out, made = written
    folder = tree(out / "folder/train")
    assert tuple(folder) == made.train == tuple(sorted(made.train))
    assert len(folder) == IMAGES + len(made.planted)

    plain = members(out / "train.tar")
    assert plain == folder
    assert list(plain) != list(folder)

    class_tars = members(out / "ILSVRC2012_img_train.tar")
    assert list(class_tars) == [f"{synset}.tar" for synset in made.synsets]
    inner = {
        f"{name.removesuffix('.tar')}/{file}": data
        for name, content in class_tars.items()
        for file, data in members(io.BytesIO(content)).items()
    }
    assert inner == folder

    assert (out / "wds/classes.txt").read_text().split() == list(made.synsets)
    shards = sorted((out / "wds").glob("train-*.tar"))
    assert len(shards) == MIN_SHARDS
    samples = {name: data for shard in shards for name, data in members(shard).items()}
    assert len(samples) == 3 * len(folder)
    for path, data in folder.items():
        synset, name = path.split("/")
        key = name.removesuffix(".JPEG")
        label = made.synsets.index(synset)
        assert samples[f"{key}.jpg"] == data
        assert samples[f"{key}.cls"] == str(label).encode()
        record = {"filename": name, "label": label, "synset": synset}
        assert json.loads(samples[f"{key}.json"]) == record


def test_validation_layouts(written: tuple[Path, Synthetic]) -> None:
    out, made = written
    folder = tree(out / "folder/val")
    flat = members(out / "ILSVRC2012_img_val.tar")
    assert list(flat) == [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 5)]
    assert {path.split("/")[1]: data for path, data in folder.items()} == flat
    assert sorted(made.val) == list(folder)
    synsets = [path.split("/")[0] for path in made.val]
    assert (out / "val_synsets.txt").read_text().split() == synsets

    devkit = members(out / f"{DEVKIT}.tar.gz")
    truth = devkit[f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt"].split()
    table = loadmat(io.BytesIO(devkit[f"{DEVKIT}/data/meta.mat"]), squeeze_me=True)["synsets"]
    leaves = [row for row in table if row["num_children"] == 0]
    inner = [row for row in table if row["num_children"] > 0]
    assert [row["ILSVRC2012_ID"] for row in leaves] == [1, 2, 3, 4]
    assert [row["ILSVRC2012_ID"] for row in inner] == [1001, 1002]
    synset_of = {row["ILSVRC2012_ID"]: row["WNID"] for row in leaves}
    assert [synset_of[int(number)] for number in truth] == synsets
    assert sorted(synset_of.values()) == list(made.synsets) != list(synset_of.values())
    counts = Counter(path.split("/")[0] for path in made.train)
    assert {row["WNID"]: row["num_train_images"] for row in leaves} == counts


def test_ordinary_images_resemble_imagenet(written: tuple[Path, Synthetic]) -> None:
    out, made = written
    planted = {file.path for file in made.planted}
    paths = [out / "folder/train" / path for path in made.train if path not in planted]
    assert 90_000 < np.mean([path.stat().st_size for path in paths]) < 130_000
    shapes = set()
    for path in paths:
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert 333 <= min(image.size) <= 400
            assert 480 <= max(image.size) <= 500
            shapes.add(image.width > image.height)
    assert shapes == {True, False}
    assert len({path.read_bytes() for path in paths}) == len(paths)
    numbers = [int(path.stem.split("_")[1]) for path in paths]
    assert len(set(numbers)) == len(numbers) < max(numbers) - min(numbers)


def test_planted(written: tuple[Path, Synthetic]) -> None:
    out, made = written
    kinds = Counter(file.kind for file in made.planted)
    twice = {"grey": 2, "duplicate": 2}
    once = ("cmyk", "png", "exif", "progressive", "unicode", "space")
    once += ("empty", "truncated", "text", "overwritten")
    assert kinds == twice | dict.fromkeys(once, 1)
    originals = set()
    for file in made.planted:
        path = out / "folder/train" / file.path
        data = np.frombuffer(path.read_bytes(), np.uint8)
        if file.bad:
            assert not decodes(data)
            continue
        assert decodes(data) == (file.kind not in ("cmyk", "png"))
        with Image.open(path) as image:
            image.load()
            looks = {
                "cmyk": image.mode == "CMYK",
                "grey": image.mode == "L",
                "png": image.format == "PNG",
                "exif": image.getexif().get(0x0112) == 6,
                "progressive": "progressive" in image.info,
                "unicode": not file.name.isascii(),
                "space": " " in file.name,
                "duplicate": file.original is not None,
            }
        assert [kind for kind, found in looks.items() if found] == [file.kind]
        if file.original:
            assert path.read_bytes() == (out / "folder/train" / file.original).read_bytes()
            originals.add(file.original.split("/")[0] == file.synset)
    assert originals == {True, False}


def test_seed_decides_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trees = []
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        out = tmp_path / name
        options = ["--images", "4", "--classes", "2", "--oddities", "--seed", str(seed)]
        monkeypatch.setattr(sys, "argv", ["synthetic.py", "--out", str(out), *options])
        synthetic.main()
        trees.append(tree(out))
    one, two, other = trees
    assert one == two
    for name, data in other.items():
        if name.endswith(".JPEG"):
            assert one.get(name) != data


def test_large_photos() -> None:
    small, large = Photos(seed=0).image(0), Photos(seed=0, enlarge=3).image(0)
    assert large.size == (3 * small.width, 3 * small.height)


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"classes": 2}, "--out"),
        ({"classes": 1}, "--classes"),
        ({"classes": 9}, "--classes"),
        ({"classes": 2, "enlarge": 0}, "--enlarge"),
    ],
)
def test_refuses(tmp_path: Path, wrong: dict[str, int], where: str) -> None:
    if where == "--out":
        (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as error:
        write(tmp_path, images=8, seed=0, **wrong)
    assert error.value.where == where
