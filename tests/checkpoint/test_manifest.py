"""checkpoint.json: what cannot be true is refused, also if its own hash is right."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from irpe_ds.checkpoint import reader, writer
from irpe_ds.checkpoint.manifest import (
    CheckpointManifest,
    LossScaler,
    read_manifest,
    write_manifest,
)
from irpe_ds.errors import CheckpointError
from tests import checkpoint_ranks
from tests.checkpoint_ranks import SOLO

FIRST, SECOND = (f"rank-0000{n}-of-00002.safetensors" for n in range(2))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of update 5 by two ranks."""
    manifest = CheckpointManifest(
        updates_per_epoch=10,
        global_batch=64,
        num_samples=640,
        seed=0,
        shapes={"weight": [3, 2]},
        world_size=2,
        zero_stage=1,
        op={"name": "cpu", "why": "auto"},
        config={"name": "x", "model": {"options": {"depth": [1, 2]}}},
    )
    state = {kind: {"weight": torch.ones(3, 2)} for kind in ("weights", "exp_avg", "exp_avg_sq")}
    scaler = LossScaler(cur_scale=65536.0, cur_iter=3, last_overflow_iter=-1, cur_hysteresis=2)
    meter = {"loss": 4.5, "passes": 3.0}
    manifest = manifest.at(5, steps=4, loss_scaler=scaler, meter=meter, scores={"top1": 50.0})
    folder = tmp_path / reader.FOLDER
    checkpoint_ranks.save(folder, manifest, state, world_size=2)
    return reader.path_of(folder, 5)


def seal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest, and give it the right hash."""
    values = json.loads((path / "checkpoint.json").read_text())
    del values["sha256"]
    change(values)
    body = "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in values.items())
    digest = hashlib.sha256(body.encode()).hexdigest()
    (path / "checkpoint.json").write_text(body + f',\n "sha256": "{digest}"\n}}\n')


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": [value]}
    return value


WRONG = [
    ("files", []),
    ("files", {}),
    ("files", None),
    ("files", {FIRST: {"bytes": 1, "sha256": "0" * 64}}),
    ("files", {FIRST: [], SECOND: []}),
    ("files.../../mine", {"bytes": 1, "sha256": "0" * 64}),
    ("files." + FIRST, {"bytes": -1, "sha256": "0" * 64}),
    ("files." + FIRST, {"bytes": 1, "sha256": "0"}),
    ("files." + FIRST, {"bytes": 1}),
    ("config", None),
    ("config", deep(450)),
    ("config", deep(9)),
    ("meter", "x"),
    ("meter", {"loss": 1.0}),
    ("meter", {"loss": 1.0, "passes": "1"}),
    ("update", -5),
    ("update", 6),
    ("update", "5"),
    ("update", 5.0),
    ("epoch", 1),
    ("images", 321),
    ("steps", 6),
    ("updates_per_epoch", 0),
    ("updates_per_epoch", 11),
    ("global_batch", True),
    ("num_samples", 0),
    ("seed", None),
    ("world_size", 3),
    ("world_size", 10**12),
    ("zero_stage", 4),
    ("zero_stage", True),
    ("shapes", {"weight": [3, -2]}),
    ("shapes", {"weight": 6}),
    ("constants", {"weight": [4]}),
    ("ema", 1),
    ("op", {"name": 1}),
    ("loss_scaler", {}),
    ("loss_scaler", {"cur_scale": 0, "cur_iter": 1, "last_overflow_iter": 1, "cur_hysteresis": 1}),
    ("scores", {"top1": "high"}),
    ("meter", {"loss": math.inf, "passes": 1.0}),
    ("format", "3"),
    ("format", 4),
    ("more", 1),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda x: str(x)[:40])
def test_what_cannot_be_true(key: str, value: Any, saved: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        first, _, second = key.partition(".")
        if second:
            values = values[first]
        values[second or first] = value

    seal(saved, change)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: ") as error:
        read_manifest(saved)
    assert len(str(error.value)) < 500
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        reader.newest_undamaged(saved.parent, SOLO)
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        reader.weights_of(saved.parents[1])


@pytest.mark.parametrize("key", ["files", "config", "shapes", "world_size", "seed", "op"])
def test_what_is_absent(key: str, saved: Path) -> None:
    seal(saved, lambda values: values.pop(key))
    with pytest.raises(CheckpointError, match=rf"checkpoint\.json: {key}"):
        read_manifest(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 10_000, "\0" * 100, '{"format": 3}'])
def test_what_is_no_manifest(text: str, saved: Path) -> None:
    (saved / "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: "):
        read_manifest(saved)


def test_a_pipe_in_its_place_is_not_waited_for(saved: Path) -> None:
    (saved / "checkpoint.json").unlink()
    os.mkfifo(saved / "checkpoint.json")
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: not a regular file"):
        read_manifest(saved)


def test_a_folder_of_another_name_may_hold_it(saved: Path) -> None:
    moved = saved.rename(saved.with_name("mine"))
    assert read_manifest(moved).update == 5
    assert reader.numbered(saved.parent) == []
    wrong = moved.rename(saved.with_name("update-00000006"))
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: update: expected 6, got 5"):
        read_manifest(wrong)


def test_it_comes_back_with_scores_that_are_not_finite(saved: Path) -> None:
    manifest = read_manifest(saved)
    assert manifest.loss_scaler == LossScaler(
        cur_scale=65536.0, cur_iter=3, last_overflow_iter=-1, cur_hysteresis=2
    )
    assert (manifest.meter, manifest.steps) == ({"loss": 4.5, "passes": 3.0}, 4)
    scores = {"top1": 2.0, "loss": math.inf, "ema_top1": math.nan}
    write_manifest(saved, manifest.at(5, scores=scores))
    assert '"loss": "inf", "ema_top1": "nan"' in (saved / "checkpoint.json").read_text()
    for change in (lambda values: None, lambda values: values.update(scores=scores)):  # once NaN
        seal(saved, change)
        back = read_manifest(saved)
        assert (back.scores["top1"], back.scores["loss"], back.score) == (2.0, math.inf, -1)
        assert math.isnan(back.scores["ema_top1"])


@pytest.mark.parametrize("record", ["[]", "{", '{"bytes": "1", "sha256": ""}', "x" * 5000])
def test_a_rank_that_says_nonsense_of_its_file(record: str, tmp_path: Path) -> None:
    file = tmp_path / FIRST
    file.with_suffix(".json").write_text(record)
    with pytest.raises((CheckpointError, OSError), match=r"rank-00000|bytes"):
        writer.read_record(file.with_suffix(".json"))


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        (None, {"order": "global", "window": 1}, None),
        (None, {"order": "blocks"}, "data.order: expected global, as in .*, got blocks"),
        ({"order": "blocks", "window": 64}, {"order": "blocks", "window": 64}, None),
        (
            {"order": "blocks", "window": 64},
            {"order": "blocks", "window": 32},
            "data.window: expected 64, as in .*, got 32",
        ),
        ({"order": "global", "window": 64}, {"order": "global", "window": 32}, None),
    ],
)
def test_images_stay_in_the_order_that_the_run_began_with(
    saved: Path, before: Any, now: Any, refused: str | None
) -> None:
    if before is not None:
        seal(saved, lambda values: values["config"].update(data=before))
    found = read_manifest(saved)
    present = dataclasses.replace(found, config=found.config | {"data": now})
    if refused is None:
        assert reader.check_compatible(saved, present) == found
    else:
        with pytest.raises(CheckpointError, match=refused):
            reader.check_compatible(saved, present)
