"""The command `irpe-ds`: every script of the repository, and what it says of a missing package."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from irpe_ds import __main__, cli
from irpe_ds.config import load_config
from irpe_ds.training.deepspeed_config import read_ds_config

ROOT = Path(__file__).parents[1]
NEEDED = ("train", "convert", "describe", "verify", "evaluate", "export", "plan", "ops", "zoo")


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    """The exit code of `irpe-ds` with these words."""
    monkeypatch.setattr(sys, "argv", ["irpe-ds", *words])
    with pytest.raises(SystemExit) as ended:
        __main__.console()
    return ended.value.code


def test_help_lists_every_script_without_importing_torch(tmp_path: Path) -> None:
    code = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['torch'] = None\n"
    code += "runpy.run_module('irpe_ds', run_name='__main__')"
    command = [sys.executable, "-c", code, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    listed = dict(re.findall(r"^  ([a-z0-9]+) +([A-Z].+)$", done.stdout, re.MULTILINE))
    assert listed.keys() >= {*NEEDED}
    assert listed["convert"] == "Convert images to FFCV's .beton, read in place"
    scripts = {
        path.stem for folder in ("launch", "data_prep") for path in ROOT.glob(f"{folder}/*.py")
    }
    assert {*listed} == scripts - {"synthetic_imagenet"} | {"ops"}


def test_no_script_hides_a_module_of_pythons() -> None:
    """Python puts a script's folder before its own: `import inspect` would find ours."""
    for folder in ("launch", "data_prep"):
        names = {path.stem for path in (ROOT / folder).glob("*.py")}
        assert not names & sys.stdlib_module_names


def test_a_script_gets_what_follows_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--local_rank=0", "train", "--config", "no.yaml", "--x.y=1") == 2
    assert sys.argv == [str(ROOT / "launch/train.py"), "--config", "no.yaml", "--x.y=1"]
    assert capsys.readouterr().err.startswith("error: no.yaml: expected a readable YAML file")
    assert call(monkeypatch, "trian") == 2
    assert "argument COMMAND: invalid choice: 'trian'" in capsys.readouterr().err


def test_recipes_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = "launch/configs/imagenet/deit_small_k.yaml"
    assert load_config(recipe).name == "deit-small-k"
    assert read_ds_config(Path("ds_configs/zero3.json"))["zero_optimization"]["stage"] == 3
    (tmp_path / "mine.yaml").write_text(f"base: {recipe}\nname: mine\n")
    assert load_config("mine.yaml").model == load_config(recipe).model
    own = tmp_path / recipe  # a file of the user's is preferred
    own.parent.mkdir(parents=True)
    own.write_text("base: launch/configs/quickstart.yaml\nname: own\n")
    assert load_config(recipe).name == "own"


@pytest.mark.parametrize(
    ("main", "error"),
    [
        ("print('x' * 10**6)", ""),  # more than the pipe holds
        ("print('x')", ""),  # written when the script ends
        ("print('x'); sys.exit(0)", ""),  # as --help does
        ("print('x'); raise UserError('no space')", "error: no space\n"),
    ],
)
def test_a_reader_may_leave(main: str, error: str) -> None:
    """As `head` does: the script ends without a traceback."""
    source = "import sys\nfrom irpe_ds.cli import *\n"
    source += f"def main():\n    input(); {main}\nrun(lambda: run(main))"
    command = [sys.executable, "-c", source]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    env = os.environ | {"PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command, cwd=ROOT, env=env, **pipes) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, errors = process.communicate(b"\n")
    assert (process.returncode, errors.decode()) == (cli.UNREAD, error)


def test_another_broken_pipe_is_a_bug() -> None:
    def fail() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        cli.run(fail)


def test_a_command_as_it_can_be_typed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.command("data_prep/verify.py") == "python data_prep/verify.py"
    monkeypatch.chdir(tmp_path)
    assert cli.command("data_prep/verify.py") == "irpe-ds verify"


class TestMissingPackages:
    @pytest.mark.parametrize("name", ["deepspeed", "deepspeed.ops.adam"])
    def test_one_line_says_what_to_install(
        self, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: self.fail(name))
        assert ended.value.code == 2
        expected = "error: deepspeed is not installed: pip install 'irpe-ds[train]'\n"
        assert capsys.readouterr().err == expected

    def test_another_is_a_bug(self) -> None:
        with pytest.raises(ModuleNotFoundError):
            cli.run(lambda: self.fail("irpe_ds.nonsense"))

    def fail(self, name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    @pytest.mark.parametrize("extra", cli.EXTRAS)
    def test_the_extra_installs_it(self, extra: str) -> None:
        text = (ROOT / "setup.py").read_text()
        (listed,) = re.findall(
            rf'^    "{extra}": \[(.*?)\],\n(?=    "|}})', text, re.DOTALL | re.MULTILINE
        )
        owners = importlib.metadata.packages_distributions()
        for name in {*cli.EXTRAS[extra]} - {"numba"}:  # FFCV's own requirement
            assert any(f'"{owner}' in listed.lower() for owner in map(str.lower, owners[name]))
