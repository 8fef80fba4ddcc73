"""First values: distributed as timm says, drawn one at a time, functions of seed and name."""

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from irpe_ds.config import ModelConfig
from irpe_ds.errors import ConfigError
from irpe_ds.models.build import build_deferred, build_model, load_weights
from irpe_ds.models.deferred import Initial, defer, materialize, replace_parameters
from irpe_ds.rpe.config import RPEConfig

ZOO_K = "deit_tiny_patch16_224_ctx_product_50_shared_k"
DEIT = "deit_tiny_patch16_224"
EVA = "eva02_tiny_patch14_224"
NARROW = {"depth": 2, "embed_dim": 96, "num_heads": 3}
CONFIGS = {
    "zoo": ModelConfig(name=ZOO_K, img_size=64, options=NARROW),
    "bias": ModelConfig(name=DEIT, rpe=RPEConfig(method="cross", mode="bias"), options=NARROW),
    "progressive": ModelConfig(
        name=DEIT, rpe=RPEConfig(on="qkv"), img_size=64, resolutions=[(0, 32)], options=NARROW
    ),
    "layer scale": ModelConfig(name="deit3_small_patch16_224", options=NARROW),
    "distilled": ModelConfig(name="deit_tiny_distilled_patch16_224", options=NARROW),
    "registers": ModelConfig(name="vit_small_patch14_reg4_dinov2", options=NARROW, img_size=56),
    "fixed by depth": ModelConfig(name=DEIT, options=NARROW | {"fix_init": True}),
    "jax": ModelConfig(name=DEIT, options=NARROW | {"weight_init": "jax"}),
    "moco": ModelConfig(name=DEIT, options=NARROW | {"weight_init": "moco"}),
    "beit": ModelConfig(name="beit_base_patch16_224", options=NARROW),
    "eva": ModelConfig(name=EVA, options={"depth": 2}),
    "swin": ModelConfig(name="swin_tiny_patch4_window7_224", options={"depths": (1, 1, 1, 1)}),
    "convolutions": ModelConfig(name="resnet18", num_classes=10),
    "values read": ModelConfig(name="hiera_tiny_224", options={"stages": (1, 1, 1, 1)}),
}


def reference(config: ModelConfig) -> nn.Module:
    """The same model built as timm builds it, with nothing recorded."""
    built: list[nn.Module] = []

    def build_now(build: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, Initial]:
        built.append(build())
        return built[0], Initial()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("irpe_ds.models.build.defer", build_now)
        build_deferred(config, 0)
    return built[0]


def values(model: nn.Module, initial: Initial) -> dict[str, Tensor]:
    return {name: initial.read(name) for name, _ in model.named_parameters()}


def assert_like(got: Tensor, one: Tensor, two: Tensor, name: str) -> None:
    """`got` is drawn from the distribution that `one` and `two` are."""
    assert (got.shape, got.dtype) == (one.shape, one.dtype), name
    if torch.equal(one, two):  # nothing random
        assert torch.equal(got, one), name
        return
    error, std = 7 / one.numel() ** 0.5, float(one.std())
    assert float(got.mean()) == pytest.approx(float(one.mean()), abs=error * std), name
    assert float(got.std()) == pytest.approx(std, rel=error), name
    assert got.abs().max() <= 1.8 * max(one.abs().max(), two.abs().max()), name


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


class TestValues:
    def test_they_are_those_of_timm(
        self, config: ModelConfig, caplog: pytest.LogCaptureFixture
    ) -> None:
        model, initial = build_deferred(config, 1)
        assert "as a whole" not in caplog.text
        one, two = reference(config), reference(config)
        assert list(dict(model.named_parameters())) == list(dict(one.named_parameters()))
        others = dict(two.named_parameters())
        for name, parameter in one.named_parameters():
            assert_like(initial.read(name), parameter.data, others[name].data, name)
        for (name, buffer), expected in zip(model.named_buffers(), one.buffers(), strict=True):
            assert torch.equal(buffer, expected), name

    def test_they_are_functions_of_seed_and_name(self, config: ModelConfig) -> None:
        model, initial = build_deferred(config, 1)
        assert all(parameter.is_meta for parameter in model.parameters())
        first = values(model, initial)
        torch.manual_seed(7)
        again, other = build_deferred(config, 1)[1], build_deferred(config, 2)[1]
        alone = {name: again.read(name) for name in reversed(first)}
        for name, value in first.items():
            assert torch.equal(value, alone[name]), name
            assert torch.equal(value, initial.read(name)), name
        drawn = [value for name, value in first.items() if not torch.equal(value, other.read(name))]
        assert len({value.numpy().tobytes() for value in drawn}) == len(drawn) > 0

    def test_no_generator_is_moved(self) -> None:
        state = torch.get_rng_state()
        values(*build_deferred(CONFIGS["zoo"], 1))
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_model_has_the_values_of_pytorch_s_seed(self) -> None:
        built = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            built.append([p.detach().clone() for p in build_model(CONFIGS["zoo"]).parameters()])
        assert all(map(torch.equal, built[0], built[1]))
        assert not torch.equal(built[0][0], built[2][0])


class TestMemory:
    def test_one_parameter_at_a_time(self) -> None:
        config = ModelConfig(name="vit_base_patch16_224", rpe=RPEConfig(on="qkv"))
        built: list[Any] = []
        whole = peak_bytes(lambda: built.append(reference(config)))
        sizes = [4 * parameter.numel() for parameter in built.pop().parameters()]
        assert whole > sum(sizes)

        def read() -> None:
            model, initial = build_deferred(config, 1)
            for name, _ in model.named_parameters():
                initial.read(name)

        # + position embedding, maps of offsets
        assert peak_bytes(read) < 1.5 * max(sizes) < 0.05 * sum(sizes)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that tensors held at a time, over those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate(change for _, change in sorted(changes, key=lambda c: c[0])))


class Pair(nn.Module):
    """Two layers that share a weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.two.bias.requires_grad_(False)
        self.one.bias.tag = "kept"  # type: ignore[attr-defined]
        self.register_buffer("mean", torch.arange(3.0))


class TestParameters:
    def test_sharing_order_and_attributes_stay(self) -> None:
        model, initial = defer(Pair, 1)
        assert model.two.weight is model.one.weight
        materialize(model, initial)
        assert model.two.weight is model.one.weight
        names = ["one.weight", "one.bias", "two.bias"]
        assert [name for name, _ in model.named_parameters()] == names
        assert [p.requires_grad for p in model.parameters()] == [True, True, False]
        assert type(model.one.bias) is nn.Parameter
        assert vars(model.one.bias) == {"tag": "kept"}
        assert torch.equal(model.mean, torch.arange(3.0))
        assert 0 < model.one.weight.abs().max() <= 3**-0.5

    def test_a_caller_makes_them(self) -> None:
        model, initial = defer(Pair, 1)
        made: list[str] = []

        def make(name: str, parameter: nn.Parameter) -> nn.Parameter:
            made.append(name)
            return nn.Parameter(initial.read(name).double(), parameter.requires_grad)

        replace_parameters(model, make)
        assert made == ["one.weight", "one.bias", "two.bias"]
        assert model.two.weight.dtype == torch.float64

    def test_parts_are_written_one_by_one(self) -> None:
        class Parts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.empty(3, 4))
                for row, part in enumerate(self.weight.data.unbind()):
                    nn.init.constant_(part, row)
                self.weight.data.t()[1].mul_(2).add_(torch.ones(3))

        expected = [[0, 1, 0, 0], [1, 3, 1, 1], [2, 5, 2, 2]]
        assert values(*defer(Parts, 1))["weight"].tolist() == expected

    def test_what_a_model_computes_with_is_what_is_read(self) -> None:
        class Copied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.empty(4).normal_())
                nn.init.normal_(self.weight)
                self.register_buffer("norm", self.weight.detach().norm())
                self.twice = nn.Parameter(2 * self.weight.detach())
                self.weight.data.mul_(3)

        model, initial = defer(Copied, 1)
        first = values(model, initial)
        torch.testing.assert_close(model.norm, first["weight"].norm() / 3)
        torch.testing.assert_close(first["twice"], 2 * first["weight"] / 3)


def read_by_numpy(module: Any) -> None:
    module.scale = float(module.weight.detach().numpy().std())


def write_to_the_original(module: Any) -> None:
    weight = nn.Parameter(torch.empty(64))
    module.weight = weight
    nn.init.normal_(weight)


def write_to_the_memory(module: Any) -> None:
    memory = torch.empty(64)
    module.weight = nn.Parameter(memory)
    memory.normal_()


def ask_forgiveness(module: Any) -> None:
    with contextlib.suppress(RuntimeError):
        module.part = nn.Parameter(module.weight.data[:2])


def view_of_another(module: Any) -> None:
    module.part = nn.Parameter(module.weight.data[:2])


class TestWhole:
    """What cannot be recorded: the whole model is initialised."""

    @pytest.mark.parametrize(
        "act",
        [
            read_by_numpy,
            write_to_the_original,
            write_to_the_memory,
            view_of_another,
            ask_forgiveness,
            lambda module: module.weight.data.resize_(2, 32),
            lambda module: module.register_buffer("part", module.weight.data[1:]),
        ],
    )
    def test_values_are_those_of_the_whole(
        self, act: Callable[[Any], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.empty(64))
                nn.init.uniform_(self.weight)
                act(self)

        model, initial = defer(Model, 1)
        assert "Model is initialised as a whole" in caplog.text
        torch.manual_seed(1)
        for name, parameter in Model().named_parameters():
            assert torch.equal(initial.read(name), parameter), name
        assert all(parameter.is_meta for parameter in model.parameters())

    def test_a_mistake_is_the_model_s_own(self) -> None:
        with pytest.raises(ZeroDivisionError):
            defer(lambda: nn.Linear(1 // 0, 1), 1)


class TestWeights:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        model = build_model(ModelConfig(name=DEIT, img_size=224, options=NARROW))
        save_file(model.state_dict(), tmp_path / "weights.safetensors")
        return tmp_path / "weights.safetensors"

    def test_a_tensor_is_read_when_the_parameter_is(self, path: Path) -> None:
        _, initial = build_deferred(ModelConfig(name=DEIT, options=NARROW, weights=path), 1)
        before = load_file(path)["blocks.1.attn.qkv.weight"].numpy().tobytes()
        content = path.read_bytes()
        assert content.count(before) == 1
        with path.open("r+b") as file:
            file.seek(content.index(before))
            file.write(bytes(len(before)))
        assert not initial.read("blocks.1.attn.qkv.weight").any()

    def test_file_and_own_values(self, path: Path) -> None:
        """Another grid, no tables and a new head; in half precision, into fp32."""
        state = {key: value.half() for key, value in load_file(path).items()}
        save_file(state, path)
        rpe = RPEConfig(on="k")
        config = ModelConfig(name=DEIT, img_size=96, options=NARROW, rpe=rpe, num_classes=7)
        config = config.model_copy(update={"weights": path, "new_head": True})
        first = values(*build_deferred(config, 1))
        plain = values(*build_deferred(config.model_copy(update={"weights": None}), 1))
        expected = resample_abs_pos_embed(state.pop("pos_embed"), [6, 6], [14, 14])
        assert torch.equal(first.pop("pos_embed"), expected.float())
        for name, value in first.items():
            own = "lookup_table" in name or name.startswith("head.")
            assert torch.equal(value, plain[name] if own else state[name].float()), name

    def test_buffers_are_read_at_once(self, tmp_path: Path) -> None:
        config = ModelConfig(name="resnet18", num_classes=10)
        source = build_model(config)
        for buffer in source.buffers():
            buffer.copy_(torch.randint(1, 9, buffer.shape))
        path = tmp_path / "weights.safetensors"
        save_file(source.state_dict(), path)
        model, initial = build_deferred(config, 1)
        load_weights(model, path, "--weights", initial=initial)
        assert all(map(torch.equal, model.buffers(), source.buffers()))
        materialize(model, initial)
        assert all(map(torch.equal, model.parameters(), source.parameters()))

    def test_weights_of_another_model_are_told_before_any_is_read(self, path: Path) -> None:
        config = ModelConfig(name=DEIT, options=NARROW | {"depth": 3}, weights=path)
        with pytest.raises(ConfigError, match=r"^model\.weights: .* with no tensor blocks\.2"):
            build_deferred(config, 1)


def test_every_encoding_is_recorded(caplog: pytest.LogCaptureFixture) -> None:
    for name in timm.list_models("*_ctx_*"):
        build_deferred(ModelConfig(name=name, options={"depth": 1}), 1)
    assert "as a whole" not in caplog.text
