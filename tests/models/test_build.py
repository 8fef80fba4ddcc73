"""From a configuration to a model, and from a file to its weights."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import ResNet
from torch import nn

from irpe_ds.config import ModelConfig
from irpe_ds.errors import ConfigError
from irpe_ds.models import RPEAttention, pretrained
from irpe_ds.models.build import build_model
from irpe_ds.rpe.config import RPEConfig

ZOO_K = "deit_tiny_patch16_224_ctx_product_50_shared_k"
DEIT = "deit_tiny_patch16_224"
NARROW = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def config(name: str = ZOO_K, **values: Any) -> ModelConfig:
    """Two narrow blocks on 64 x 64 pixels, ten classes."""
    return ModelConfig(
        **{"img_size": 64, "num_classes": 10, "options": NARROW, **values}, name=name
    )


def randomised(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval()


class TestBuild:
    def test_any_model_of_timm(self) -> None:
        model = build_model(ModelConfig(name="resnet18", num_classes=10, img_size=64))
        assert isinstance(model, ResNet)
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)

    def test_the_zoo(self) -> None:
        model = build_model(config(drop_path=0.1))
        assert isinstance(model.blocks[0].attn, RPEAttention)
        assert model.patch_embed.grid_size == (4, 4)
        assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.1)
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)

    def test_a_model_of_timm_equipped(self) -> None:
        rpe = RPEConfig(method="cross", on="qkv")
        model = build_model(config(DEIT, rpe=rpe, impl="reference", img_size=(32, 64)))
        assert model.blocks[1].attn.impl == "reference"
        assert "blocks.1.attn.rpe_v.rp_cols.lookup_table_weight" in model.state_dict()
        assert model(torch.randn(2, 3, 32, 64)).shape == (2, 10)

    def test_only_the_model_asked_for_has_an_encoding(self) -> None:
        assert not any("rpe" in key for key in build_model(config(DEIT)).state_dict())

    @pytest.mark.parametrize(
        ("values", "where", "expected", "got"),
        [
            ({"name": "deit_tinny_patch16_224"}, "model.name", "a timm model", f"mean {DEIT}?"),
            ({"name": "alexnet!!"}, "model.name", "a timm model name", "'alexnet!!'"),
            ({"options": {"bogus": 1}}, "model", "arguments that", "'bogus'"),
            ({"options": {"embed_dim": 50}}, "model", "arguments that", "divisible"),
            ({"options": {"img_size": 50}}, "model.options", "a key of its own", "img_size"),
            ({"options": {"checkpoint_path": "x"}}, "model.options", "a key of its own", "checkp"),
            ({"impl": "fast", "rpe": RPEConfig(), "name": DEIT}, "model.impl", "auto or", "'fast'"),
            ({"rpe": RPEConfig()}, "model.rpe", "without relative position", "VisionTransformer"),
            ({"options": {"in_chans": 1}}, "model.options", "RGB images of 64x64", "channel"),
            ({"options": {"global_pool": ""}}, "model.options", "classifies", "(1, 17, 10), not"),
            ({"options": {"features_only": True}}, "model.options", "classifies", "outputs ()"),
        ],
    )
    def test_mistakes(self, values: dict[str, Any], where: str, expected: str, got: str) -> None:
        with pytest.raises(ConfigError) as caught:
            build_model(config(**values))
        assert caught.value.where == where
        assert expected in caught.value.expected
        assert got in str(caught.value.got)

    @pytest.mark.parametrize(
        ("every", "again"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])]
    )
    @pytest.mark.parametrize("name", [ZOO_K, DEIT])
    def test_activations_computed_again_give_the_same_gradients(
        self, name: str, every: int, again: list[int]
    ) -> None:
        options = NARROW | {"attn_drop_rate": 0.1, "depth": 5}
        images = torch.randn(2, 3, 64, 64)
        gradients = []
        for nth, recomputed in ((0, []), (every, again)):
            torch.manual_seed(1)
            model = build_model(
                config(name, drop_path=0.5, options=options, grad_checkpointing=nth)
            )
            calls: list[int] = []
            for n, block in enumerate(model.blocks):
                block.attn.register_forward_hook(lambda *_, n=n, calls=calls: calls.append(n))
            model.train()(images).square().sum().backward()
            assert sorted(calls) == sorted([*range(5), *recomputed])
            gradients.append({key: p.grad for key, p in model.named_parameters()})
        torch.testing.assert_close(*gradients, rtol=0, atol=0)

    def test_a_model_that_cannot_compute_them_again(self) -> None:
        for name, every, expected in (("dla34", 1, "false: dla34"), ("resnet18", 2, "true or")):
            with pytest.raises(ConfigError, match=rf"^model\.grad_checkpointing: .* {expected}"):
                build_model(ModelConfig(name=name, grad_checkpointing=every))

    @pytest.mark.parametrize("name", [ZOO_K, DEIT])
    def test_an_implementation_that_cannot_run_is_an_error(self, name: str) -> None:
        with pytest.raises(ConfigError, match=r"^model\.impl: expected .*, got "):
            build_model(config(name, impl="fast"))

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            (f"{DEIT}.no_such_tag", {}),
            (DEIT, {"depth": -1}),
            (DEIT, {"act_layer": "no_such_layer"}),
            (DEIT, {"patch_size": 0}),
        ],
    )
    def test_whatever_timm_raises_is_a_mistake_of_the_section(
        self, name: str, options: dict[str, Any]
    ) -> None:
        with pytest.raises(ConfigError, match=r"^model: expected arguments that .*, got "):
            build_model(config(name, options=NARROW | options))


class TestLoad:
    @pytest.fixture
    def source(self) -> nn.Module:
        return randomised(build_model(config(rpe=None)))

    @pytest.fixture
    def save(self, tmp_path: Path) -> Callable[[Any], Path]:
        def save(content: Any) -> Path:
            torch.save(content, tmp_path / "weights.pth")
            return tmp_path / "weights.pth"

        return save

    def test_a_released_checkpoint(self, source: nn.Module, save: Callable) -> None:
        args = argparse.Namespace(model=ZOO_K, lr=5e-4)
        path = save({"model": source.state_dict(), "args": args, "epoch": 3})
        model = build_model(config(weights=path))
        torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)

    def test_safetensors(self, source: nn.Module, tmp_path: Path) -> None:
        path = tmp_path / "weights.safetensors"
        save_file(source.state_dict(), path)
        model = build_model(config(weights=path))
        torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)

    @pytest.mark.parametrize("size", [(384, 384), (192, 256)])
    def test_another_grid(self, size: tuple[int, int], save: Callable) -> None:
        """Positions are interpolated, the offsets that tables stand for are the same offsets."""
        source = randomised(build_model(config(img_size=224)))
        model = build_model(config(img_size=size, weights=save({"model": source.state_dict()})))
        grid = [size[0] // 16, size[1] // 16]
        expected = resample_abs_pos_embed(source.pos_embed.data, grid, [14, 14])
        torch.testing.assert_close(model.pos_embed.data, expected)
        for key, weight in model.state_dict().items():
            assert key == "pos_embed" or torch.equal(weight, source.state_dict()[key]), key
        assert model(torch.randn(2, 3, *size)).isfinite().all()

    def test_a_model_without_encoding(self, save: Callable) -> None:
        source = randomised(build_model(ModelConfig(name="resnet18", num_classes=10)))
        path = save({"state_dict": source.state_dict()})
        model = build_model(ModelConfig(name="resnet18", num_classes=10, weights=path))
        torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("other", "got"),
        [
            (config(options=NARROW | {"depth": 1}), "no tensor blocks.1."),
            (config(options=NARROW | {"depth": 3}), "an unexpected tensor blocks.2."),
            (config(num_classes=7), "head.(weight|bias) of shape .*7.*, not .*10"),
            (ModelConfig(name="resnet18"), "(no|an extra) tensor"),
        ],
        ids=["shallower", "deeper", "other classes", "resnet18"],
    )
    def test_another_model_s_weights(self, other: ModelConfig, got: str, save: Callable) -> None:
        path = save(build_model(other).state_dict())
        with pytest.raises(
            ConfigError, match=rf"^model\.weights: expected the weights.*, got .* with {got}"
        ):
            build_model(config(weights=path))

    def test_another_number_of_classes_is_told_what_to_do(self, save: Callable) -> None:
        path = save(build_model(config(num_classes=7)).state_dict())
        with pytest.raises(
            ConfigError, match=r"not \(10, 48\) \(model\.new_head=true reinitialises"
        ):
            build_model(config(weights=path))

    @pytest.mark.parametrize(
        ("name", "heads"),
        [
            (ZOO_K, ("head",)),
            ("deit_tiny_distilled_patch16_224", ("head", "head_dist")),
            ("resnet18", ("fc",)),
        ],
    )
    @pytest.mark.parametrize("classes", [7, 10])
    def test_a_new_head(
        self,
        name: str,
        heads: tuple[str, ...],
        classes: int,
        save: Callable,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Also in place of one for as many classes."""
        options = {} if name == "resnet18" else NARROW
        values = {"img_size": 64, "options": options}
        source = randomised(build_model(ModelConfig(name=name, num_classes=classes, **values)))
        path = save(source.state_dict())
        torch.manual_seed(3)
        fresh = build_model(ModelConfig(name=name, num_classes=10, **values)).state_dict()
        torch.manual_seed(3)
        model = build_model(
            ModelConfig(name=name, num_classes=10, weights=path, new_head=True, **values)
        )
        for key, weight in model.state_dict().items():
            expected = fresh if key.split(".")[0] in heads else source.state_dict()
            assert torch.equal(weight, expected[key]), key
        assert all(f"{head}.weight" in caplog.text for head in heads)

    def test_a_new_head_needs_a_body(self) -> None:
        with pytest.raises(ValueError, match=r"without model\.weights"):
            config(new_head=True)

    def test_weights_with_other_prefix_tokens(self, save: Callable) -> None:
        distilled = config("deit_tiny_distilled_patch16_224", img_size=96)
        path = save(build_model(distilled).state_dict())
        with pytest.raises(ConfigError, match=r"^model\.weights: expected .* of this Vision"):
            build_model(config(DEIT, img_size=96, weights=path))

    def test_plain_weights_leave_the_tables_at_zero(
        self, save: Callable, caplog: pytest.LogCaptureFixture
    ) -> None:
        plain = randomised(build_model(config(DEIT)))
        model = build_model(config(weights=save(plain.state_dict()))).eval()
        assert not model.blocks[1].attn.rpe_k.lookup_table_weight.any()
        images = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(model(images), plain(images), rtol=1e-4, atol=1e-4)
        assert "start at zero" in caplog.text

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("weights.pth", b"garbage"),
            ("weights.pth", b""),
            ("weights.safetensors", b"garbage"),
            ("weights.safetensors", b""),
        ],
    )
    def test_a_broken_file(self, name: str, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"^model\.weights: expected a readable") as caught:
            build_model(config(weights=path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_no_file(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        with pytest.raises(ConfigError, match=r"^model\.weights: expected a .* file, got nothing"):
            build_model(config(weights=path))

    @pytest.mark.parametrize(
        "content",
        [
            [1, 2],
            {3: 4},
            {"epoch": 3},
            {"pos_embed": "x"},
        ],
    )
    def test_no_weights_in_the_file(self, content: Any, save: Callable) -> None:
        with pytest.raises(ConfigError, match=r"^model\.weights: expected "):
            build_model(config(weights=save(content)))

    def test_code_in_a_pickle_is_not_run(self, tmp_path: Path, save: Callable) -> None:
        victim = tmp_path / "victim"
        path = save({"model": Touch(victim)})
        with pytest.raises(ConfigError, match=r"^model\.weights: expected a readable"):
            build_model(config(weights=path))
        assert not victim.exists()

    @pytest.mark.parametrize(
        ("name", "key"),
        [(DEIT, "pretrained"), (DEIT, "options.pretrained"), (ZOO_K, "options.pretrained")],
    )
    def test_pretrained_without_a_network(
        self, name: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise URLError("no route")

        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(pretrained, "urlopen", fail)
        monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
        monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda *_, **__: None)
        own = key == "pretrained"
        options = NARROW if own else NARROW | {"pretrained": True}
        with pytest.raises(ConfigError) as caught:
            build_model(config(name, options=options, pretrained=own))
        anew = f"model.{key}=false to start anew, or model.weights=FILE of {name}"
        expected = f"expected a network, {anew}"
        assert str(caught.value) == f"model.{key}: {expected}, got <urlopen error no route>"

    def test_pretrained(
        self, source: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A released file, with its `args`, as timm finds it in its download cache."""
        cache = tmp_path / "hub" / "checkpoints"
        cache.mkdir(parents=True)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        content = {"model": source.state_dict(), "args": argparse.Namespace(model=ZOO_K)}
        torch.save(content, cache / f"{ZOO_K}.pth")
        model = timm.create_model(ZOO_K, pretrained=True, num_classes=10, img_size=64, **NARROW)
        key = "blocks.0.attn.rpe_k.lookup_table_weight"
        assert torch.equal(model.state_dict()[key], source.state_dict()[key])


class Touch:
    """Unpickled as code, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)
