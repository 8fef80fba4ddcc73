"""Which parameters of a model are not trained."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from timm.models import group_parameters

from irpe_ds.errors import ConfigError


def freeze(model: Any, what: int | tuple[str, ...]) -> None:
    """Exclude parameters from training, in place: requires_grad is false.

    Args:
        what: the value of `model.freeze`.

    Raises:
        ConfigError: it names no parameter, or all of them.
    """
    if not what:
        return
    names = [name for name, _ in model.named_parameters()]
    is_frozen = _of_first_blocks(model, what) if isinstance(what, int) else _named(names, what)
    if all(map(is_frozen, names)):
        raise ConfigError("model.freeze", "some parameters left to train", what)
    for name, parameter in model.named_parameters():
        if is_frozen(name):
            parameter.requires_grad_(False)


def _of_first_blocks(model: Any, count: int) -> Callable[[str], bool]:
    """Of the first blocks, and of what is before them, as timm groups them for layer decay."""
    if not hasattr(model, "group_matcher"):
        expected = f"names: timm does not group the layers of {type(model).__name__}"
        raise ConfigError("model.freeze", expected, count)
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    return lambda name: layers[name] <= count


def _named(names: list[str], patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Those that a pattern matches, and none that begins with `!`."""
    for pattern in patterns:
        if not any(_matches(name, pattern.removeprefix("!")) for name in names):
            expected = f"names of parameters or modules, such as {names[0]}"
            raise ConfigError("model.freeze", expected, repr(pattern))
    kept = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    frozen = [pattern for pattern in patterns if not pattern.startswith("!")]
    return lambda name: (
        any(_matches(name, pattern) for pattern in frozen)
        and not any(_matches(name, pattern) for pattern in kept)
    )


def _matches(name: str, pattern: str) -> bool:
    """Whether the pattern is of the parameter, or of a module that it is in."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
