"""The data of a run, checked before it starts."""

from pathlib import Path

import pytest

from irpe_ds.config import DataConfig, RunConfig
from irpe_ds.data.beton.reader import DatasetInfo
from irpe_ds.errors import ConfigError
from irpe_ds.training import evaluation


def test_label_that_the_model_has_no_class_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a .beton file without manifest."""
    values = {
        "name": "x",
        "model": {"name": "deit", "num_classes": 12},
        "data": {"train": "a.beton", "val": "b"},
    }
    info = DatasetInfo(path=Path("a.beton"), num_samples=9, classes=None, largest_label=(12, 7))
    monkeypatch.setattr(evaluation, "dataset_info", lambda data, part: info)
    expected = (
        r"model\.num_classes: expected more than 12, the label of sample 7 of a\.beton, got 12"
    )
    with pytest.raises(ConfigError, match=expected):
        evaluation.open_checked(RunConfig.model_validate(values), "train")


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

    monkeypatch.setattr(evaluation, "dataset_info", dataset_info)
    values = {"name": "x", "model": {"name": "deit"}, "data": {"train": "a", "val": "b"}}
    with pytest.raises(ConfigError, match=r"^data\.val: expected the classes of train") as caught:
        evaluation.check_data(RunConfig.model_validate(values))
    assert str(caught.value).endswith(message)
