"""After `import irpe_ds` timm knows our models, without importing timm and torch to get there."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

MODELS = "irpe_ds.models"
"""Importing it registers the zoo with timm."""


def install() -> None:
    """Register the zoo now if timm is imported already, else right after it will be."""
    if "timm" in sys.modules:
        import_module(MODELS)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds timm where Python does, and adds to its loader what is to follow."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """timm's own loader, then our models."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if MODELS not in sys.modules:  # else timm is imported by them, on their way to the zoo
            import_module(MODELS)
