"""Weights keep what their positions mean, on other grids too, or are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from irpe_ds.config import ModelConfig
from irpe_ds.errors import ConfigError
from irpe_ds.models.build import build_model
from irpe_ds.models.positions import KEY, Positions
from irpe_ds.rpe.config import RPEConfig

DEIT, DISTILLED = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
ROTARY = "vit_small_patch16_rope_ape_224"
NARROW = {"depth": 1, "embed_dim": 8, "num_heads": 2}
Grid = tuple[int, int]


def config(grid: Grid, name: str = DEIT, **values: Any) -> ModelConfig:
    size = (16 * grid[0], 16 * grid[1])
    return ModelConfig(name=name, img_size=size, num_classes=3, options=NARROW, **values)


def ramps(grid: Grid) -> Tensor:
    """(L, 2): row and column of every patch, as a share of height and width."""
    rows, columns = ((torch.arange(n) + 0.5) / n for n in grid)
    return torch.cartesian_prod(rows, columns)


Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Saves weights; says what their positions are, or not."""

    def save(model: nn.Module, *, says: bool = True) -> Path:
        said = {KEY: Positions.of(model).to_json()} if says else {}
        torch.save({"model": model.state_dict(), **said}, tmp_path / "x.pth")
        return tmp_path / "x.pth"

    return save


PAIRS = [
    ((4, 9), (8, 18)),
    ((6, 6), (4, 9)),
    ((4, 9), (6, 6)),
    ((6, 12), (12, 6)),
    ((6, 12), (12, 24)),
    ((16, 36), (32, 72)),
    ((24, 48), (48, 96)),
    ((8, 18), (4, 9)),
]


class TestGrid:
    @pytest.mark.parametrize(
        ("name", "old", "new"),
        [
            *((DEIT, *pair) for pair in PAIRS),
            *((name, *pair) for name in (DISTILLED, ROTARY) for pair in PAIRS[:2]),
        ],
    )
    def test_every_patch_still_knows_its_place(
        self, name: str, old: Grid, new: Grid, save: Save
    ) -> None:
        source = build_model(config(old, name))
        prefix = 0 if source.no_embed_class else source.num_prefix_tokens
        source.pos_embed.data[0, prefix:, :2] = ramps(old)
        model = build_model(config(new, name, weights=save(source)))
        assert torch.equal(model.pos_embed[:, :prefix], source.pos_embed[:, :prefix])
        off = (model.pos_embed[0, prefix:, :2] - ramps(new)).abs().max()
        assert off < 0.03

    @pytest.mark.parametrize("says", [True, False])
    @pytest.mark.parametrize(
        ("old", "new"), [((14, 14), (14, 56)), ((14, 14), (24, 24)), ((6, 6), (8, 9))]
    )
    def test_squares_are_interpolated_as_by_timm(
        self, old: Grid, new: Grid, says: bool, save: Save
    ) -> None:
        """Said or not: 14x14 is what DeiT was released for, which 14x56 could be the shape of."""
        source = build_model(config(old))
        nn.init.normal_(source.pos_embed)
        model = build_model(config(new, weights=save(source, says=says)))
        expected = resample_abs_pos_embed(source.pos_embed.data, [*new], [*old])
        torch.testing.assert_close(model.pos_embed.data, expected)

    @pytest.mark.parametrize("grid", [(2, 8), (7, 28), (4, 4)])
    def test_the_same_grid(self, grid: Grid, save: Save) -> None:
        source = build_model(config(grid))
        model = build_model(config(grid, weights=save(source)))
        assert torch.equal(model.pos_embed, source.pos_embed)

    @pytest.mark.parametrize(
        ("old", "new"),
        [pair for pair in PAIRS if pair[0] != (6, 6) and pair[1] != (6, 6)]
        + [((6, 6), (4, 9)), ((6, 12), (6, 12)), ((2, 8), (4, 16))],
    )
    def test_a_grid_that_could_be_another_is_refused(
        self, old: Grid, new: Grid, save: Save
    ) -> None:
        path = save(build_model(config(old)), says=False)
        with pytest.raises(
            ConfigError, match=rf"^model\.weights: expected a file that says its grid.*{path}"
        ):
            build_model(config(new, weights=path))

    def test_a_file_that_contradicts_itself(self, save: Save) -> None:
        path = save(build_model(config((4, 9))))
        content = torch.load(path)
        content[KEY] = content[KEY].replace("9", "8")
        torch.save(content, path)
        with pytest.raises(ConfigError, match="pos_embed of 4x8 patches, as the file says, got"):
            build_model(config((4, 9), weights=path))

    @pytest.mark.parametrize("said", ["", "{}", "[1]", 3, '{"grid": "x"}'])
    def test_nonsense(self, said: object, save: Save) -> None:
        path = save(build_model(config((4, 9))))
        torch.save({**torch.load(path), KEY: said}, path)
        with pytest.raises(ConfigError, match=rf"^model\.weights: {path}: positions"):
            build_model(config((4, 9), weights=path))

    def test_biases_by_offset_stay_on_their_grid(self, save: Save) -> None:
        """6x12 and 12x6 have as many offsets; timm's BEiT has a table of them per block."""
        beit = {"name": "beit_base_patch16_224"}
        path = save(build_model(config((6, 12), **beit)))
        build_model(config((6, 12), weights=path, **beit))
        with pytest.raises(ConfigError, match=r"a grid of 12x6 patches, got .* with 6x12"):
            build_model(config((12, 6), weights=path, **beit))


class TestEncoding:
    @pytest.mark.parametrize(
        ("there", "here", "expected", "got"),
        [
            (
                RPEConfig(method="euclidean", ratio=20),
                RPEConfig(method="quantization", ratio=20.4),
                "method quantization, ratio 20.4",
                "method euclidean, ratio 20.0",
            ),
            (RPEConfig(ratio=1.9), RPEConfig(ratio=1.6), "ratio 1.6", "ratio 1.9"),
            (RPEConfig(on="qk"), RPEConfig(on="k"), "on k", "on kq"),
            (RPEConfig(), RPEConfig(mode="bias"), "mode bias", "mode contextual"),
            (RPEConfig(), RPEConfig(shared_heads=False), "shared_heads False", "shared_heads True"),
        ],
    )
    def test_another_one_is_refused(
        self, there: RPEConfig, here: RPEConfig, expected: str, got: str, save: Save
    ) -> None:
        path = save(build_model(config((4, 4), rpe=there)))
        message = f"expected the encoding of model.rpe, {expected}, got {path} with {got}"
        with pytest.raises(ConfigError, match=rf"^model\.weights: {message}$"):
            build_model(config((4, 4), rpe=here, weights=path))

    def test_none_in_the_model(self, save: Save) -> None:
        path = save(build_model(config((4, 4), rpe=RPEConfig())))
        with pytest.raises(ConfigError, match=r"expected no relative position .* method product"):
            build_model(config((4, 4), weights=path))

    def test_the_same_in_other_words(self, save: Save) -> None:
        source = build_model(config((4, 4), rpe=RPEConfig(on="qk", method="cross", ratio=20)))
        same = RPEConfig(on="kq", method="cross", ratio=20.0)
        model = build_model(config((6, 4), rpe=same, weights=save(source)))
        assert Positions.of(model).grid == (6, 4)

    def test_none_in_the_file(self, save: Save, caplog: pytest.LogCaptureFixture) -> None:
        path = save(build_model(config((4, 4))))
        build_model(config((4, 4), rpe=RPEConfig(), weights=path))
        assert "start at zero" in caplog.text

    def test_other_prefix_tokens(self, save: Save) -> None:
        path = save(build_model(config((4, 4), DISTILLED)))
        with pytest.raises(ConfigError, match=r"expected 1 prefix tokens, got .* with 2"):
            build_model(config((4, 4), weights=path))


def test_said_and_read_again() -> None:
    for rpe in (None, RPEConfig(on="qk")):
        positions = Positions.of(build_model(config((2, 3), rpe=rpe)))
        assert Positions.parse(positions.to_json(), "x") == positions
    resnet = build_model(ModelConfig(name="resnet18", img_size=32, num_classes=3))
    assert Positions.of(resnet) == Positions(grid=None, prefix_tokens=0, encoding=None)
