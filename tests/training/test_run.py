"""Where a run starts, and how long it is."""

from pathlib import Path

import pytest

from irpe_ds.config import RunConfig
from irpe_ds.errors import ConfigError
from irpe_ds.training.plan import make_plan
from irpe_ds.training.run import check_folder, find_start


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    values = {"name": "x", "model": {"name": "deit"}, "data": {"train": "a", "val": "b"}}
    train = {"epochs": 10, "global_batch": 64}
    return RunConfig.model_validate(values | {"output": tmp_path, "train": train})


def save(folder: Path, update: int, *, whole: bool = True) -> Path:
    path = folder / f"checkpoints/update-{update:08d}"
    path.mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    if whole:
        (path / "checkpoint.json").write_text("{}")
    return path


class TestStart:
    def test_anew(self, config: RunConfig) -> None:
        assert find_start(config, "never") is None
        assert find_start(config, "auto") is None

    def test_from_the_newest_whole_checkpoint(self, config: RunConfig) -> None:
        save(config.folder, 9)
        newest = save(config.folder, 10)
        save(config.folder, 100, whole=False)
        assert find_start(config, "auto") == newest
        assert find_start(config, str(newest)) == newest

    def test_from_another_run(self, config: RunConfig, tmp_path: Path) -> None:
        other = save(tmp_path / "other", 7)
        assert find_start(config, str(other)) == other

    @pytest.mark.parametrize(("resume", "got"), [("never", "the folder of a run"), ("old", "0009")])
    def test_no_run_is_overwritten(self, resume: str, got: str, config: RunConfig) -> None:
        old = save(config.folder, 9)
        save(config.folder, 10)
        with pytest.raises(ConfigError, match=rf"name=\.\.\. .* got .*{got}"):
            find_start(config, str(old) if resume == "old" else resume)

    def test_from_nothing(self, config: RunConfig) -> None:
        with pytest.raises(ConfigError, match=r"^--resume: expected auto or .*, got nowhere"):
            find_start(config, "nowhere")


def test_a_run_is_whole_batches(config: RunConfig) -> None:
    plan = make_plan(config, num_samples=200)
    assert (plan.updates_per_epoch, plan.last_update) == (3, 30)


def test_data_must_fill_a_batch(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"^train\.global_batch: expected at most 63"):
        make_plan(config, num_samples=63)


def test_a_folder_that_cannot_be(config: RunConfig) -> None:
    config.output.joinpath("x").write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=r"^output: expected a folder that can be written"):
        check_folder(config)
