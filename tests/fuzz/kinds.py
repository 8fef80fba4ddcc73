"""What is damaged, and who reads it."""

import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from irpe_ds import load, runlog
from irpe_ds.benchmark.experiment import load_experiment
from irpe_ds.benchmark.report import to_csv, write_report
from irpe_ds.benchmark.rows import read_results_file
from irpe_ds.checkpoint import manifest as saved_manifest
from irpe_ds.checkpoint import reader
from irpe_ds.checkpoint.reader import CheckpointManifest, SavedWeights
from irpe_ds.cluster.hostfile import read_hostfile
from irpe_ds.config import load_config
from irpe_ds.data.beton import shards
from irpe_ds.data.beton.convert import convert
from irpe_ds.data.beton.manifest import HASHES, MANIFEST, beside
from irpe_ds.data.beton.options import SourceOptions, StorageOptions
from irpe_ds.data.beton.reader import read_beton
from irpe_ds.data.beton.shards import convert_shards
from irpe_ds.data.beton.sources import is_image, open_source
from irpe_ds.data.beton.verify import verify
from irpe_ds.data.pipelines.timm import open_images
from irpe_ds.environment import read_environment
from irpe_ds.errors import UserError
from irpe_ds.models import exported
from irpe_ds.models.build import build_model, load_weights
from irpe_ds.planner.calibrate import read_results
from irpe_ds.planner.zero import read_zero
from irpe_ds.plots.curves import read_runs
from irpe_ds.training.deepspeed_config import read_ds_config
from tests import packing
from tests.benchmark.test_report import results, row
from tests.checkpoint_ranks import SOLO, save
from tests.fuzz import mutations as m
from tests.fuzz.mutations import BLIND, Mutation

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Kind:
    """A kind of file with its reader."""

    make: Callable[[Path], None]
    """Writes an undamaged one, and what it needs beside it, into a folder."""
    victims: tuple[str, ...]
    """Patterns of the names of the files to damage."""
    read: Callable[[Path], str]
    """Reads the folder as the product does; what it read, as one comparable text."""
    mutations: tuple[Mutation, ...] = BLIND
    exact: bool = False
    """Whether damage is to be found: what is read without an error is what was written."""


def images(count: int) -> dict[str, bytes]:
    """Small JPEGs and a PNG, by name."""
    rng = np.random.default_rng(0)
    found = {}
    for number in range(count):
        kind, suffix = ("PNG", "png") if number == 3 else ("JPEG", "jpg")
        made = io.BytesIO()
        pixels = rng.integers(0, 255, (9 + number, 17, 3), np.uint8)
        Image.fromarray(pixels).save(made, kind)
        found[f"{number:02d}.{suffix}"] = made.getvalue()
    return found


def image_folder(folder: Path) -> None:
    for number, (name, data) in enumerate(images(6).items()):
        path = folder / "source" / ("cat", "dog", "bird")[number % 3] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def beton(folder: Path) -> None:
    image_folder(folder)
    convert(open_source([folder / "source"]), folder / "a.beton", StorageOptions(), workers=1)


def bare_beton(folder: Path) -> None:
    beton(folder)
    for suffix in (MANIFEST, HASHES):
        beside(folder / "a.beton", suffix).unlink()


def sharded(folder: Path) -> None:
    image_folder(folder)
    source = open_source([folder / "source"])
    convert_shards(source, folder / "a.beton", StorageOptions(), 2, workers=1)


def read_samples(path: Path) -> str:
    """As the loaders: tables at start, payloads when they are needed."""
    found = read_beton(path, "data.train")
    digest = hashlib.sha256(found.entries.tobytes())
    for sample in range(len(found.entries)):
        payload = found.payload(sample)
        if not found.is_intact(sample, payload):
            return "damage found"
        digest.update(payload.tobytes())
    opened = open_images(path, "data.train")
    for sample in range(opened.info.num_samples):
        with suppress(OSError, ValueError, SyntaxError, UserError, Image.DecompressionBombError):
            opened.open(sample).convert("RGB")
    return f"{found.info.classes} {digest.hexdigest()}"


def read_verified(folder: Path) -> str:
    info = verify(folder / "a.beton", workers=1, needs_manifest=False)
    return f"{info.num_samples} {info.classes}"


def read_converted(folder: Path, source: str = "source.tar", **arguments: Any) -> str:
    """A conversion, with nothing lost between the source and the file."""
    out = folder / "out.beton"
    opened = open_source([folder / source], SourceOptions(**arguments))
    made = convert(opened, out, StorageOptions(), workers=1, on_bad="skip")
    assert made.num_samples == sum(made.class_counts)
    listed = sum(is_image(file.path) for file in opened.files())
    assert made.num_samples + made.skipped == listed, (made.num_samples, made.skipped, listed)
    return f"{made.classes} {made.num_samples}"


def tar_of_folders(folder: Path) -> None:
    found = {f"{n % 3}/{name}": data for n, (name, data) in enumerate(images(6).items())}
    (folder / "source.tar").write_bytes(m.packed(found, random.Random(0)))


def webdataset(folder: Path) -> None:
    found = {}
    for number, (name, data) in enumerate(images(6).items()):
        found |= {name: data, f"{Path(name).stem}.cls": str(number % 3).encode()}
    (folder / "source.tar").write_bytes(m.packed(found, random.Random(1)))


def with_classes(folder: Path) -> None:
    webdataset(folder)
    (folder / "classes.txt").write_text("cat\ndog\nbird\n")


def class_tars(folder: Path) -> None:
    parts = list(images(6).items())
    inner = {
        f"n{k}.tar": m.packed(dict(parts[2 * k : 2 * k + 2]), random.Random(k)) for k in (0, 1)
    }
    (folder / "source.tar").write_bytes(m.packed(inner, random.Random(2)))


def flat_tar(folder: Path) -> None:
    (folder / "source.tar").write_bytes(m.packed(images(6), random.Random(3)))
    (folder / "labels.txt").write_text("cat\ndog\nbird\ncat\ndog\nbird\n")


def zip_of_folders(folder: Path) -> None:
    image_folder(folder)
    shutil.make_archive(str(folder / "source"), "zip", folder / "source")
    shutil.rmtree(folder / "source")


def parquet(folder: Path) -> None:
    tree = {f"{('cat', 'dog')[n % 2]}/{name}": d for n, (name, d) in enumerate(images(6).items())}
    packing.parquet(folder / "source.parquet", tree)


def interrupted(folder: Path) -> None:
    """A conversion that a bad image stopped, and which can go on."""
    image_folder(folder)
    victim = sorted((folder / "source").rglob("*.jpg"))[-1]
    good = victim.read_bytes()
    victim.write_bytes(b"no image")
    with suppress(UserError):
        convert(open_source([folder / "source"]), folder / "out.beton", StorageOptions(), workers=1)
    assert (folder / "out.beton.partial.db").exists()
    victim.write_bytes(good)


def read_resumed(folder: Path) -> str:
    """A conversion that goes on; padding between its images may differ."""
    source, out = open_source([folder / "source"]), folder / "out.beton"
    made = convert(source, out, StorageOptions(), workers=1)
    return f"{made.tables_sha256} {made.hashes_sha256} {read_samples(out)}"


def interrupted_shards(folder: Path) -> None:
    """A sharded conversion that ended between the shards and the index, and can go on."""
    sharded(folder)
    for path in (*folder.glob("a-*"), folder / "a.beton.json"):
        path.unlink()
    stopped = mock.patch.object(shards._Conversion, "_write_index", side_effect=UserError("stop"))
    with stopped, suppress(UserError):
        sharded(folder)


def read_resumed_shards(folder: Path) -> str:
    sharded(folder)
    return read_samples(folder / "a.beton")


SHAPES = {"weight": (3, 2), "bias": (3,)}


def checkpoint(folder: Path) -> None:
    torch.manual_seed(0)
    manifest = CheckpointManifest(
        **{"updates_per_epoch": 10, "global_batch": 8, "num_samples": 85, "seed": 0},
        shapes={name: list(shape) for name, shape in SHAPES.items()},
        **{"world_size": 2, "zero_stage": 1, "op": {"name": "cpu", "why": "x"}},
        config={"train": {"epochs": 3}},
    )
    kinds = ("weights", "exp_avg", "exp_avg_sq", "ema")
    state = {kind: {n: torch.randn(s) for n, s in SHAPES.items()} for kind in kinds}
    save(folder / "checkpoints", manifest.at(5, scores={"top1": 50.0}), state, world_size=2)


def old_checkpoint(folder: Path) -> None:
    path = ROOT / "tests/checkpoint/format2/update-00000005"
    shutil.copytree(path, folder / "checkpoints" / path.name)


def read_checkpoint(folder: Path) -> str:
    """As --resume auto."""
    path, _ = reader.newest_undamaged(folder / "checkpoints", SOLO)
    assert path is not None
    saved = reader.read_manifest(path)
    present = reader.CheckpointManifest(
        **{
            key: getattr(saved, key) for key in ("updates_per_epoch", "global_batch", "num_samples")
        },
        **{"seed": saved.seed, "shapes": saved.shapes, "world_size": 1, "zero_stage": 0},
        **{"op": saved.op, "config": {"train": {"epochs": 3}}},
    )
    reader.changes(reader.check_compatible(path, present), present)
    files = reader.open_files(path)
    found = {key: files.whole(key).tolist() for key in files.shapes}
    dict(SavedWeights(path))
    return f"{saved.update} {saved.score} {found}"


def resealed(data: bytes, rng: random.Random) -> bytes:
    """A manifest with another value in it, and its hash right again."""
    new = m.json_node(data, rng)
    try:
        values = json.loads(new)
    except (ValueError, RecursionError):
        return new
    values.pop("sha256", None)
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
    body = "{\n" + ",\n".join(lines)
    return (body + saved_manifest._last_line(body)).encode()


def vit() -> Any:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12, num_heads=3
    )


def safetensors(folder: Path) -> None:
    torch.manual_seed(0)
    save_file(vit().state_dict(), folder / "w.safetensors", metadata={"format": "pt"})


def pth(folder: Path) -> None:
    torch.manual_seed(0)
    torch.save({"model": vit().state_dict(), "epoch": 3}, folder / "w.pth")


def read_weights(path: Path) -> str:
    model = vit()
    load_weights(model, path, "model.weights")
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    return "loaded"


def export(folder: Path) -> None:
    config = load_config(ROOT / "launch/configs/quickstart.yaml", ["model.num_classes=2"])
    model = build_model(config.model)
    (folder / "config.json").write_text(exported.describe(config, model, ("cat", "dog"), {}))
    save_file(model.state_dict(), folder / "model.safetensors")


def read_export(folder: Path) -> str:
    model, transform, classes = load(folder)
    return f"{model(transform(Image.new('L', (30, 20)))[None]).shape} {classes}"


def run_folder(folder: Path) -> None:
    with runlog.RunLog(folder / "run", name="x", config={}, wandb={"mode": "disabled"}) as log:
        for update in range(1, 9):
            log.log("train", update, {"loss": 1 / update, "lr": 1e-3, "epoch": update / 4})
        log.log("eval", 8, {"top1": 50.0, "loss": 0.5, "epoch": 2.0})
    (folder / "mine.csv").write_text("mine")


def read_run(folder: Path) -> str:
    """Curves, then the log of a resumed run; a file beside the run folder is left alone."""
    try:
        read_runs([folder / "run"], "epoch")
        with runlog.RunLog(
            folder / "run", name="x", config={}, wandb={"mode": "disabled"}, resume_update=6
        ) as log:
            log.log("train", 7, {"loss": 0.1, "lr": 1e-3, "epoch": 1.75})
    finally:
        assert (folder / "mine.csv").read_text() == "mine"
        assert {path.name for path in folder.iterdir()} == {"run", "mine.csv"}
    return "resumed"


def text_file(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


YAML = (ROOT / "launch/configs/quickstart.yaml").read_text()


def experiment_text() -> str:
    scaling = {"matrix": [{"ranks_per_node": [1, 2], "micro_batch": 4}], "updates": 4, "repeats": 3}
    base = str(ROOT / "launch/configs/quickstart.yaml")
    return yaml.safe_dump({"base": base, "name": "t", "scaling": scaling})


def read_report(folder: Path) -> str:
    write_report(read_results_file(folder / "results.json"), folder)
    with suppress(UserError):
        read_results(folder / "results.json", "vit", "bf16", "k")
    return "read"


def read_deepspeed(folder: Path) -> str:
    read_ds_config(folder / "z.json")
    return str(read_zero(folder / "z.json"))


TAR = (m.tar_header, *BLIND)
TEXT = (m.words, *BLIND)
JSON = (m.json_node, m.json_node, *BLIND)

KINDS: Mapping[str, Kind] = {
    "beton": Kind(beton, ("a.beton",), lambda f: read_samples(f / "a.beton"), exact=True),
    "beton verified": Kind(beton, ("a.beton*",), read_verified, exact=True),
    "hashes": Kind(
        beton, ("a.beton.sha256",), lambda f: read_samples(f / "a.beton"), TEXT, exact=True
    ),
    "manifest": Kind(beton, ("a.beton.json",), read_verified, JSON),
    "shards": Kind(sharded, ("a-*.beton*",), lambda f: read_samples(f / "a.beton"), exact=True),
    "index": Kind(sharded, ("a.beton.json",), read_verified, JSON),
    "sharded conversion": Kind(
        interrupted_shards, ("a.beton.sharding/*.done/*", "a-*"), read_resumed_shards, exact=True
    ),
    "beton without manifest": Kind(bare_beton, ("a.beton",), lambda f: read_samples(f / "a.beton")),
    "beton without manifest verified": Kind(bare_beton, ("a.beton",), read_verified),
    "image": Kind(image_folder, ("source/*/*",), lambda f: read_converted(f, "source")),
    "tar": Kind(tar_of_folders, ("source.tar",), read_converted, TAR),
    "webdataset": Kind(webdataset, ("source.tar",), read_converted, TAR),
    "class tars": Kind(class_tars, ("source.tar",), read_converted, TAR),
    "zip": Kind(zip_of_folders, ("source.zip",), lambda f: read_converted(f, "source.zip")),
    "parquet": Kind(parquet, ("source.parquet",), lambda f: read_converted(f, "source.parquet")),
    "labels": Kind(
        flat_tar,
        ("labels.txt",),
        lambda folder: read_converted(folder, labels=folder / "labels.txt"),
        TEXT,
    ),
    "classes": Kind(
        with_classes,
        ("classes.txt",),
        lambda folder: read_converted(folder, classes=folder / "classes.txt"),
        TEXT,
    ),
    "conversion": Kind(interrupted, ("out.beton.partial*",), read_resumed, exact=True),
    "checkpoint": Kind(checkpoint, ("checkpoints/*/*",), read_checkpoint, exact=True),
    "checkpoint's record": Kind(
        checkpoint, ("checkpoints/*/checkpoint.json",), read_checkpoint, (resealed,)
    ),
    "old checkpoint": Kind(old_checkpoint, ("checkpoints/*/*",), read_checkpoint, exact=True),
    "safetensors": Kind(
        safetensors,
        ("w.safetensors",),
        lambda f: read_weights(f / "w.safetensors"),
        (m.safetensors_header, *BLIND),
    ),
    "pth": Kind(pth, ("w.pth",), lambda f: read_weights(f / "w.pth")),
    "export": Kind(export, ("config.json",), read_export, JSON),
    "metrics": Kind(run_folder, ("run/*",), read_run, (m.json_lines, m.words, *BLIND)),
    "run's YAML": Kind(
        text_file("c.yaml", YAML),
        ("c.yaml",),
        lambda f: repr(load_config(f / "c.yaml")),
        TEXT,
    ),
    "experiment's YAML": Kind(
        text_file("e.yaml", experiment_text()),
        ("e.yaml",),
        lambda f: str(load_experiment(f / "e.yaml").cells),
        TEXT,
    ),
    "results": Kind(
        text_file("results.json", json.dumps(results(row(1, 100), row(2, 150)))),
        ("results.json",),
        read_report,
        JSON,
    ),
    "results for calibration": Kind(
        text_file("rows.csv", to_csv([row(1, 100, stage=1), row(2, 150, stage=1)])),
        ("rows.csv",),
        lambda f: str(read_results(f / "rows.csv", "vit", "bf16", "k")),
        TEXT,
    ),
    "environment": Kind(
        text_file("environment.json", json.dumps({"ranks": 2, "device": "CPU", "commit": None})),
        ("environment.json",),
        lambda f: str(read_environment(f)),
        JSON,
    ),
    "DeepSpeed's JSON": Kind(
        text_file("z.json", (ROOT / "ds_configs/zero3.json").read_text()),
        ("z.json",),
        read_deepspeed,
        JSON,
    ),
    "hostfile": Kind(
        text_file("hosts", "a.example slots=8\nb-1 slots=8\n"),
        ("hosts",),
        lambda f: str(read_hostfile(f / "hosts")),
        TEXT,
    ),
}
