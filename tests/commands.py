"""Commands of a page, read by the scripts' own parsers: nothing is run."""

import argparse
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

from irpe_ds.__main__ import scripts
from irpe_ds.benchmark.ablation import Ablation
from irpe_ds.benchmark.experiment import Scaling
from irpe_ds.config import load_config

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "launch/configs/quickstart.yaml"
OUR_MODULES = ("irpe_ds", "tests")
THEIR_CONFIGS = ("mine.yaml", "x.yaml")
"""YAML files that a page may name and that are a user's own."""
MORE_SECTIONS = {
    "launch/scaling.py": ("scaling", Scaling),
    "launch/ablation.py": ("ablation", Ablation),
}
"""Of YAML files that are more than a run's, by script."""
PROGRAMS = {
    *("source", "cd", "git", "pip", "apt-get", "sudo", "dnf", "docker", "conda", "diff", "cut"),
    *("sed", "scontrol", "kill", "ssh", "pytest", "sha256sum"),
}
"""Not ours: what a page says to them is not checked."""


def source_of(script: str) -> str:
    """The text of a script, or of a module by its dotted name."""
    path = ROOT / script
    if not script.endswith(".py"):
        spec = importlib.util.find_spec(script)
        assert spec is not None, script
        is_package = spec.submodule_search_locations is not None
        path = (
            Path(str(spec.origin)).with_name("__main__.py")
            if is_package
            else Path(str(spec.origin))
        )
    return path.read_text()


@cache
def module_of(script: str) -> ModuleType:
    """A script of ours, imported by its path; or a module by its dotted name."""
    if not script.endswith(".py"):
        spec = importlib.util.find_spec(script)
        assert spec is not None, script
        is_package = spec.submodule_search_locations is not None
        return importlib.import_module(f"{script}.__main__" if is_package else script)
    spec = importlib.util.spec_from_file_location(f"docs_{Path(script).stem}", ROOT / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Parsed(Exception):
    """Raised by a script as soon as it has read its command line."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments


def parse(script: str, words: list[str]) -> argparse.Namespace:
    """What a script's own parser makes of a command line; the script does nothing else."""
    main: Callable[[], None] = module_of(script).main

    def raising(method: Callable[..., argparse.Namespace]) -> Callable[..., NoReturn]:
        def parse_args(self: argparse.ArgumentParser, *args: Any, **options: Any) -> NoReturn:
            raise Parsed(method(self, *args, **options))

        return parse_args

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *words])
        for name in ("parse_args", "parse_intermixed_args"):
            method = getattr(argparse.ArgumentParser, name)
            patch.setattr(argparse.ArgumentParser, name, raising(method))
        try:
            main()
        except Parsed as parsed:
            return parsed.arguments
        except SystemExit:
            pytest.fail(f"{script} does not take {words}")
    raise AssertionError(f"{script} reads no command line")


def check_script(script: str, words: list[str]) -> None:
    """Whether a script of ours exists, takes these options, and its overrides name real keys."""
    if script == "irpe_ds":
        if words != ["--help"]:
            check_script(str(scripts()[words[0]].relative_to(ROOT)), words[1:])
        return
    if script.endswith(".py"):
        assert (ROOT / script).is_file(), script
    source = source_of(script)
    if "argparse" not in source:
        assert len(words) == len(set(re.findall(r"sys\.argv\[\d\]", source))), words
        return
    arguments = parse(script, words)
    config = getattr(arguments, "config", None)
    path = ROOT / config if config is not None else QUICKSTART
    if path.name not in THEIR_CONFIGS:
        assert path.is_file(), config
    own, schema = MORE_SECTIONS.get(script, ("", None))
    overrides = []
    for override in getattr(arguments, "overrides", []):
        section, _, key = override.partition("=")[0].partition(".")
        if schema is not None and section == own:
            assert key in schema.model_fields, override
        else:
            overrides.append(override.replace("%a", "0"))
    load_config(QUICKSTART if schema or path.name in THEIR_CONFIGS else path, overrides)


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of some lines of shell, as words."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word[0] in "();<>|&":
                if words:
                    yield words
                words = ["redirected-to"] if word == ">" else []
            else:
                words.append(word)


def check_command(words: list[str]) -> None:
    """Whether what a page says to type can be typed."""
    words = list(words)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    match words:
        case [] | ["redirected-to", *_]:
            return
        case ["make", *targets]:
            known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            assert {target for target in targets if "=" not in target} <= known
        case ["deepspeed", *rest]:
            from deepspeed.launcher.runner import parse_args

            found = parse_args(rest)
            check_script(found.user_script, found.user_args)
        case ["torchrun", *rest]:
            from torch.distributed.run import get_args_parser

            found = get_args_parser().parse_args(rest)
            check_script(found.training_script, found.training_script_args)
        case ["irpe-ds", *rest]:
            check_script("irpe_ds", rest)
        case ["srun", *rest]:
            check_command(rest[rest.index("python") :])
        case ["sbatch", *rest]:
            number = next(n for n, word in enumerate(rest) if word.endswith(".sbatch"))
            assert (ROOT / rest[number]).is_file()
            check_script("launch/train.py", rest[number + 1 :])
        case ["docker", *_, "bash", "-c", line]:
            check_commands(line)
        case ["python" | "python3", "-m", module, *rest]:
            if module.split(".")[0] in OUR_MODULES:
                check_script(module, rest)
        case ["python", "docs/config_reference.py"]:
            assert (ROOT / words[1]).is_file()
        case ["python", script, *rest]:
            check_script(script, rest)
        case [program, *_]:
            assert program.split("/")[-1] in PROGRAMS, program


def check_commands(text: str) -> None:
    for words in commands(text):
        check_command(words)
