"""Optimizers beside AdamW, and frozen parameters, under every ZeRO stage: trained and resumed."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from irpe_ds.checkpoint.manifest import MOMENTS
from irpe_ds.config import load_config
from irpe_ds.models.build import build_deferred
from tests.launch.outcomes import saved, slow, tensors, zero
from tests.launch.ranks import CONFIG, Ranks, rows

pytestmark = pytest.mark.dist
UPDATES, HALF = 4, "train.max_updates=2"
FIRST_BLOCK = "model.freeze=1"
ALL_BUT_TABLES = "model.freeze=['*', '!*.rpe_?', '!head']"
CASES = {
    "lion-0": [*zero(0), "optim.name=lion"],
    "nadamw-1": [*zero(1, "bf16"), "optim.name=nadamw", FIRST_BLOCK],
    "sgd-2": [*zero(2), "optim.name=sgd", FIRST_BLOCK],
    "lion-3": [*zero(3), "optim.name=lion", "optim.weight_decay=1", ALL_BUT_TABLES],
}


FAST = ("nadamw-1", "lion-3")


@pytest.fixture(scope="module")
def trained(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of NAME, trained in one go; beside it NAME-resumed, in two."""

    @functools.cache
    def train(names: tuple[str, ...]) -> None:
        runs = []
        for name in names:
            run = [*common, *CASES[name], "train.epochs=2", f"train.max_updates={UPDATES}"]
            halved = [*run, f"name={name}-resumed"]
            runs += [([*run, f"name={name}"], "never"), ([*halved, HALF], "never")]
            runs.append((halved, "auto"))
            if name == "nadamw-1":
                thawed = [*run, "name=thawed", "model.freeze=0", "train.max_updates=5"]
                output = Path(common[0].removeprefix("output="))
                runs.append((thawed, str(output / name / f"checkpoints/update-{UPDATES:08d}")))
        Ranks(tmp_path_factory.mktemp("ranks"), 2, runs).succeed()

    def folder(name: str) -> Path:
        train(FAST if name in FAST else tuple(CASES.keys() - FAST))
        return Path(common[0].removeprefix("output=")) / name

    return folder


@pytest.mark.parametrize("name", [name if name in FAST else slow(name) for name in CASES])
def test_a_resumed_run_has_the_same_bits(name: str, trained: Callable[[str], Path]) -> None:
    whole = trained(name)
    resumed = whole.with_name(f"{name}-resumed")
    assert rows(whole, "train") == rows(resumed, "train")
    for kind in ("weights", "ema", *MOMENTS[name.partition("-")[0]]):  # type: ignore[index]
        expected, got = (tensors(folder, kind, UPDATES) for folder in (whole, resumed))
        assert expected
        assert all(torch.equal(expected[key], got[key]) for key in expected.keys() | got.keys())


@pytest.mark.parametrize("name", [name if name in FAST else slow(name) for name in CASES])
def test_the_frozen_stay_and_have_no_moments(
    name: str, trained: Callable[[str], Path], common: list[str]
) -> None:
    config = load_config(CONFIG, [*common, *CASES[name]])
    model, initial = build_deferred(config.model, config.seed)
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert any(key.startswith("blocks.0") for key in frozen) == (name != "lion-0")
    weights = tensors(trained(name), "weights", UPDATES)
    path = trained(name) / f"checkpoints/update-{UPDATES:08d}"
    for kind in ("ema", *MOMENTS[config.optim.name]):
        assert saved(path, kind).keys() == weights.keys() - frozen
    for key, tensor in weights.items():
        if "rpe_" not in key:  # the last block's stay zero
            first = initial.read(key)  # what is frozen in a model in bf16 is so itself
            is_first = any(torch.equal(tensor, x) for x in (first, first.bfloat16().float()))
            assert is_first == (key in frozen), key


def test_what_was_frozen_may_be_trained_later(trained: Callable[[str], Path]) -> None:
    """Without moments or an average, which start from its weights."""
    frozen = trained("nadamw-1")
    thawed = frozen.with_name("thawed")
    before, after = tensors(frozen, "weights", UPDATES), tensors(thawed, "weights", UPDATES + 1)
    averages = tensors(thawed, "ema", UPDATES + 1)
    assert averages.keys() == tensors(thawed, "exp_avg", UPDATES + 1).keys() == before.keys()
    for name in ("pos_embed", "blocks.0.attn.qkv.weight"):
        assert not torch.equal(before[name], after[name])
        torch.testing.assert_close(averages[name], before[name], rtol=0, atol=1e-3)
