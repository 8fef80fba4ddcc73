"""YAML as configurations need it: the scalars of YAML 1.2's core schema, and no key twice.

PyYAML reads YAML 1.1: the key `on` is true there, `1e-5` a string, `010` eight and `1:30` ninety.
"""

import re
from typing import Any

import yaml

INT = re.compile(r"[-+]?[0-9]+\Z")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")
REPLACED = {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with these rules."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {key.value!r} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", BOOL, "tTfF"),
    ("tag:yaml.org,2002:int", INT, "-+0123456789"),
    ("tag:yaml.org,2002:float", FLOAT, "-+.0123456789"),
):
    Loader.add_implicit_resolver(_tag, _pattern, list(_first))
Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(node.value))


def load(text: str) -> Any:
    """The value of one document.

    Raises:
        yaml.YAMLError: invalid YAML, or a duplicate key.
    """
    return yaml.load(text, Loader=Loader)
