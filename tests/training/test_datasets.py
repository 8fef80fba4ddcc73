"""The data sets of a run, checked before it starts."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from irpe_ds.config import DataConfig, RunConfig
from irpe_ds.data.beton.convert import convert
from irpe_ds.data.beton.options import SourceOptions, StorageOptions
from irpe_ds.data.beton.reader import DatasetInfo, beton_info
from irpe_ds.data.beton.sources import open_source
from irpe_ds.data.loaders import EvalLoader, TrainLoader
from irpe_ds.data.pipelines.pipeline import val_images
from irpe_ds.errors import ConfigError, DataError
from irpe_ds.training import datasets


def test_label_that_the_model_has_no_class_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a .beton file without manifest."""
    values = {
        "name": "x",
        "model": {"name": "deit", "num_classes": 12},
        "data": {"train": "a.beton", "val": "b"},
    }
    info = DatasetInfo(path=Path("a.beton"), num_samples=9, classes=None, largest_label=(12, 7))
    monkeypatch.setattr(datasets, "dataset_info", lambda data, part: info)
    expected = (
        r"model\.num_classes: expected more than 12, the label of sample 7 of a\.beton, got 12"
    )
    with pytest.raises(ConfigError, match=expected):
        datasets.open_checked(RunConfig.model_validate(values), "train")


@pytest.mark.parametrize(
    ("val", "message"),
    [
        (("cat", "cow", "emu"), "got others: without 'ant', 'dog', with 'cow', 'emu'"),
        (("cat", "ant", "dog"), "got another order"),
        (("ant", "cat"), "got others: without 'dog'"),
    ],
)
def test_other_classes_in_validation_are_named(
    val: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = {"train": ("ant", "cat", "dog"), "val": val}

    def dataset_info(_: DataConfig, part: str) -> DatasetInfo:
        return DatasetInfo(path=Path(part), num_samples=3, classes=classes[part])

    monkeypatch.setattr(datasets, "dataset_info", dataset_info)
    values = {"name": "x", "model": {"name": "deit"}, "data": {"train": "a", "val": "b"}}
    with pytest.raises(ConfigError, match=r"^data\.val: expected the classes of train") as caught:
        datasets.check_data(RunConfig.model_validate(values))
    assert str(caught.value).endswith(message)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images of ants and five of bees, each of a grey of its own."""
    for name, count, first in (("ant", 3, 10), ("bee", 5, 100)):
        for number in range(count):
            path = tmp_path / "photos" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), first + number).save(path)
    return tmp_path / "photos"


def config(photos: Path, **data: Any) -> RunConfig:
    model = {"name": "deit", "num_classes": "auto"}
    values = {"train": photos, "val_share": 0.3, "workers": 1} | data
    return RunConfig.model_validate({"name": "x", "model": model, "data": values})


def greys(loader: EvalLoader) -> list[int]:
    """Which images a loader shows."""
    return [int(i[0, 0, 0]) for images, _, valid in loader for i in images[valid]]


class TestFolders:
    @pytest.mark.parametrize("pipeline", ["ffcv", "timm"])
    def test_one_is_shared_between_training_and_validation(
        self, pipeline: str, photos: Path
    ) -> None:
        found, notes = datasets.resolve(config(photos, pipeline=pipeline))
        assert found.model.num_classes == 2
        *folder, split = notes
        images = f"data.train: 8 images of 2 classes in {photos}; read from {photos}.beton"
        assert folder == ([] if pipeline == "timm" else [images])
        assert split == "data.val: 3 of the 8 images; val_images.json lists them"
        assert found.data.train == (
            photos if pipeline == "timm" else photos.parent / "photos.beton"
        )
        infos = datasets.check_data(found)
        assert {part: info.num_samples for part, info in infos.items()} == {"train": 5, "val": 3}
        place: Any = {"batch_size": 2, "img_size": (8, 8), "rank": 0, "world_size": 1}
        val = greys(EvalLoader(found.data, **place))
        names = [f"{'ant' if g < 100 else 'bee'}/{g % 10}.png" for g in val]
        assert names == val_images(found.data)
        assert sum(name.startswith("ant") for name in names) == 1
        for order in ("global", "blocks"):
            data = found.data.model_copy(update={"order": order})
            batches = TrainLoader(data, found.augment, seed=0, **place).epoch(0)
            train = {int(i[0, 4, 4]) for batch in batches for i in batch.images}
            assert len(train) == 4  # two full batches
            assert not train & {*val}

    def test_the_split_has_a_seed_of_its_own(self, photos: Path) -> None:
        one, same, other = (
            val_images(config(photos, val_seed=seed, pipeline=pipeline).data)
            for seed, pipeline in ((1, "timm"), (1, "ffcv"), (2, "timm"))
        )
        assert one == same != other

    def test_a_class_of_one_image_cannot_be_shared(self, photos: Path) -> None:
        shutil.rmtree(photos / "ant")
        (photos / "ant").mkdir()
        Image.new("L", (8, 8)).save(photos / "ant" / "a.png")
        found = config(photos, pipeline="timm")
        with pytest.raises(DataError, match=r"at least 2 images of every class.*1 of class ant"):
            datasets.resolve(found)

    def test_images_that_cannot_be_read_are_told(self, photos: Path) -> None:
        (photos / "bee" / "7.png").write_bytes(b"no image")
        (photos / "bee" / "8.heic").write_bytes(b"of a kind that is not read")
        found, (images, note, _) = datasets.resolve(config(photos))
        assert f"in {photos}, and 1 other files left out; read" in images
        assert "1 of 9 images in " in note
        assert str(found.data.train) + ".skipped lists them" in note

    def test_the_folder_above_is_refused(self, photos: Path) -> None:
        (photos / "ant").rename(photos / "train")
        (photos / "bee").rename(photos / "Val")
        with pytest.raises(DataError, match=r"such as .*/photos/Val, got .* folders Val, train"):
            datasets.resolve(config(photos))

    def test_validation_with_some_of_the_classes(self, photos: Path) -> None:
        train, val = datasets.resolve(config(photos))[0].data.train, photos.parent / "val.beton"
        shutil.rmtree(photos / "ant")
        source = open_source([photos], SourceOptions(classes=train))
        convert(source, val, StorageOptions(), workers=1)
        found, _ = datasets.resolve(config(train, val=val))
        assert datasets.check_data(found)["val"].classes == ("ant", "bee")
        place: Any = {"batch_size": 9, "img_size": (8, 8), "rank": 0, "world_size": 1}
        ((_, labels, _),) = EvalLoader(found.data, **place)
        assert labels.tolist()[:5] == [1] * 5

    def test_a_preflight_writes_nothing(self, photos: Path) -> None:
        found = datasets.unconverted(config(photos))
        assert found.model.num_classes == 2
        assert [*photos.parent.iterdir()] == [photos]

    def test_classes_of_a_file_without_manifest_are_its_labels(self, photos: Path) -> None:
        found, _ = datasets.resolve(config(photos))
        for suffix in (".json", ".sha256"):
            found.data.train.with_name(f"photos.beton{suffix}").unlink()
        assert beton_info(found.data.train, "").classes is None
        again = datasets.with_class_count(config(found.data.train), "val")
        assert again.model.num_classes == 2
        assert val_images(again.data)[0].startswith("sample ")


class TestNames:
    def test_those_that_the_run_began_with(self, photos: Path, tmp_path: Path) -> None:
        found, _ = datasets.resolve(config(photos, pipeline="timm"))
        info = datasets.check_data(found)["train"]
        datasets.check_names(found, info, tmp_path)  # of an older run, which kept none
        names = datasets.names_of(found, info)
        assert names.keys() == {"classes.json", "val_images.json"}
        assert names["classes.json"] == ["ant", "bee"]
        for file, values in names.items():
            (tmp_path / file).write_text(str(values).replace("'", '"'))
        datasets.check_names(found, info, tmp_path)
        for number in range(10, 20):
            Image.new("L", (8, 8)).save(photos / "bee" / f"{number}.png")
        with pytest.raises(DataError, match=r"val_images\.json: expected .* got others: with"):
            datasets.check_names(found, info, tmp_path)

    def test_classes_in_another_order(self, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "classes.json").write_text('["bee", "ant"]')
        found = config(photos, val=photos, pipeline="timm")
        info = DatasetInfo(path=photos, num_samples=8, classes=("ant", "bee"))
        with pytest.raises(DataError, match=r"the classes that the run began with, got another"):
            datasets.check_names(found, info, tmp_path)


def test_without_data_the_number_of_classes_is_asked_for(tmp_path: Path) -> None:
    model = config(tmp_path).model
    with pytest.raises(ConfigError, match=r"^model\.num_classes: expected a number, as no data"):
        _ = model.class_count
