"""The values of a configuration, before they are checked: YAML files in layers, and overrides.

A file may build on others: `base: deit.yaml`, or a list of paths relative to the file, of which
later ones win. The file overrides its bases, and the command line overrides both. A file that is
not there is looked for among those of the package: launch/configs/quickstart.yaml.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from irpe_ds import yaml12
from irpe_ds.errors import ConfigError
from irpe_ds.files import or_shipped, read_regular

Values = dict[str, Any]
LARGEST = 1 << 20
"""Bytes of a file."""


def read_values(path: Path, overrides: Sequence[str] = ()) -> Values:
    """The values of a YAML merged over its bases, then overrides such as `train.epochs=3`.

    Mappings are merged key by key; any other value replaces the one below it, and an override
    replaces the value that it names.

    Raises:
        ConfigError: a file cannot be read, bases form a cycle, or an override is malformed.
    """
    values = _read(or_shipped(path), above=())
    for override in overrides:
        _override(values, override)
    return values


def apply(values: Values, key: str, value: Any) -> None:
    """Set `section.key`."""
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[last] = value


def _read(path: Path, above: tuple[Path, ...]) -> Values:
    """A file merged over its bases; `above` are the files that include it, outermost first."""
    where = f"{above[-1]}: base" if above else path
    if path.resolve() in (other.resolve() for other in above):
        circle = " -> ".join(str(file) for file in (*above, path))
        raise ConfigError(where, "a file that is not based on this one", circle)
    values = _parse(path, where)
    bases = values.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(base and isinstance(base, str) for base in bases):
        expected = "the path of a YAML file, or a list of them"
        raise ConfigError(f"{path}: base", expected, repr(bases))
    below: Values = {}
    for base in bases:
        below = _merge(below, _read(or_shipped(Path(base), path.parent), (*above, path)))
    return _merge(below, values)


def _parse(path: Path, where: object) -> Values:
    named = "" if where == path else f"{path}: "
    try:
        values = yaml12.load(read_regular(path, LARGEST).decode("utf-8"))
    except OSError as error:
        reason = "Is a directory" if path.is_dir() else error.strerror
        raise ConfigError(where, "a readable YAML file", f"{named}{reason}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(path, "valid YAML", " ".join(str(error).split())) from None
    if not isinstance(values, dict):
        raise ConfigError(path, "a mapping of sections", type(values).__name__)
    return values


def _merge(below: Values, above: Values) -> Values:
    merged = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _merge(below[key], above[key])
    return merged


def _override(values: Values, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")) or key.count(".") > yaml12.DEEPEST:
        raise ConfigError(
            key or override, "an override of the form section.key=value", repr(override)
        )
    try:
        apply(values, key, yaml12.load(text))
    except yaml.YAMLError as error:
        shown = repr(text) if len(text) <= 60 else f"{text[:60]!r}... of {len(text)} characters"
        problem = f" ({error.problem})" if isinstance(error, yaml.MarkedYAMLError) else ""
        raise ConfigError(key, "a YAML value", f"{shown}{problem}") from None
