"""The floors of the house: who may import whom, and how little `import irpe_ds` needs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import irpe_ds

ROOT = Path(__file__).parents[1]
FOLDERS = {"irpe_ds": "irpe_ds", "ops": "irpe_ds.ops", "launch": "launch", "data_prep": "data_prep"}
"""Folders of source, and the package that each is imported as."""

FLOORS = {
    "irpe_ds.errors": -1,  # the ground: everything stands on it
    "irpe_ds.files": -1,
    "irpe_ds.__main__": 10,
    "irpe_ds.cli": 0,
    "irpe_ds.environment": 2,
    "irpe_ds.provenance": 0,
    "irpe_ds.schema": 0,
    "irpe_ds.timm_hook": 0,
    "irpe_ds.yaml12": -1,
    "irpe_ds.config_file": 0,
    "irpe_ds.config_types": 0,
    "irpe_ds.config_sections": 1,
    "irpe_ds.rpe": 0,
    "irpe_ds.sinks": 0,
    "irpe_ds.wandb_run": 0,
    "irpe_ds.ops.build": 0,
    "irpe_ds.runlog": 2,
    "irpe_ds.config": 2,
    "irpe_ds.ops": 2,
    "irpe_ds.cluster": 3,
    "irpe_ds.data": 3,
    "irpe_ds.checkpoint": 4,
    "irpe_ds.models": 5,
    "irpe_ds": 6,  # __init__.py alone, which hands on the public names of the floors below
    "irpe_ds.ops.bench": 6,
    "irpe_ds.prediction": 6,
    "irpe_ds.training": 6,
    "irpe_ds.data.bench": 7,
    "irpe_ds.planner": 7,
    "irpe_ds.plots": 8,
    "irpe_ds.benchmark": 9,
    "launch": 10,
    "data_prep": 10,
}

OPTIONAL = ("deepspeed", "ffcv", "wandb", "matplotlib", "pydantic", "yaml", "sklearn", "tqdm")


class Import(NamedTuple):
    """A name that one of our modules takes from another."""

    module: str
    of: str
    name: str
    place: str


def room(module: str) -> str | None:
    """The part of the house that a module lies in, a key of FLOORS; None when it is not ours."""
    return max((r for r in FLOORS if f"{module}.".startswith(f"{r}.")), key=len, default=None)


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of ours and its file."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *parts)).removesuffix(".__init__"), path


def imports(module: str, code: str, file: str = "") -> Iterator[Import]:
    """What a module takes from our other modules, by import or as an attribute of an import."""
    tree = ast.parse(code)
    names: dict[str, str] = {}  # a name in this module -> the dotted thing that it stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: a relative import hides its floor"
            things = {f"{node.module}.{alias.name}": alias.asname for alias in node.names}
        elif isinstance(node, ast.Import):
            things = {alias.name: alias.asname for alias in node.names}
        else:
            continue
        for thing, alias in things.items():
            names[alias or thing.split(".")[-1]] = thing
            if room(thing):
                yield Import(module, thing, thing.split(".")[-1], f"{file}:{node.lineno}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            thing = names.get(node.value.id, "")
            if room(thing):
                yield Import(module, thing, node.attr, f"{file}:{node.lineno}")


def faults(found: Import) -> str | None:
    """What is wrong with an import, if anything."""
    here, there = room(found.module), room(found.of)
    assert here is not None
    assert there is not None
    if found.name.startswith("_") and not found.name.endswith("__"):
        return f"{found.place}: {found.module} reads the private {found.of} {found.name}"
    if here != there and FLOORS[there] >= FLOORS[here]:
        floors = f"{FLOORS[here]}, from {there} on floor {FLOORS[there]}"
        return f"{found.place}: {here} imports, on floor {floors}"
    return None


class TestImportsGoDown:
    @pytest.mark.parametrize(
        ("module", "path"), list(sources()), ids=lambda x: str(x).split("/")[-1]
    )
    def test_in_every_file(self, module: str, path: Path) -> None:
        found = imports(module, path.read_text(), str(path.relative_to(ROOT)))
        assert [fault for x in found if (fault := faults(x))] == []

    def test_every_module_has_a_floor(self) -> None:
        stray = [module for module, _ in sources() if room(module) == "irpe_ds"]
        assert stray == ["irpe_ds"]

    @pytest.mark.parametrize(
        ("module", "code"),
        [
            ("irpe_ds.cluster.signals", "from irpe_ds.data.beton.reader import Beton"),
            ("irpe_ds.cluster.signals", "from irpe_ds import data"),
            ("irpe_ds.data.loaders", "import irpe_ds.models"),
            ("irpe_ds.data.loaders", "def f():\n    from irpe_ds.models import equip"),
            ("irpe_ds.rpe.tables", "from irpe_ds.ops import irpe_attention"),
            ("irpe_ds.ops.attention", "from irpe_ds.config import ModelConfig"),
            ("irpe_ds.models.zoo", "from irpe_ds import equip"),
            ("irpe_ds.training.run", "from launch.train import main"),
            ("irpe_ds.models.zoo", "from irpe_ds.rpe.buckets import _index"),
            ("irpe_ds.models.zoo", "from irpe_ds.rpe import buckets as b\nb._index(1)"),
        ],
    )
    def test_finds_a_fault(self, module: str, code: str) -> None:
        assert any(faults(found) for found in imports(module, code))

    @pytest.mark.parametrize(
        ("module", "code"),
        [
            ("irpe_ds.models.zoo", "import torch.nn._reduction\nfrom irpe_ds.rpe import BucketMap"),
            ("irpe_ds.models.zoo", "from irpe_ds.models.attention import RPEAttention"),
            ("launch.train", "from irpe_ds import __version__\nfrom irpe_ds.training import run"),
            ("irpe_ds.rpe.tables", "from irpe_ds.errors import ConfigError"),
        ],
    )
    def test_finds_no_fault(self, module: str, code: str) -> None:
        assert not any(faults(found) for found in imports(module, code))


class TestImport:
    def test_needs_torch_and_timm_alone(self) -> None:
        name = "deit_small_patch16_224_ctx_product_50_shared_k"
        code = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL!r}))  # as if they were not installed
import irpe_ds, timm, torch
assert timm.is_model({name!r})
with torch.device("meta"):
    timm.create_model({name!r}, depth=1)
for public in ("BucketMap", "RPEConfig", "ConfigError", "equip", "irpe_attention"):
    getattr(irpe_ds, public)
import irpe_ds.models.flops  # of `irpe-ds zoo`
loaded = [name for name in sys.modules if name.startswith(("irpe_ds.data", "irpe_ds.config"))]
assert not loaded, loaded
try:
    irpe_ds.RunConfig
except ModuleNotFoundError as error:
    assert error.name == "pydantic", error
else:
    raise AssertionError("pydantic was not blocked")
"""
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("name", irpe_ds.__all__)
    def test_every_public_name_is_there(self, name: str) -> None:
        assert getattr(irpe_ds, name).__name__ == name

    def test_no_other_name_is(self) -> None:
        with pytest.raises(AttributeError, match="'irpe_ds' has no attribute 'nonsense'"):
            _ = irpe_ds.nonsense
