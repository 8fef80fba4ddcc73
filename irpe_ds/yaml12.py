"""YAML as configurations need it: the scalars of YAML 1.2's core schema, and no key twice.

PyYAML reads YAML 1.1: the key `on` is true there, `1e-5` a string, `010` eight, `1:30` ninety and
`2020-13-45` an exception.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml

INT = re.compile(r"[-+]?[0-9]+\Z")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")
CORE = "tag:yaml.org,2002:"
SHORT_INT = re.compile(r"[-+]?0*[0-9]{1,18}\Z")
"""Those that fit into 64 bits; int() takes long for thousands of digits, or raises."""
NULL = re.compile(r"(~|null|Null|NULL|)\Z")
TEXT = re.compile("[^\0\ud800-\udfff]*\\Z")
"""What UTF-8 and names of files can hold."""
REPLACED = {f"{CORE}{name}" for name in ("bool", "int", "float")}
REMOVED = {f"{CORE}{name}" for name in ("timestamp", "value")}
DEEPEST = 50
"""Levels of nesting; PyYAML takes time quadratic in them, and recurses."""
MOST = 20_000
"""Values of a document, those of an alias counted again wherever it stands."""


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with these rules."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth, self.count = 0, 0
        self.counts: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark, before = self.peek_event().start_mark, self.count
        is_alias = self.check_event(yaml.AliasEvent)
        self.depth, self.count = self.depth + 1, self.count + 1
        if self.depth > DEEPEST:
            raise _error(f"more than {DEEPEST} levels of nesting", mark)
        node = super().compose_node(parent, index)
        if is_alias:
            if node not in self.counts:
                raise _error("an alias inside of what it stands for", mark)
            self.count = before + self.counts[node]
        if self.count > MOST:
            raise _error(f"more than {MOST} values", mark)
        self.depth -= 1
        if node is not None:
            self.counts[node] = self.count - before
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag == f"{CORE}merge":
                continue
            if key.tag != f"{CORE}str":
                raise _error("a key that is not a string", key.start_mark)
            if key.value in seen:
                raise _error(f"key {key.value!r} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _error(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, mark)


def _scalar(of: str, pattern: re.Pattern[str], convert: Callable[[str], Any]) -> Any:
    """Constructs a scalar, also one with an explicit tag such as `!!int`."""

    def construct(loader: Loader, node: yaml.ScalarNode) -> Any:
        text = loader.construct_scalar(node)
        if not pattern.match(text):
            shown = text if len(text) <= 40 else f"{text[:40]}... of {len(text)} characters"
            raise _error(f"{shown!r} is not {of}", node.start_mark)
        return convert(text)

    return construct


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in REPLACED | REMOVED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern, _first in (
    ("bool", BOOL, "tTfF"),
    ("int", INT, "-+0123456789"),
    ("float", FLOAT, "-+.0123456789"),
):
    Loader.add_implicit_resolver(f"{CORE}{_name}", _pattern, list(_first))
Loader.yaml_constructors = {
    **{tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (f"{CORE}seq", f"{CORE}map", None)},
    f"{CORE}null": _scalar("null", NULL, lambda _: None),
    f"{CORE}bool": _scalar("true or false", BOOL, lambda text: text[0] in "tT"),
    f"{CORE}int": _scalar("an integer of at most 18 digits", SHORT_INT, int),
    f"{CORE}float": _scalar("a number", FLOAT, float),
    f"{CORE}str": _scalar("text without NUL and surrogates", TEXT, str),
}


def load(text: str) -> Any:
    """The value of one document.

    Raises:
        yaml.YAMLError: invalid YAML, a duplicate key, or a document beyond the limits above.
    """
    try:
        return yaml.load(text, Loader=Loader)
    except (ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF"
        raise yaml.YAMLError(str(error)) from None
