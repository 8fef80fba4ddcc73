"""The layouts that data sets come in: each gives its classes, whatever packs it, or a refusal."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from irpe_ds.data.beton.journal import Journal
from irpe_ds.data.beton.listing import Listing
from irpe_ds.data.beton.options import SourceOptions
from irpe_ds.data.beton.sources import open_source
from irpe_ds.errors import ConfigError, DataError
from tests.packing import in_folder, in_tar, in_zip, labels, listed, text

PACK = {"folder": in_folder, "tar": in_tar, "zip": in_zip}


@pytest.fixture(params=PACK)
def pack(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    return lambda tree: PACK[request.param](tmp_path / "set", tree)


TINY = {
    "n01/images/n01_0.JPEG": b"x",
    "n01/images/n01_1.JPEG": b"x",
    "n01/n01_boxes.txt": b"n01_0.JPEG 0 0 62 63",
    "n02/images/n02_0.JPEG": b"x",
    "n02/n02_boxes.txt": b"",
}


def test_tiny_imagenet(pack: Callable[..., Path]) -> None:
    assert listed(pack(TINY)) == (
        ("n01", "n02"),
        [(0, "images/n01_0.JPEG"), (0, "images/n01_1.JPEG"), (1, "images/n02_0.JPEG")],
        (),
    )


FLAT = {"images/v_0.JPEG": b"x", "images/v_1.JPEG": b"x", "images/v_2.JPEG": b"x"}
WANTED = (("n01", "n02"), [(0, "v_1.JPEG"), (1, "v_0.JPEG"), (1, "v_2.JPEG")])

LISTS = {
    "val_annotations.txt": "".join(f"v_{n}.JPEG\tn0{2 - n % 2}\t0\t32\t62\n" for n in range(3)),
    "LOC_val_solution.csv": "ImageId,PredictionString\n"
    + "".join(f"v_{n},n0{2 - n % 2}\n" for n in (2, 0, 1)),
    "header.csv": "id,image,label\n" + "".join(f"{n},v_{n}.JPEG,n0{2 - n % 2}\n" for n in range(3)),
    "no_header.csv": "".join(f"v_{n}.JPEG,n0{2 - n % 2}\n" for n in range(3)),
    "commas.txt": "".join(f"v_{n}.JPEG,n0{2 - n % 2}\n" for n in range(3)),
    "caffe.txt": "".join(f"v_{n}.JPEG n0{2 - n % 2}\n" for n in range(3)),
    "longer.txt": "".join(f"/mnt/val/images/v_{n}.JPEG n0{2 - n % 2}\n" for n in range(3)),
    "in_order.txt": "n02\nn01\nn02\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_flat_folder_with_a_list(name: str, tmp_path: Path, pack: Callable[..., Path]) -> None:
    keys = {"image_key": "image", "label_key": "label"} if name == "header.csv" else {}
    classes, images, notes = listed(
        pack(FLAT | {"v.txt": b""}), labels=text(tmp_path / name, LISTS[name]), **keys
    )
    assert (classes, images, notes) == (*WANTED, ())


def test_boxes_of_kaggle(tmp_path: Path, pack: Callable[..., Path]) -> None:
    rows = (
        "v_1,n03995372 85 1 499 272 n03995372 9 9 9 9 ",
        "v_0,n01440764 1 2 3 4 ",
        "v_2,n01440764 ",
    )
    lines = text(tmp_path / "LOC_val_solution.csv", "\n".join(("ImageId,PredictionString", *rows)))
    assert labels(pack(FLAT), labels=lines) == (("n01440764", "n03995372"), [0, 0, 1])


def test_numbers_of_caffe_with_and_without_names(tmp_path: Path, pack: Callable[..., Path]) -> None:
    path, caffe = pack(FLAT), text(tmp_path / "val.txt", "v_0.JPEG 1\nv_1.JPEG 0\nv_2.JPEG 1\n")
    assert labels(path, labels=caffe) == (("0", "1"), [0, 1, 1])
    names = text(tmp_path / "names.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    assert labels(path, labels=caffe, classes=names) == (("n01440764", "n01443537"), [0, 1, 1])


def test_names_in_a_list_that_do_not_fit(tmp_path: Path, pack: Callable[..., Path]) -> None:
    path = pack({"a/1.jpg": b"x", "b/1.jpg": b"x", "b/2.jpg": b"x"})
    for content, message in (
        (
            "1.jpg 0\n2.jpg 1\n",
            r"--labels: expected more of the path .*, got [ab]/1\.jpg and [ab]/1\.jpg",
        ),
        ("a/1.jpg 0\nb/2.jpg 1\n", r"--labels: expected a label for .*b/1\.jpg, got none in"),
        ("a/1.jpg 0\na/1.jpg 1\n", r"--labels: expected one label for each image"),
        (
            "x/a/1.jpg 0\ny/a/1.jpg 1\nb/1.jpg 0\nb/2.jpg 0\n",
            r"--labels: expected one line for a/1\.jpg",
        ),
    ):
        with pytest.raises(DataError, match=message):
            listed(path, labels=text(tmp_path / "list.txt", content))
    lines = text(tmp_path / "list.txt", "/a/1.jpg 0\nb/1 1\nb/2.jpg 1\nc/1.jpg 1\n")
    assert listed(path, labels=lines)[1:] == (
        [(0, "a/1.jpg"), (1, "b/1.jpg"), (1, "b/2.jpg")],
        (f"1 lines of {tmp_path}/list.txt name no image",),
    )


def test_labels_that_are_names_of_images(tmp_path: Path, pack: Callable[..., Path]) -> None:
    """A list of names without endings was taken for labels: a class for each image."""
    path = pack({f"val/{n:02d}.jpg": b"x" for n in range(20)})
    lines = text(tmp_path / "val.txt", "".join(f"x{n:02d} {n % 2}\n" for n in range(20)))
    with pytest.raises(DataError, match=r"labels that many images share .*20 different ones of 20"):
        listed(path, labels=lines)


def test_flat_folder_without_a_list(pack: Callable[..., Path]) -> None:
    with pytest.raises(
        DataError, match=r"--source: expected images of two classes .*one class, images"
    ):
        listed(pack(FLAT))


def test_loose_image_beside_class_folders(pack: Callable[..., Path]) -> None:
    path = pack({"train/cat/1.jpg": b"x", "train/dog/1.jpg": b"x", "train/loose.jpg": b"x"})
    with pytest.raises(DataError, match=r"every image in a class folder, got .*train/loose\.jpg"):
        listed(path)


def test_folder_above_training_and_validation(pack: Callable[..., Path]) -> None:
    tree = {f"imagenet/{part}/{name}/1.jpg": b"x" for part in ("train", "val") for name in "ab"}
    with pytest.raises(DataError, match=r"such as .*/train, got .* with the folders train, val"):
        listed(pack(tree))


def test_part_of_an_archive(tmp_path: Path) -> None:
    tree = {f"tiny/{part}/{name}/1.jpg": b"x" for part in ("train", "val") for name in "ab"}
    for path in (in_tar(tmp_path / "x", tree), in_zip(tmp_path / "x", tree)):
        assert listed(path / "tiny/train")[:2] == (("a", "b"), [(0, "1.jpg"), (1, "1.jpg")])
        with pytest.raises(DataError, match=r"images in .*tiny/test, got no images"):
            listed(path / "tiny/test")


PLACES = {"a/abbey/1.jpg": b"x", "a/apartment/outdoor/1.jpg": b"x", "b/bakery/1.jpg": b"x"}


def test_nested_classes(tmp_path: Path, pack: Callable[..., Path]) -> None:
    path = pack(PLACES)
    classes, images, notes = listed(path)
    assert (classes, [label for label, _ in images]) == (("a", "b"), [0, 0, 1])
    assert "--class-level leaf there would be 3 classes" in notes[0]
    assert listed(path, class_level="top") == (classes, images, ())
    leaves = ("a/abbey", "a/apartment/outdoor", "b/bakery")
    assert labels(path, class_level="leaf") == (leaves, [0, 1, 2])
    lines = "/b/bakery 0\n/a/abbey 1\n/a/apartment/outdoor 2\n/z/zoo 3\n"
    names = text(tmp_path / "categories_places365.txt", lines)
    classes = ("b/bakery", "a/abbey", "a/apartment/outdoor", "z/zoo")
    assert labels(path, class_level="leaf", classes=names) == (classes, [0, 1, 2])
    train = "/a/abbey/1.jpg 1\n/a/apartment/outdoor/1.jpg 2\n/b/bakery/1.jpg 0\n"
    listing = text(tmp_path / "places365_train.txt", train)
    assert labels(path, labels=listing, classes=names) == (classes, [0, 1, 2])


def test_folders_beside_images_of_a_class_are_no_choice(pack: Callable[..., Path]) -> None:
    path = pack({"cat/1.jpg": b"x", "cat/old/1.jpg": b"x", "cat/new/1.jpg": b"", "dog/1.jpg": b"x"})
    assert listed(path)[2] == ()


HIDDEN = (".DS_Store", "n01/._1.jpg", ".git/1.jpg", "__MACOSX/n01/1.jpg")
CHECKPOINT = "n01/.ipynb_checkpoints/1-checkpoint.jpg"


def test_hidden_files(pack: Callable[..., Path]) -> None:
    tree = {"n01/1.jpg": b"x", "n02/1.jpg": b"x", "n02/notes.txt": b"x", ".empty/": b""}
    source = open_source([pack(tree | dict.fromkeys((*HIDDEN, CHECKPOINT), b"x"))])
    with closing(Journal(None, {})) as journal:
        assert journal.list_source(source) == Listing(("n01", "n02"), (1, 1), 6, ())


def test_empty_class_folder(tmp_path: Path, pack: Callable[..., Path]) -> None:
    path = pack({"n01/1.jpg": b"x", "n02/": b"", "n03/1.jpg": b"x"})
    with pytest.raises(DataError, match=r"images in every class folder .*, got .*/n02"):
        listed(path)
    classes = text(tmp_path / "classes.txt", "n03\nn02\nn01\n")
    assert labels(path, classes=classes) == (("n03", "n02", "n01"), [0, 2])


def test_subset_of_the_classes_of_a_model(tmp_path: Path, pack: Callable[..., Path]) -> None:
    """ImageNet-A has 200 synsets; ImageNet-V2's folders are the numbers of the 1,000."""
    lines = "n01440764 tench, Tinca tinca\nn01443537 goldfish, crane\nn01484850 shark, crane\n"
    classes = text(tmp_path / "synset_words.txt", lines)
    names = ("n01440764", "n01443537", "n01484850")
    for folders in (("n01443537", "n01484850"), ("1", "2"), ("goldfish", "shark")):
        path = pack({f"{folder}/1.jpg": b"x" for folder in folders})
        assert labels(path, classes=classes) == (names, [1, 2])
        if path.is_dir():
            path.rename(tmp_path / folders[0])
    with pytest.raises(DataError, match=r"expected a label that --classes has .*, got crane"):
        listed(pack({"tench/1.jpg": b"x", "crane/1.jpg": b"x"}), classes=classes)


def test_folders_with_the_numbers_of_classes(pack: Callable[..., Path]) -> None:
    path = pack({f"{n}/1.jpg": b"x" for n in range(11)})
    assert labels(path) == (tuple(map(str, range(11))), list(range(11)))


def test_classes_that_are_not_chosen(tmp_path: Path, pack: Callable[..., Path]) -> None:
    path, classes = pack({f"{c}/1.jpg": b"x" for c in "abc"}), text(tmp_path / "two.txt", "c\na\n")
    with pytest.raises(DataError, match=r"b/1\.jpg: expected a label that --classes has .* got b"):
        listed(path, classes=classes)
    assert listed(path, classes=classes, other_classes="skip") == (
        ("c", "a"),
        [(0, "1.jpg"), (1, "1.jpg")],
        ("1 images of other classes than --classes has are left out",),
    )


SEVEN = {f"{c}/{n}.jpg": b"x" for c, count in (("a", 5), ("b", 2)) for n in range(count)}


def test_folders_with_numbers_that_are_names(tmp_path: Path, pack: Callable[..., Path]) -> None:
    path = pack({f"{name}/1.jpg": b"x" for name in ("10023", "20344", "2019-01", "7")})
    assert labels(path)[0] == ("10023", "2019-01", "20344", "7")
    classes = text(tmp_path / "ids.txt", "20344\n2019-01\n")
    with pytest.raises(DataError, match=r"expected a label that --classes has"):
        listed(path, classes=classes)
    found = labels(path, classes=classes, other_classes="skip")
    assert found == (("20344", "2019-01"), [0, 1])
    subset = text(tmp_path / "subset.txt", "7/1.jpg\n")
    with pytest.raises(DataError, match=r"--source: expected images to take in .*, got none of 4"):
        listed(path, classes=classes, other_classes="skip", subset=subset)


class TestChoice:
    @pytest.mark.parametrize(
        ("options", "images"),
        [
            ({"every": 2}, ["a/0", "a/2", "a/4", "b/0"]),
            ({"limit": 3}, ["a/0", "a/1", "b/0"]),
            ({"limit": 1}, ["a/0"]),
            ({"limit": 99}, ["a/0", "a/1", "a/2", "a/3", "a/4", "b/0", "b/1"]),
            ({"every": 2, "limit": 3}, ["a/0", "a/2", "b/0"]),
        ],
    )
    def test_of_each_class(
        self, options: dict[str, int], images: list[str], pack: Callable[..., Path]
    ) -> None:
        classes, found, _ = listed(pack(SEVEN), **options)
        assert [f"{classes[label]}/{name[:-4]}" for label, name in found] == images

    def test_of_a_list(self, tmp_path: Path, pack: Callable[..., Path]) -> None:
        path = pack(SEVEN)
        for content in ("a/3.jpg\nx/a/1.jpg\n", "image,label\na/3,0\na/1,0\n"):
            subset = text(tmp_path / ("subset.csv" if "," in content else "subset.txt"), content)
            classes, images, _ = listed(path, subset=subset)
            assert (classes, images) == (("a", "b"), [(0, "1.jpg"), (0, "3.jpg")])  # b keeps label
        subset.write_text("a/3.jpg\na/9.jpg\n")
        with pytest.raises(DataError, match=r"--subset: expected names of images of .*, got a/9"):
            listed(path, subset=subset)

    @pytest.mark.parametrize("options", [{"every": 0}, {"limit": 0}, {"other_classes": "skip"}])
    def test_that_makes_no_sense(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError):
            SourceOptions(**options)
