"""Where a run starts, and how long it is."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from irpe_ds.checkpoint import manifest, reader, shards, writer
from irpe_ds.checkpoint.reader import CheckpointManifest
from irpe_ds.config import ModelConfig, RunConfig
from irpe_ds.errors import CheckpointError, ConfigError
from irpe_ds.models.build import check_positions
from irpe_ds.training import start
from irpe_ds.training.start import (
    check_folder,
    initial_manifest,
    run_length,
)
from tests import checkpoint_ranks
from tests.checkpoint_ranks import SOLO

NARROW = {"depth": 1, "embed_dim": 8, "num_heads": 2}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    values = {"name": "x", "model": {"name": "deit"}, "data": {"train": "a", "val": "b"}}
    train = {"epochs": 10, "global_batch": 64}
    return RunConfig.model_validate(values | {"output": tmp_path, "train": train})


@pytest.fixture
def present(config: RunConfig) -> CheckpointManifest:
    """A run before its first update."""
    ds_config = {"zero_optimization": {"stage": 1}}
    op = {"name": "cpu", "why": "asked for"}
    length = run_length(config, 640)
    return initial_manifest(config, ds_config, length, nn.Linear(2, 3), world_size=2, op=op)


SHAPES = {"weight": (3, 2), "bias": (3,)}
KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")


def save(
    folder: Path, manifest: CheckpointManifest, update: int, keep: int = 2, **scores: float
) -> Path:
    """A checkpoint of nn.Linear(2, 3) in a run folder."""
    state = {
        kind: {name: torch.full(shape, float(update)) for name, shape in SHAPES.items()}
        for kind in KINDS
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").touch()
    path = folder / reader.FOLDER
    scored = manifest.at(update, scores=scores)
    checkpoint_ranks.save(path, scored, state, keep=keep, world_size=2)
    return reader.path_of(path, update)


find_start = partial(start.find_start, ranks=SOLO)


class TestStart:
    def test_from_scratch(self, config: RunConfig, present: CheckpointManifest) -> None:
        for resume in ("never", "auto"):
            assert find_start(config, resume, present) == (None, present, [])

    def test_from_the_newest(self, config: RunConfig, present: CheckpointManifest) -> None:
        save(config.folder, present, 9)
        newest = save(config.folder, present, 10)
        for resume in ("auto", str(newest)):
            begin = find_start(config, resume, present)
            assert begin.path == newest
            assert (begin.saved.update, begin.saved.epoch, begin.saved.images) == (10, 1, 0)
            assert begin.notes == [f"resuming from {newest}"]

    def test_what_changed_is_said(self, config: RunConfig, present: CheckpointManifest) -> None:
        save(config.folder, present, 9)
        other = reader.replace(present, world_size=4, zero_stage=3)
        (note,) = find_start(config, "auto", other).notes
        assert note.endswith(" with ranks: 2 -> 4; ZeRO stage: 1 -> 3")

    def test_from_another_run(
        self, config: RunConfig, present: CheckpointManifest, tmp_path: Path
    ) -> None:
        other = save(tmp_path / "other", present, 7)
        assert find_start(config, str(other), present).path == other

    @pytest.mark.parametrize(
        ("resume", "message"),
        [
            ("never", r"x holds a run already: .*--resume auto, .*name=\.\.\.$"),
            ("old", r"name=\.\.\. .*, got .*0009$"),
        ],
    )
    def test_no_run_is_overwritten(
        self, resume: str, message: str, config: RunConfig, present: CheckpointManifest
    ) -> None:
        old = save(config.folder, present, 9)
        save(config.folder, present, 10)
        with pytest.raises(CheckpointError, match=message):
            find_start(config, str(old) if resume == "old" else resume, present)

    def test_a_checkpoint_of_another_run_until_there_is_an_own(
        self, config: RunConfig, present: CheckpointManifest, tmp_path: Path
    ) -> None:
        other = save(tmp_path / "other", present, 7)
        config.folder.mkdir(parents=True)
        (config.folder / "metrics.jsonl").touch()  # it was killed before it saved
        assert find_start(config, str(other), present).path == other
        assert find_start(config, "auto", present).notes == [
            "no checkpoint yet: starting from scratch"
        ]
        save(config.folder, present, 8)
        with pytest.raises(CheckpointError, match="expected --resume auto"):
            find_start(config, str(other), present)

    def test_from_nothing(self, config: RunConfig, present: CheckpointManifest) -> None:
        with pytest.raises(CheckpointError, match=r"^--resume: expected auto or .*, got nowhere"):
            find_start(config, "nowhere", present)

    @pytest.mark.parametrize(
        ("field", "message"),
        [
            ("global_batch", r"^train\.global_batch: expected 64, as in .*00009, got 5$"),
            ("seed", r"^seed: expected 0, as in .*00009, got 5$"),
            ("num_samples", r"^data\.train: expected 640 images, as in .*00009, got 5$"),
        ],
    )
    def test_data_in_another_order(
        self, field: str, message: str, config: RunConfig, present: CheckpointManifest
    ) -> None:
        save(config.folder, present, 9)
        other = reader.replace(present, **{field: 5}, updates_per_epoch=1)
        with pytest.raises(CheckpointError, match=message):
            find_start(config, "auto", other)

    def test_with_another_optimizer(self, config: RunConfig, present: CheckpointManifest) -> None:
        save(config.folder, present, 9)
        other = reader.replace(present, optimizer="lion")
        with pytest.raises(
            CheckpointError, match=r"^optim\.name: expected adamw, as in .*, got lion"
        ):
            find_start(config, "auto", other)

    def test_manifests_that_name_no_optimizer_are_of_adamw(
        self, config: RunConfig, present: CheckpointManifest
    ) -> None:
        path = save(config.folder, present, 9)
        file = path / "checkpoint.json"
        body, _, _ = file.read_text().rpartition(',\n "sha256"')
        body = body.replace(' "optimizer": "adamw",\n', "")
        file.write_text(body + manifest._last_line(body))
        assert "optimizer" not in file.read_text()
        assert find_start(config, "auto", present).path == path


FILES = ("checkpoint.json", "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_skipped(
    name: str, damage: Any, config: RunConfig, present: CheckpointManifest
) -> None:
    whole, newest = (save(config.folder, present, update) for update in (9, 10))
    damage(newest / name)
    found = find_start(config, "auto", present)
    assert found.path == whole
    assert str(newest) in found.notes[0]
    assert name in found.notes[0]
    with pytest.raises(CheckpointError, match=r"expected its newest undamaged checkpoint"):
        find_start(config, str(newest), present)
    damage(whole / name)
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged: .*00010: .*0009"):
        find_start(config, "auto", present)


class TestCheckpoint:
    def test_the_newest_and_the_best_are_kept(
        self, config: RunConfig, present: CheckpointManifest
    ) -> None:
        scores = {1: 30.0, 2: 80.0, 3: 40.0, 4: 50.0, 5: 60.0}
        for update, top1 in scores.items():
            save(config.folder, present, update, top1=99.0, ema_top1=top1)
        folder = config.folder / reader.FOLDER
        kept = [int(path.name[-2:]) for path in reader.complete(folder)]
        assert kept == [2, 4, 5]
        best = reader.weights_of(config.folder, best=True, ema=True)
        assert best.path == reader.path_of(folder, 2)
        assert best["bias"].tolist() == [2.0] * 3
        newest = reader.weights_of(config.folder)
        assert newest.path == reader.path_of(folder, 5)
        assert {name: tensor.shape for name, tensor in newest.items()} == SHAPES

    @pytest.mark.parametrize("keep", [1, 2])
    def test_damaged_ones_that_are_newer_take_no_place(
        self, keep: int, config: RunConfig, present: CheckpointManifest
    ) -> None:
        whole, *newer = (save(config.folder, present, u, keep=3) for u in (1, 5, 6))
        for path in newer:
            flip(path / FILES[1])
        assert find_start(config, "auto", present).path == whole
        new = save(config.folder, present, 2, keep=keep)
        assert find_start(config, "auto", present).path == new
        assert whole.exists() == (keep == 2)
        again = save(config.folder, present, 5, keep=keep)  # in the place of a damaged one
        assert find_start(config, "auto", present).path == again

    def test_what_cannot_be_removed_is_in_nobodys_way(
        self, config: RunConfig, present: CheckpointManifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on NFS, while another process reads it."""
        remove = writer.shutil.rmtree

        def busy(path: Path, ignore_errors: bool = False) -> None:
            if not ignore_errors:
                raise OSError(39, "Directory not empty")

        monkeypatch.setattr(writer.shutil, "rmtree", busy)
        for update in range(1, 6):
            newest = save(config.folder, present, update)
        monkeypatch.setattr(writer.shutil, "rmtree", remove)
        kept = reader.complete(config.folder / reader.FOLDER)
        assert kept == [newest.with_name(f"update-{n:08d}") for n in (4, 5)]
        assert find_start(config, "auto", present).path == newest

    def test_it_comes_back(self, config: RunConfig, present: CheckpointManifest) -> None:
        path = save(config.folder, present, 9)
        files = reader.open_files(path)
        kinds = ("weights", "exp_avg", "exp_avg_sq", "ema")
        assert files.shapes.keys() == {f"{kind}.{name}" for kind in kinds for name in SHAPES}
        for key in files.shapes:
            assert files.whole(key).unique().tolist() == [9.0]
        manifest = reader.read_manifest(path)
        assert manifest.config == config.model_dump(mode="json")
        assert manifest.files.keys() == {*FILES[1:]}

    def test_scores_come_later(self, config: RunConfig, present: CheckpointManifest) -> None:
        path = save(config.folder, present, 9)
        saved = reader.read_manifest(path)
        scored = reader.replace(saved, scores={"top1": 5.0})
        reader.add_scores(path.parent, scored)
        assert reader.read_manifest(path) == scored
        assert reader.find_damage(path) is None

    def test_what_a_kill_left_is_swept(
        self, config: RunConfig, present: CheckpointManifest
    ) -> None:
        path = save(config.folder, present, 9)
        leftover = path.parent / ".update-00000010.partial"
        leftover.mkdir()
        (leftover / FILES[1]).write_bytes(b"half")
        assert find_start(config, "auto", present).path == path
        save(config.folder, present, 11)
        assert not leftover.exists()

    def test_a_full_disk_leaves_the_last_one(
        self, config: RunConfig, present: CheckpointManifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = save(config.folder, present, 9)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        def full_for_one(path: Path, *arguments: Any) -> Any:
            return full() if "rank-00001" in path.name else write_shards(path, *arguments)

        write_shards = writer.write_shards
        for module, name, fails in (
            (writer, "write_shards", full_for_one),
            (shards.os, "fsync", full),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, fails)
                with pytest.raises(CheckpointError, match=r"cannot write checkpoint: .*No space"):
                    save(config.folder, present, 10)
            assert find_start(config, "auto", present).path == path
        newest = save(config.folder, present, 10)
        assert find_start(config, "auto", present).path == newest

    def test_an_older_format_is_refused(
        self, config: RunConfig, present: CheckpointManifest
    ) -> None:
        path = save(config.folder, present, 9)
        (path / "checkpoint.json").write_text(json.dumps({"update": 9, "world_size": 2}))
        with pytest.raises(CheckpointError, match="a manifest of format 2 to 3, got None"):
            find_start(config, "auto", present)


def test_a_run_is_whole_batches(config: RunConfig) -> None:
    length = run_length(config, num_samples=200)
    assert (length.updates_per_epoch, length.last_update) == (3, 30)


def test_data_must_fill_a_batch(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"^train\.global_batch: expected at most 63"):
        run_length(config, num_samples=63)


def test_a_folder_that_cannot_be_written(config: RunConfig) -> None:
    config.output.joinpath("x").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"^output: cannot write to "):
        check_folder(config)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(CheckpointError, match=r"cannot lock .* a symbolic link in place of a file"):
        start.lock(tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"


def test_weights_that_are_not_finite_are_not_resumed_from(
    config: RunConfig, present: CheckpointManifest
) -> None:
    whole = save(config.folder, present, 9)
    state = {kind: {name: torch.ones(s) for name, s in SHAPES.items()} for kind in KINDS}
    state["exp_avg_sq"]["weight"][2, 1] = float("inf")
    folder = config.folder / reader.FOLDER
    checkpoint_ranks.save(folder, present.at(10), state, keep=2, world_size=2)
    found = find_start(config, "auto", present)
    assert found.path == whole
    name = r"00010/rank-00001-of-00002\.safetensors: exp_avg_sq\.weight"
    assert re.search(f"{name}: expected finite values, got inf", found.notes[0])


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ({"rpe": {"ratio": 1.9}}, {"rpe": {"ratio": 1.6}}, "ratio 1.6, got ratio 1.9"),
        (
            {"options": NARROW | {"depth": 2}},
            {"options": NARROW | {"depth": 2}, "rpe": {"last_block": False}},
            "last_block False, got last_block True",
        ),
        ({"img_size": [64, 144]}, {"img_size": 96}, "a grid of 6x6 patches, got 4x9"),
        ({"img_size": [96, 192]}, {"img_size": [192, 96]}, "a grid of 12x6 patches, got 6x12"),
        ({}, {"drop_path": 0.1, "impl": "reference", "rpe": {"ratio": 1.9}}, None),
    ],
)
def test_other_positions_of_the_same_shapes_are_another_model(
    there: dict[str, Any], here: dict[str, Any], message: str | None, present: CheckpointManifest
) -> None:
    common = {"name": "deit_tiny_patch16_224", "rpe": {}, "options": NARROW}
    models = [ModelConfig.model_validate(common | values) for values in (there, here)]
    saved = replace(present, config={"model": models[0].model_dump(mode="json")})
    if message is None:
        check_positions(Path("x"), saved, models[1])
        return
    with pytest.raises(CheckpointError, match=f"^x: expected .*{message}$"):
        check_positions(Path("x"), saved, models[1])
