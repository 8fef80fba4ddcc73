"""The cells of an experiment, and what of its file is refused."""

from pathlib import Path

import pytest
import yaml

from irpe_ds.benchmark.experiment import Experiment, load_experiment
from irpe_ds.errors import ClusterError, ConfigError

QUICKSTART = Path("launch/configs/quickstart.yaml").resolve()


def write(folder: Path, *matrix: object, **scaling: object) -> Path:
    path = folder / "experiment.yaml"
    section = {"matrix": list(matrix), **scaling}
    path.write_text(yaml.safe_dump({"base": str(QUICKSTART), "name": "test", "scaling": section}))
    return path


def load(folder: Path, *matrix: object, **scaling: object) -> Experiment:
    return load_experiment(write(folder, *matrix, **scaling))


class TestCells:
    def test_are_all_combinations(self, tmp_path: Path) -> None:
        axes = {"nodes": [1, 2], "ranks_per_node": 4, "train.precision": ["fp32", "bf16"]}
        (tmp_path / "hosts").write_text("a slots=4\nb slots=4\n")
        cells = load(tmp_path, axes, hostfile=str(tmp_path / "hosts")).cells
        found = [(cell.nodes, cell.ranks, cell.config.train.precision) for cell in cells]
        assert found == [(1, 4, "fp32"), (1, 4, "bf16"), (2, 8, "fp32"), (2, 8, "bf16")]

    def test_weak_scaling_gives_every_rank_the_same_images(self, tmp_path: Path) -> None:
        axes = {"ranks_per_node": [1, 2], "micro_batch": 8, "train.accumulation": 3}
        assert [c.config.train.global_batch for c in load(tmp_path, axes).cells] == [24, 48]

    def test_strong_scaling_shares_the_global_batch(self, tmp_path: Path) -> None:
        cells = load(tmp_path, {"ranks_per_node": [1, 2, 4]}).cells
        assert [cell.config.train.global_batch for cell in cells] == [64, 64, 64]

    def test_any_key_is_an_axis(self, tmp_path: Path) -> None:
        rpe = [None, {"method": "euclidean", "on": "qk"}]
        plain, equipped = load(tmp_path, {"model.rpe": rpe}).cells
        assert plain.config.model.rpe is None
        assert equipped.config.model.rpe is not None
        assert equipped.config.model.rpe.on == "qk"

    def test_have_folders_of_their_own_in_the_experiment_s(self, tmp_path: Path) -> None:
        cells = load(tmp_path, {"ranks_per_node": [1, 2]}).cells
        folders = {cell.config.folder for cell in cells}
        assert len(folders) == 2
        assert {folder.parent for folder in folders} == {Path("runs/test/cells")}
        assert {cell.config.log.wandb.group for cell in cells} == {"test"}

    def test_of_two_matrices_are_run_once(self, tmp_path: Path) -> None:
        assert len(load(tmp_path, {"ranks_per_node": [1, 2]}, {"ranks_per_node": 2}).cells) == 2

    def test_keep_their_key_when_the_matrix_grows(self, tmp_path: Path) -> None:
        (before,) = load(tmp_path, {"ranks_per_node": 2, "micro_batch": 8}).cells
        grown = load(tmp_path, {"micro_batch": [4, 8], "ranks_per_node": [1, 2]}).cells
        assert before.key in {cell.key for cell in grown}


@pytest.mark.parametrize(
    ("axes", "scaling", "where"),
    [
        ({"nodes": 0}, {}, "scaling.matrix, 1: nodes"),
        ({"ranks_per_node": "two"}, {}, "scaling.matrix, 1: ranks_per_node"),
        ({"micro_batch": 1.5}, {}, "scaling.matrix, 1: micro_batch"),
        ({"micro_batch": 8, "train.global_batch": 64}, {}, "scaling.matrix, 1"),
        ({"train.precison": "bf16"}, {}, "train.precison"),
        ({"stage": 2}, {}, "stage"),
        ({"train.precision": "int8"}, {}, "train.precision"),
        ({"ranks_per_node": []}, {}, "scaling.matrix, 1: ranks_per_node"),
        ({"nodes": 2}, {}, "scaling.hostfile"),
        ({}, {"repeat": 3}, "scaling.repeat"),
        ({}, {"updates": 0}, "scaling.updates"),
        ({}, {"network": "fast"}, "scaling.network"),
    ],
)
def test_mistakes_are_named(
    axes: dict[str, object], scaling: dict[str, object], where: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, axes, **scaling)
    assert str(caught.value.where) == where


@pytest.mark.parametrize(
    ("hosts", "got"),
    [
        ("a slots=2\n", "got 1 hosts"),
        ("a slots=2\nb slots=1\n", "got b with 1"),
        ("a slots=2\nb slots=0\n", "line 2: expected at least one slot"),
        (None, "expected a hostfile"),
    ],
)
def test_missing_hosts(hosts: str | None, got: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    if hosts is not None:
        path.write_text(hosts)
    with pytest.raises(ClusterError, match=got):
        load(tmp_path, {"nodes": [1, 2], "ranks_per_node": 2}, hostfile=str(path))


def test_a_run_s_file_is_no_experiment() -> None:
    with pytest.raises(ConfigError, match="section scaling"):
        load_experiment(QUICKSTART)
