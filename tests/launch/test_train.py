"""Training with two processes: stages, precisions, resuming, and the `deepspeed` command."""

import atexit
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from irpe_ds.config import load_config
from irpe_ds.models.build import build_model
from irpe_ds.ops.build.builder import IRPEBuilder
from tests.launch.outcomes import slow, tensors
from tests.launch.ranks import Ranks, free_port
from tests.ops.ptxsim.simulator import build

pytestmark = pytest.mark.dist
UPDATES = 18
STOP = 8  # in the middle of the first epoch
# Stage 3 last: it patches torch.nn.functional.linear for the rest of the process.
CASES = {precision: [(stage, precision) for stage in range(4)] for precision in ("fp32", "bf16")}
RECIPE = (  # DeiT's, and progressive resolution
    *("augment.auto=rand-m9-mstd0.5-inc1", "augment.erase=0.25", "augment.repeats=3"),
    *("augment.mixup=0.8", "augment.cutmix=1.0", "augment.label_smoothing=0.1"),
    *("augment.hflip=0.5", "model.resolutions=[[0, 16], [1, 24]]"),
)
PIPELINES = ("ffcv", "timm")
RESUMED = (1, 3)  # stages that `make test` resumes in fp32; `make test-slow` resumes all in bf16
Training = tuple[tuple[str, ...], str]
Launch = Callable[[list[Training]], None]
BF16 = [slow(*case) for case in CASES["bf16"]]
Evaluate = Callable[..., str]


def overrides(kind: str, stage: int, precision: str, updates: int) -> tuple[str, ...]:
    narrow = ("model.options.embed_dim=32",) if kind == "reference" or precision == "bf16" else ()
    return (
        *narrow,  # where processors have no bf16 instructions it takes several times as long
        *("train.log_every=1", "train.epochs=2", "train.global_batch=96", "optim.warmup_epochs=0"),
        *("model.options.depth=2", "model.drop_path=0.1", "optim.lr=1e-3"),
        f"name={kind}-{stage}-{precision}",
        f"train.deepspeed=ds_configs/zero{stage}.json",
        f"train.precision={precision}",
        f"train.max_updates={updates}",
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def launch(digits: Path, output: Path) -> Launch:
    """Train with these overrides, one after the other in the same two processes."""
    data = (f"output={output}", f"data.train={digits}/train.beton", f"data.val={digits}/val.beton")

    def launch(trainings: list[Training]) -> None:
        runs = [((*data, *overrides), resume) for overrides, resume in trainings]
        Ranks(output, 2, runs).succeed(1800)

    return launch


def first_of(precision: str) -> list[Training]:
    """Run folders `whole-STAGE-PRECISION`, and `resumed-...`, which is stopped."""
    whole = [(overrides("whole", *case, UPDATES), "never") for case in CASES[precision]]
    stopped = [(overrides("resumed", *case, STOP), "never") for case in resumed_of(precision)]
    return sorted(whole + stopped, key=lambda training: "zero3" in str(training))


def resumed_of(precision: str) -> list[tuple[int, str]]:
    return [case for case in CASES[precision] if precision == "bf16" or case[0] in RESUMED]


def second_of(precision: str) -> list[Training]:
    """`resumed-STAGE-PRECISION` goes on, in other processes."""
    return [(overrides("resumed", *case, UPDATES), "auto") for case in resumed_of(precision)]


@pytest.fixture(scope="module")
def runs(launch: Launch, output: Path) -> Path:
    """Run folders in fp32: every stage, variations of one, and DeiT's recipe."""
    plain = overrides("plain", 1, "fp32", UPDATES)
    others = {
        "plain": "model.drop_path=0",  # whose draws depend on how an update is cut up
        "accumulated": "train.accumulation=2",
        "clipped": "optim.clip_grad=0.5",
    }
    variations = [
        ((*plain, others["plain"], f"name={name}", text), "never") for name, text in others.items()
    ]
    recipe = [
        [
            ((*overrides(k, 1, "fp32", u), *RECIPE, f"name={k}-{p}", f"data.pipeline={p}"), resume)
            for p in PIPELINES
        ]
        for k, u, resume in (
            ("whole", UPDATES, "never"),
            ("resumed", STOP, "never"),
            ("resumed", UPDATES, "auto"),
        )
    ]
    launch([*variations, *recipe[0], *recipe[1], *first_of("fp32")])
    launch([*recipe[2], *second_of("fp32")])
    return output


@pytest.fixture(scope="module")
def bf16_runs(launch: Launch, output: Path) -> Path:
    """The same stages in bf16, and `reference-0-fp32`, which is as narrow."""
    reference: Training = (overrides("reference", 0, "fp32", UPDATES), "never")
    launch([reference, *first_of("bf16")])
    launch(second_of("bf16"))
    return output


@pytest.fixture
def runs_of(request: pytest.FixtureRequest, precision: str) -> Path:
    """The runs of a precision, made when asked for."""
    found: Path = request.getfixturevalue("runs" if precision == "fp32" else "bf16_runs")
    return found


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(folder: Path) -> torch.Tensor:
    found = [row["loss"] for row in rows(folder, "train")]
    assert len(found) == UPDATES
    return torch.tensor(found, dtype=torch.float64)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return tensors(folder, "weights", UPDATES)


def test_fp32_losses_agree_across_stages(runs: Path) -> None:
    reference = losses(runs / "whole-0-fp32")
    assert reference[-5:].mean() < reference[:5].mean() - 0.02
    for stage in (1, 2, 3):
        found = losses(runs / f"whole-{stage}-fp32")
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_bf16_follows_fp32(bf16_runs: Path, stage: int) -> None:
    runs = bf16_runs
    reference, found = losses(runs / "reference-0-fp32"), losses(runs / f"whole-{stage}-bf16")
    # Rounding makes 0.0009 and 0.0003; half the learning rate 0.016 and 0.004.
    torch.testing.assert_close(found[:5], reference[:5], rtol=0, atol=0.005)
    assert (found - reference).abs().mean() < 0.002
    ds_config = json.loads((runs / f"whole-{stage}-bf16" / "deepspeed.json").read_text())
    assert ds_config["bf16"] == {"enabled": True}


def test_accumulation_changes_nothing(runs: Path) -> None:
    expected, found = losses(runs / "plain"), losses(runs / "accumulated")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_clipping_is_applied(runs: Path) -> None:
    plain, clipped = (rows(runs / name, "train") for name in ("plain", "clipped"))
    assert plain[0]["loss"] == clipped[0]["loss"]
    assert plain[0]["grad_norm"] > 0.5
    assert not torch.equal(losses(runs / "plain"), losses(runs / "clipped"))


def check_resumed(runs: Path, case: str) -> None:
    whole, resumed = (runs / f"{kind}-{case}" for kind in ("whole", "resumed"))
    assert "resuming from" in (resumed / "log.txt").read_text()
    assert torch.equal(losses(resumed), losses(whole))
    assert rows(resumed, "eval")[-1] == rows(whole, "eval")[-1]
    expected, got = weights(whole), weights(resumed)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.parametrize(("stage", "precision"), [*((stage, "fp32") for stage in RESUMED), *BF16])
def test_resuming_is_bitwise_the_uninterrupted_run(
    runs_of: Path, stage: int, precision: str
) -> None:
    check_resumed(runs_of, f"{stage}-{precision}")


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_so_it_is_with_deits_recipe(runs: Path, pipeline: str) -> None:
    check_resumed(runs, pipeline)
    assert not torch.equal(losses(runs / f"whole-{pipeline}"), losses(runs / "whole-1-fp32"))


@pytest.mark.parametrize(("stage", "precision"), [*CASES["fp32"], *BF16])
def test_weights_are_whole_and_in_fp32(runs_of: Path, stage: int, precision: str) -> None:
    folder = runs_of / f"whole-{stage}-{precision}"
    found = weights(folder)
    state = build_model(load_config(folder / "config.yaml").model).state_dict()
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in state.items()
    }
    assert {value.dtype for value in found.values()} == {torch.float32}
    if precision == "bf16":  # from the master weights, not from their rounded copies
        head = found["head.weight"]
        assert not torch.equal(head, head.bfloat16().float())


def test_run_folder_keeps_what_is_needed_to_repeat_it(runs: Path) -> None:
    folder = runs / "whole-1-fp32"
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["ranks"] == 2
    assert environment["attention_op"]["name"]
    assert environment["packages"]["torch"].startswith(torch.__version__.partition("+")[0])
    zero = json.loads((folder / "deepspeed.json").read_text())["zero_optimization"]
    assert zero["stage"] == 1
    assert load_config(folder / "config.yaml").train.max_updates == UPDATES
    assert rows(folder, "eval")[-1]["images"] == 359


@pytest.fixture
def evaluate(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Evaluate:
    """Run launch/evaluate.py in this process, which has paid for the imports; its output."""

    def evaluate(*arguments: str) -> str:
        folder = str(runs / "whole-0-fp32")
        monkeypatch.setattr(sys, "argv", ["launch/evaluate.py", "--run", folder, *arguments])
        runpy.run_path("launch/evaluate.py", run_name="__main__")
        return capsys.readouterr().out

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return evaluate


def test_evaluate_scores_the_checkpoint_on_disk(runs: Path, evaluate: Evaluate) -> None:
    said = evaluate("--pipeline", "ffcv")
    assert f"top-1 {rows(runs / 'whole-0-fp32', 'eval')[-1]['top1']:.2f} %" in said
    assert "on 359 images" in said
    assert "own scores" not in said


def test_evaluate_reads_the_folder_itself(evaluate: Evaluate, digits: Path) -> None:
    scores = []
    for source in (f"{digits}/val.beton", f"{digits}/val"):
        said = evaluate(f"data.val={source}")
        assert "(pipeline timm)" in said
        assert "own scores are of pipeline ffcv, which resizes by area; timm resizes bi" in said
        scores.append(said.split(" images of ")[0])
    assert scores[0] == scores[1]


def simulate(folder: Path) -> None:
    """model.impl=fused runs on the CPU, by the simulator in this folder, from here on."""
    from tests.ops.fused_problems import SimulatedDevice, simulated

    simulator = build(folder)
    gpu = ExitStack()
    gpu.enter_context(simulator.watch())
    gpu.enter_context(simulated(SimulatedDevice(simulator.driver)))
    atexit.register(gpu.close)


@pytest.mark.slow
def test_fused_attention_under_zero_3(digits: Path, tmp_path: Path) -> None:
    """With tables that are partitioned too, which ds_configs/zero3.json leaves whole."""
    updates = 3  # the first has tables of zeros, the second what its gradients made of them
    settings = json.loads(Path("ds_configs/zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    shutil.copytree(digits / "val", tmp_path / "val", ignore=lambda _, names: sorted(names)[10:])
    build(tmp_path / "ptxsim")
    common = (
        *(f"output={tmp_path}", f"train.max_updates={updates}", "train.log_every=1"),
        *(f"data.train={digits}/train", f"data.val={tmp_path}/val", "train.global_batch=8"),
        *("data.pipeline=timm", "data.workers=1", "model.img_size=16", "model.drop_path=0"),
        *("model.options.depth=2", "model.rpe.on=qkv", "optim.lr=1e-2", "optim.warmup_epochs=0"),
        f"train.deepspeed={tmp_path}/zero3.json",
    )
    impls = ("fused", "reference")
    trainings = [((*common, f"name={impl}", f"model.impl={impl}"), "never") for impl in impls]
    ranks = Ranks(tmp_path, 2, trainings, partial(simulate, tmp_path / "ptxsim"))
    ranks.succeed(1800)
    assert "attention op fused (asked for by name)" in ranks.output()
    found, expected = (rows(tmp_path / impl, "train") for impl in impls)
    assert len(found) == updates
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=0.02)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.02)
    moments, reference = (tensors(tmp_path / impl, "exp_avg", updates) for impl in impls)
    tables = [name for name in moments if "rpe_" in name]
    assert len(tables) == 6
    assert sum(bool(moments[name].any()) for name in tables) == 5  # the class token sees one bucket
    for name in moments:
        error = (moments[name] - reference[name]).norm()
        assert error <= 0.1 * reference[name].norm() + 1e-6, name


def test_without_the_operators_it_trains_on_the_reference_and_leaves_nothing_behind(
    run: Any, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so once. Nor does DeepSpeed build any, or leave anything in shared memory.

    TensorBoard gets the pictures that it is asked for.
    """
    extensions = tmp_path / "extensions"
    extensions.mkdir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    IRPEBuilder().folder.parent.touch()  # a file where the operators' folder would be
    port = free_port()
    done = run(
        *("deepspeed", "--num_accelerators", 2, "--master_port", port, "launch/train.py"),
        *("--config", "launch/configs/quickstart.yaml", f"output={tmp_path}", "name=fallback"),
        *(f"data.train={digits}/train.beton", f"data.val={digits}/val.beton"),
        *("model.options.depth=1", "train.max_updates=2"),
        *("log.tensorboard=true", "log.images=4", "log.confusion=true", "augment.mixup=0.8"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = "attention op reference (auto: not cpu: cannot build in "
    assert (done.stdout + done.stderr).count(said) == 1
    assert (done.stdout + done.stderr).count("cannot build in ") == 1
    environment = json.loads((tmp_path / "fallback" / "environment.json").read_text())
    assert environment["attention_op"]["name"] == "reference"
    decoder = list(extensions.glob("irpe_jpeg_*"))
    assert sorted(extensions.iterdir()) == sorted([*decoder, IRPEBuilder().folder.parent])
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))
    events = EventAccumulator(str(tmp_path / "fallback/tensorboard"))
    events.Reload()
    pictures = {name: events.Images(name) for name in events.Tags()["images"]}
    assert {name: [image.step for image in found] for name, found in pictures.items()} == {
        "inputs": [0],
        "confusion": [2],
    }
