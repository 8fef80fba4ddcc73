"""What README and docs/ say is true: links, paths, commands, config keys, messages, the tree."""

import ast
import fnmatch
import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from irpe_ds import BucketMap, irpe_attention
from irpe_ds.benchmark.experiment import Scaling
from irpe_ds.config import load_config
from irpe_ds.errors import ExitCode
from tests.commands import THEIR_CONFIGS, check_commands, module_of
from tests.test_floors import FLOORS

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
}

OURS = ("irpe_ds", "ops", "launch", "data_prep", "ds_configs", "docs", "tests", ".ci")
"""Folders whose files a page may name; other paths are a user's own."""
FILE = r"[\w.-]+\.(?:py|yaml|json|jsonl|md|cpp|cuh?|h|sbatch|toml)"
THEIRS = set(THEIR_CONFIGS)
"""Files that a page may name and that are a user's own."""
MADE = {
    *("config.json", "config.yaml", "deepspeed.json", "environment.json", "metrics.jsonl"),
    *("skipped.jsonl", "checkpoint.json", "results.json", "FILE.beton.json", "classes.json"),
    *("val_images.json", "predictions.json", "train.beton.json"),
}
"""Files that runs and conversions write."""
MADE_OR_GIVEN = r"\.(?:csv|tar|txt|py|yaml|sbatch)$|\.beton"
"""Of names that look like keys, such as train.beton, the end or middle."""


@cache
def files() -> frozenset[str]:
    """Every file of ours, by its path; a folder ends with a slash."""
    top = [path for path in ROOT.iterdir() if path.is_file()]
    inner = [path for folder in OURS for path in (ROOT / folder).rglob("*")]
    paths = [path.relative_to(ROOT).as_posix() + "/" * path.is_dir() for path in top + inner]
    return frozenset([*paths, *(f"{folder}/" for folder in OURS)])


def is_file(name: str) -> bool:
    """Whether a file or folder is there, by path or pattern."""
    return bool(fnmatch.filter(files(), name) or fnmatch.filter(files(), f"{name}/"))


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every code block of a language."""
    return [
        (page, block)
        for page, text in PAGES.items()
        for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    ]


def prose(text: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def spans(page: str) -> list[str]:
    """Every `span of code` of a page."""
    return list(dict.fromkeys(_spans(prose(PAGES[page]))))


def _spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def keys() -> frozenset[str]:
    """Every key of a run's YAML, its sections, and those of a scaling experiment."""
    found = re.findall(r"^\| `([\w.]+)` \|", PAGES["docs/config.md"], re.MULTILINE)
    found += [f"scaling.{key}" for key in Scaling.model_fields]
    return frozenset([*found, *(key.rpartition(".")[0] for key in found)])


class TestNames:
    @pytest.mark.parametrize("page", PAGES)
    def test_links_lead_somewhere(self, page: str) -> None:
        targets = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
        for target in (to for to in targets if "://" not in to):
            name, _, anchor = target.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path.read_text()), target

    @pytest.mark.parametrize("page", PAGES)
    def test_files_are_there(self, page: str) -> None:
        words = [word for text in spans(page) for word in text.split()]
        for word in words:
            if word.startswith(tuple(f"{folder}/" for folder in OURS)) and word not in THEIRS:
                assert is_file(word), word
            elif re.fullmatch(FILE, word) and word not in THEIRS | MADE:
                assert is_file(word) or is_file(f"*/{word}"), word
            elif re.fullmatch(r"irpe_ds(\.\w+)+", word):
                path = word.replace(".", "/").replace("irpe_ds/ops", "ops")
                assert is_file(path) or is_file(f"{path}.py"), word

    @pytest.mark.parametrize("page", PAGES)
    def test_keys_are_there(self, page: str) -> None:
        sections = "model|data|augment|optim|train|distill|log|scaling"
        for text in spans(page):
            for word in re.findall(rf"(?<![\w./])((?:{sections})\.[\w.]+)", text):
                assert word in keys() or re.search(MADE_OR_GIVEN, word), word


RUNNABLE = ("python launch/", "python data_prep/", "python -m ", "deepspeed ", "irpe-ds ", "make ")


class TestCommands:
    @pytest.mark.parametrize(("page", "text"), blocks("bash"))
    def test_of_every_block(self, page: str, text: str) -> None:
        check_commands(text)

    @pytest.mark.parametrize("page", PAGES)
    def test_of_every_span(self, page: str) -> None:
        for text in spans(page):
            if text.startswith(RUNNABLE) and "..." not in text:
                check_commands(text)

    @pytest.mark.parametrize(
        "line",
        [
            "make nonsense",
            "python launch/nonsense.py",
            "python launch/train.py",
            "python launch/evaluate.py --run runs/x --nonsense",
            "deepspeed --nonsense launch/train.py --config x.yaml",
            "deepspeed launch/train.py --config nonsense.yaml",
            "python -m irpe_ds.nonsense",
            "irpe-ds nonsense",
            "irpe-ds train",
            "sbatch launch/slurm/nonsense.sbatch --config x.yaml",
            "nonsense",
        ],
    )
    def test_a_mistake_is_found(self, line: str) -> None:
        with pytest.raises(
            (AssertionError, pytest.fail.Exception, SystemExit, LookupError, ImportError)
        ):
            check_commands(line)

    @pytest.mark.parametrize("key", ["train.nonsense=1", "train.epochs=none", "nonsense"])
    def test_a_mistaken_override_is_found(self, key: str) -> None:
        with pytest.raises(ValueError, match=key.partition("=")[0]):
            check_commands(f"deepspeed launch/train.py --config x.yaml {key}")

    @pytest.mark.parametrize(("page", "text"), blocks("yaml"))
    def test_every_yaml_loads(self, page: str, text: str, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text(re.sub(r"^base: ", f"base: {ROOT}/", text, flags=re.MULTILINE))
        assert load_config(file).name

    def test_every_extra_named_exists(self) -> None:
        extras = set(re.findall(r'^    "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE))
        named = set(re.findall(r"(?:irpe-ds|\.)\[([\w,]+)\]", " ".join(PAGES.values())))
        assert {"all", "cuda"} <= named <= extras


class TestReadme:
    def test_is_short(self) -> None:
        assert len(PAGES["README.md"].splitlines()) <= 180

    def test_the_op_is_the_lines_that_define_it(self) -> None:
        (lines,) = (b for p, b in blocks("python") if p == "README.md" and "einsum" in b)
        length, dim = 13, 8
        buckets = BucketMap.build("product", height=3, width=4, skip=1)
        q, k, v = (torch.randn(length, dim, dtype=torch.float64) for _ in "qkv")
        shape = (dim, buckets.num_buckets)
        t_k, t_q, t_v = (torch.randn(shape, dtype=torch.float64) for _ in "kqv")
        names = {"torch": torch, "q": q, "k": k, "v": v, "D": dim, "ids": buckets.ids.long()}
        names |= {"T_K": t_k, "T_Q": t_q, "T_V": t_v.T}
        exec(lines, names)
        out = irpe_attention(
            *(x[None, None] for x in (q, k, v)),
            rpe_q=[(t_q[None], buckets)],
            rpe_k=[(t_k[None], buckets)],
            rpe_v=[(t_v.T[None], buckets)],
        )
        torch.testing.assert_close(names["out"], out[0, 0])


class TestOperators:
    def test_the_encoder_of_one_s_own_runs(self) -> None:
        (lines,) = (b for p, b in blocks("python") if "RPEMultiheadAttention(" in b)
        names: dict[str, torch.Tensor] = {}
        exec(lines, names)
        assert names["tokens"].shape == (2, 65, 64)

    @pytest.mark.thorough
    def test_the_vit_of_hugging_face_runs(self) -> None:
        (lines,) = (b for p, b in blocks("python") if "AttentionInterface" in b)
        names: dict[str, Any] = {}
        exec(lines, names)
        model, images = names["model"], torch.randn(1, 3, 224, 224)
        logits = model(images).logits
        logits.sum().backward()
        assert model.vit.layers[0].attention.rpe_k.lookup_table_weight.grad.any()
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(images).logits, logits)


def tree() -> list[str]:
    """The files that architecture.md's tree names, as paths."""
    text = PAGES["docs/architecture.md"].split("## The tree")[1]
    (block, *_) = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    files, folders = [], [""]
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        path = folders[depth] + name
        if name.endswith("/"):
            folders[depth + 1 :] = [path]
        else:
            files.append(path)
    return files


class TestArchitecture:
    def test_the_tree_names_every_file_once(self) -> None:
        suffixes = {".py", ".cpp", ".h", ".cu", ".cuh", ".md"}
        found = {
            path.relative_to(ROOT).as_posix()
            for folder in ("irpe_ds", "ops")  # rglob does not follow the link irpe_ds/ops
            for path in (ROOT / folder).rglob("*")
            if path.suffix in suffixes and path.name != "__init__.py"
        }
        assert sorted(tree()) == sorted(found)

    def test_the_floors_are_those_of_the_test(self) -> None:
        text = PAGES["docs/architecture.md"].split("## Who imports whom")[1].split("\n## ")[0]
        rows = re.findall(r"^\| (\d+|below) \| (.+) \|$", text, re.MULTILINE)
        told = {
            room.rstrip("/"): -1 if floor == "below" else int(floor)
            for floor, rooms in rows
            for room in _spans(rooms)
        }
        assert told == {room: floor for room, floor in FLOORS.items() if room != "irpe_ds"}


def reference() -> str:
    """docs/config_reference.py's own page."""
    made: str = module_of("docs/config_reference.py").reference()
    return made


def test_config_md_is_made_from_config_py() -> None:
    assert PAGES["docs/config.md"] == reference()


@cache
def constants() -> str:
    """Every string of our code but docstrings, one a line."""
    found = []
    for path in (p for folder in OURS[:4] for p in (ROOT / folder).rglob("*.py")):
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += [] if id(node) in docs else [node.value]
    return "\n".join(found)


def messages() -> list[str]:
    """The messages that troubleshooting.md explains."""
    rows = re.findall(r"^\| `([^`]+)` \|", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    assert len(rows) > 40
    return rows


class TestTroubleshooting:
    @pytest.mark.parametrize("message", messages())
    def test_every_message_is_one_of_ours(self, message: str) -> None:
        parts = re.split(r"\.\.\.|:? ?\bexpected ?|, got ", message)
        assert [part for part in parts if part.strip(" ,:") not in constants()] == []

    def test_exit_codes(self) -> None:
        rows = re.findall(
            r"^\| (\d+) \| ([A-Z]+) \|", PAGES["docs/troubleshooting.md"], re.MULTILINE
        )
        assert {name: int(code) for code, name in rows} == {c.name: c.value for c in ExitCode}


class TestChangelog:
    @pytest.mark.parametrize(
        ("row", "module"),
        [
            ("checkpoint.json", "irpe_ds.checkpoint.reader"),
            ("FILE.beton.json", "irpe_ds.data.beton.manifest"),
        ],
    )
    def test_versions_of_the_formats(self, row: str, module: str) -> None:
        found = re.search(
            rf"^\| `[^`]*{row}` \| `format` \| (\d+) \|", PAGES["CHANGELOG.md"], re.MULTILINE
        )
        assert found
        assert int(found[1]) == importlib.import_module(module).FORMAT
