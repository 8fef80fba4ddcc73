"""What data_prep/describe.py counts and measures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from irpe_ds.data.beton.convert import convert
from irpe_ds.data.beton.manifest import HASHES, MANIFEST, beside
from irpe_ds.data.beton.options import StorageOptions
from irpe_ds.data.beton.sources import open_source
from irpe_ds.data.description import Description, describe, facts, quantiles, to_text, yaml_lines
from irpe_ds.data.pipelines.timm import open_images
from irpe_ds.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine plain images: 6 cats, of which two are equal, and 3 dogs, of which one is a cat's."""
    root = tmp_path_factory.mktemp("described")
    for name, count in (("cat", 6), ("dog", 3)):
        (root / name).mkdir()
        for number in range(count):
            colour = (10 * number, 0 if name == "cat" else 255, 51)
            image = Image.new("RGB", (30 + number, 20), colour)
            image.save(root / name / f"{number}.png")
    (root / "cat/9.png").write_bytes((root / "cat/1.png").read_bytes())
    (root / "dog/9.png").write_bytes((root / "cat/1.png").read_bytes())
    (root / "cat/0.png").unlink()
    (root / "dog/0.png").unlink()
    return root


@pytest.fixture(scope="module")
def beton(folder: Path) -> Path:
    path = folder.with_suffix(".beton")
    convert(open_source([folder]), path, StorageOptions(), workers=2)
    return path


def of(path: Path, count: int = 100, seed: int = 0) -> Description:
    return describe(open_images(path, "FILE"), count=count, seed=seed, workers=2)


@pytest.mark.parametrize("source", ["folder", "beton"])
def test_the_same_of_a_folder_and_of_its_beton(source: str, folder: Path, beton: Path) -> None:
    found = of({"folder": folder, "beton": beton}[source])
    assert (found.classes, found.num_samples) == (("cat", "dog"), 9)
    assert found.counts.tolist() == [6, 3]
    assert sorted(found.widths) == [31, 31, 31, 31, 32, 32, 33, 34, 35]
    assert (found.copies, found.conflicting, found.compared) == (2, 1, 9)
    red = np.array([10, 10, 10, 10, 20, 20, 30, 40, 50]) / 255
    green = np.array([0] * 7 + [1] * 2)
    assert np.allclose(found.mean, [red.mean(), green.mean(), 0.2])
    assert np.allclose(found.std, [red.std(), green.std(), 0], atol=1e-7)
    (lead, copies, first, second) = facts(found)
    assert lead == "Sizes and bytes of all 9 images; most frequent: 31 x 20 pixels, 44.4 %"
    assert copies == "Duplicates among all 9 images: 2, 1 of them in two classes"
    names = {
        "folder": ("cat/9.png (cat) = dog/9.png (dog)", "cat/1.png (cat) = cat/9.png (cat)"),
        "beton": ("sample 5 (cat) = sample 8 (dog)", "sample 0 (cat) = sample 5 (cat)"),
    }
    assert (first.strip(), second.strip()) == names[source]
    assert yaml_lines(found) == (
        "data:\n  mean: [0.0871, 0.2222, 0.2000]\n  std: [0.0548, 0.4157, 0.0000]"
    )


def test_images_weigh_the_same_whatever_their_size(tmp_path: Path) -> None:
    rng, stacked = np.random.default_rng(0), []
    for number in range(3):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (2 + 10 * number, 9, 3)).astype(np.uint8)
        stacked.append(pixels.reshape(-1, 3) / 255)
        Image.fromarray(pixels).save(tmp_path / "ab"[number % 2] / f"{number}.png")
    found = of(tmp_path)
    mean = np.mean([image.mean(0) for image in stacked], axis=0)
    square = np.mean([(image**2).mean(0) for image in stacked], axis=0)
    assert np.allclose(found.mean, mean)
    assert np.allclose(found.std, np.sqrt(square - mean**2))


def test_a_sample_is_drawn_by_its_seed(folder: Path, beton: Path) -> None:
    first, again, other = (of(folder, 4, seed) for seed in (1, 1, 2))
    assert first.widths.tolist() == again.widths.tolist()
    assert first.widths.tolist() != other.widths.tolist()
    assert facts(first)[0].startswith("Sizes and bytes of 4 of 9 images (seed 1);")
    assert first.counts.tolist() == [6, 3]  # labels need no reading
    tables = of(beton, 4, 1)
    assert (len(tables.widths), tables.compared, tables.decoded) == (9, 9, 4)
    assert "of 4 of 9 images (seed 1), each of equal weight" in to_text(tables)
    assert ": 9 images of 2 classes in about " in to_text(first)


def test_ffcvs_own_file_has_numbers_for_names(beton: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.beton"
    bare.write_bytes(beton.read_bytes())
    found = of(bare)
    assert found.classes == ["0", "1"]
    assert (found.copies, found.conflicting) == (2, 1)  # of the bytes that were read


def test_damage_is_listed(beton: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.beton"
    for suffix in ("", MANIFEST, HASHES):
        beside(own, suffix).write_bytes(beside(beton, suffix).read_bytes())
    start = int(open_images(own, "FILE").beton.entries["start"][3])  # type: ignore[attr-defined]
    data = bytearray(own.read_bytes())
    data[start] ^= 255
    own.write_bytes(data)
    found = of(own)
    assert found.decoded == 8
    assert facts(found)[-2:] == [
        "Cannot be read: 1 of all 9 images",
        "  sample 3: bytes that differ from those converted",
    ]
    bad = tmp_path / "bad"
    for name in "ab":
        (bad / name).mkdir(parents=True)
        (bad / name / "x.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"one image that can be read among the 2 tried, got none"):
        of(bad)


def test_of_many_classes_the_ends_are_listed(folder: Path) -> None:
    found = of(folder)
    many = Description(
        **found.__dict__ | {"counts": np.arange(1, 1001), "classes": [f"c{n}" for n in range(1000)]}
    )
    text = to_text(many)
    assert "c999" in text
    assert "... 980 more" in text
    assert "c0 " in text
    assert "c500" not in text
    assert quantiles(many)[-1] == ("images of a class", "1", "11", "500", "990", "1,000")
