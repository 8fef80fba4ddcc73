"""launch/plan.py as its user calls it."""

import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Call = Callable[..., tuple[object, str, str]]

DEIT = ["--config", "launch/configs/imagenet/deit_small_k.yaml"]
ON_H100 = [*DEIT, "--gpu", "H100", "--gpus", "64"]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run launch/plan.py in this process, which has paid for the imports: code, stdout, stderr."""

    def call(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["launch/plan.py", *arguments])
        code: object = 0
        try:
            runpy.run_path("launch/plan.py", run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return call


def test_answers_and_draws(call: Call, tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    name = "deit_small_patch16_224_ctx_product_50_shared_k"
    results.write_text(
        "model,ranks,nodes,stage,micro_batch,images_per_s\n"
        f"{name},1,1,1,256,3000\n{name},16,2,1,256,40000\n"
    )
    figure = tmp_path / "plans" / "plan.png"
    fitted = (*ON_H100, "--calibrate", str(results))
    _, _, stderr = call(*fitted, "--flop-share", "0.5")
    assert "error: --flop-share: expected no value: it is fitted, got 0.5" in stderr
    code, stdout, stderr = call(*fitted, "--out", str(figure))
    assert code == 0, stderr
    assert stdout.startswith(f"{name}: 22.09 M parameters")
    for said in (
        "22.09 M parameters",
        "16 images x 1 micro-steps x 64 GPUs = 1024 per update",
        "- bottleneck: ",
        "| all_reduce | gradients | 64 | 1 | 88.36 | 173.95 |",
        "| zero1 (the run's) |",
        "| 4096 | 128 |",
        "fitted to 2 results",
        "No figure above is measured.",
        "| assumed | no |",
    ):
        assert said in stdout
    top = "\n".join(stdout.splitlines()[:10])
    assert "cores of each node" in top
    assert "- advice: " in top
    with Image.open(figure) as picture:
        assert picture.width > 1000


def test_says_what_it_leaves_out(call: Call, tmp_path: Path) -> None:
    distill = ["--config", "launch/configs/imagenet/distill_hard.yaml"]
    shutil.copy("ds_configs/zero1.json", tmp_path)
    (tmp_path / "package.json").write_text("{}")  # of something else
    deepspeed = f"train.deepspeed={tmp_path}/zero1.json"
    model = "model.resolutions=[[0, 160], [150, 224]]", "model.freeze=6"
    code, stdout, stderr = call(*distill, "--gpu", "H100", "--gpus", "8", deepspeed, *model)
    assert code == 0, stderr
    assert "- not counted: the teacher" in stdout
    assert "- not counted: model.resolutions" in stdout
    assert "- not counted: model.freeze" in stdout


def test_without_deepspeed() -> None:
    """As if it were not installed: the plan is made, and says which version it is counted for."""
    code = (
        "import importlib.metadata, runpy, sys\n"
        "find = importlib.metadata.Distribution.from_name\n"
        "def find_others(name):\n"
        "    if name == 'deepspeed':\n"
        "        raise importlib.metadata.PackageNotFoundError(name)\n"
        "    return find(name)\n"
        "importlib.metadata.Distribution.from_name = find_others\n"
        "sys.modules['deepspeed'] = None\n"
        "runpy.run_path('launch/plan.py', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, *ON_H100]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    caution = (
        "- caution: memory and bytes are counted for DeepSpeed 0.19, but no DeepSpeed is installed"
    )
    assert caution in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("plan", ["--help"], ""),
        ("curves", ["--help"], ""),
        ("tables", ["--help"], ""),
        ("scaling", ["--help"], ""),
        ("zoo", ["--help"], ""),
        ("plan", [*ON_H100, "train.epoch=3"], "error: train.epoch: "),
        ("plan", [*ON_H100, "--per-node", "0"], "error: --per-node: "),
        ("curves", ["runs/x", "--out", "x.jpg"], "error: --out: "),
        ("tables", [*DEIT, "--weights", "x", "train.epoch=3"], "error: train.epoch: "),
        ("tables", ["--run", "x", "--out", "x.png"], "error: --run: expected a run folder"),
        ("evaluate", ["--run", "x"], "error: --run: expected a run folder"),
        (
            "scaling",
            ["--config", "launch/configs/scaling/cpu.yaml", "scaling.repeat=3"],
            "error: scaling.repeat: ",
        ),
    ],
)
def test_help_and_mistakes_need_no_torch(script: str, arguments: list[str], message: str) -> None:
    code = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'deepspeed', 'matplotlib', 'numpy')))\n"
        f"runpy.run_path('launch/{script}.py', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == (2 if message else 0), done.stderr
    assert done.stderr.startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*DEIT, "--gpu", "H1000", "--gpus", "8"], "--gpu: expected one of H200, H100"),
        ([*ON_H100, "--out", "plan.jpg"], "--out: expected a name that ends in .png"),
        ([*ON_H100, "--link-share", "0"], "--link-share: expected a number above 0"),
        ([*ON_H100, "--out", "/dev/null/plan.png"], "cannot write --out: "),
        ([*ON_H100, "model.impl=flex"], "model.impl: expected one of auto, fused, gather"),
        (
            [*ON_H100, "train.deepspeed=no.json"],
            "train.deepspeed: expected a readable JSON file, got no.json",
        ),
    ],
)
def test_a_mistake_is_one_line(call: Call, arguments: list[str], message: str) -> None:
    code, _, stderr = call(*arguments)
    assert code == 2
    last = stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {message}"), stderr
