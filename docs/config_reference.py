"""docs/config.md, from the source: `python docs/config_reference.py > docs/config.md`.

Keys, types, defaults and docstrings are read from the source, which is where they are written.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "irpe_ds"
SOURCES = tuple(
    PACKAGE / name
    for name in ("config_types.py", "config_sections.py", "config.py", "rpe/config.py")
)
WORDS = {
    "StrictBool": "true or false",
    "bool": "true or false",
    "float": "number",
    "Path": "path",
    "str": "text",
    "Any": "any value",
    "RPEConfig": "the keys below",
    "tuple": "list",
}
HEAD = """# Every key of a run's YAML

Made from `irpe_ds/config_sections.py` by `docs/config_reference.py`; a test keeps it true. Any key
can be set on the command line too: `train.epochs=3 'model.rpe={on: qk}'`. A YAML may build on
others: `base: deit.yaml`, or a list of files, of which later ones win.

Where timm, DeiT or Hugging Face's Trainer (HF) has another name for a key, its row ends with it.
"""


def reference() -> str:
    """The page, in Markdown: a table for each section of `RunConfig`."""
    classes, aliases = _read()
    parts = [HEAD]
    for path, name in _sections("RunConfig", "", classes):
        parts.append(f"## {f'`{path}`' if path else 'At the top'}\n")
        parts.append("| key | value | default | meaning |\n|---|---|---|---|")
        for key, annotation, default, text in _fields(classes[name]):
            if _section_of(annotation, classes) and default != "`null`":
                continue  # a section of its own, always there
            full = f"{path}.{key}".lstrip(".")
            value = _type(annotation, aliases)
            if value == "text":
                value = aliases.get(f"{key.upper()}S", value)
            cells = (f"`{full}`", value, default, text)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts[-1] += "\n"
    return "\n".join(parts).rstrip() + "\n"


def _read() -> tuple[dict[str, ast.ClassDef], dict[str, str]]:
    """The classes of the sources, and the aliases of types with the words under them.

    The strings of METHODS are the values of a field `method`, and so on.
    """
    classes, aliases = {}, {}
    for path in SOURCES:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for node, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.ClassDef):
                classes[node.name] = node
            elif isinstance(node, ast.Assign) and (text := _string(following)):
                aliases[ast.unparse(node.targets[0])] = text
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
                values = ast.literal_eval(node.value)
                aliases[ast.unparse(node.targets[0])] = " or ".join(f"`{x}`" for x in values)
    return classes, aliases


def _sections(name: str, path: str, classes: dict[str, ast.ClassDef]) -> Iterator[tuple[str, str]]:
    """Path and class of a section and of those in it."""
    yield path, name
    for key, annotation, _, _ in _fields(classes[name]):
        if inner := _section_of(annotation, classes):
            yield from _sections(inner, f"{path}.{key}".lstrip("."), classes)


def _fields(section: ast.ClassDef) -> Iterator[tuple[str, ast.expr, str, str]]:
    """Key, type, default and docstring of each field."""
    for node, following in zip(section.body, [*section.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            default = f"`{_default(node.value)}`" if node.value else "required"
            text = " ".join(_string(following).split()).replace("None:", "null:")
            yield node.target.id, node.annotation, default, text


def _string(node: ast.stmt | None) -> str:
    """The docstring that a statement is, or nothing."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return str(node.value.value)
    return ""


def _default(value: ast.expr) -> str:
    """As YAML has it."""
    if isinstance(value, ast.Call):  # Path("..."), a section with its defaults
        return " ".join(str(arg.value) for arg in value.args if isinstance(arg, ast.Constant))
    text = ast.unparse(value).replace("(", "[").replace(")", "]")
    return {"None": "null", "True": "true", "False": "false"}.get(text, text.strip("'"))


def _section_of(annotation: ast.expr, classes: dict[str, ast.ClassDef]) -> str | None:
    """The section that a type names, if it does."""
    names = (node.id for node in ast.walk(annotation) if isinstance(node, ast.Name))
    return next((name for name in names if name in classes), None)


def _type(annotation: ast.expr, aliases: dict[str, str]) -> str:
    """A type in words."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
        assert isinstance(annotation.slice, ast.Tuple)
        annotation = annotation.slice.elts[0]
    text = ast.unparse(annotation).removesuffix(" | None")
    if text.startswith("Literal["):
        return " or ".join(f"`{value}`" for value in re.findall(r"'(\w+)'", text))
    text = re.sub(r"\b\w+\b", lambda match: aliases.get(match[0], match[0]), text)
    for source, word in WORDS.items():
        text = re.sub(rf"\b{source}\b", word, text)
    return text


if __name__ == "__main__":
    print(reference(), end="")
