"""What records a model to run elsewhere: PyTorch's tracers, ONNX, timm's feature extractors."""

import pytest
import timm
import torch
from timm.models import FeatureGraphNet, VisionTransformer

from irpe_ds import equip
from irpe_ds.errors import ConfigError
from irpe_ds.rpe.config import RPEConfig

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


def model(impl: str, method: str = "product") -> VisionTransformer:
    options = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
    vit = timm.create_model("vit_tiny_patch16_224", **options)
    rpe = RPEConfig(method=method, on="qk" if method == "cross" else "qkv")
    for name, parameter in equip(vit, rpe, impl).named_parameters():
        if "lookup_table" in name:
            torch.nn.init.normal_(parameter)
    return vit.eval()


@pytest.mark.parametrize(
    ("impl", "method"), [("auto", "product"), ("gather", "product"), ("low_rank", "cross")]
)
def test_jit_trace(impl: str, method: str) -> None:
    vit = model(impl, method)
    traced = torch.jit.trace(vit, IMAGES)
    torch.testing.assert_close(traced(IMAGES.flip(2)), vit(IMAGES.flip(2)))
    foreign = {node.kind() for node in traced.inlined_graph.nodes() if "irpe" in node.kind()}
    assert bool(foreign) == (impl != "auto")  # auto: it runs where irpe_ds is not installed


@pytest.mark.parametrize("impl", ["auto", "cpu"])
def test_torch_export(impl: str) -> None:
    vit = model(impl)
    exported = torch.export.export(vit, (IMAGES,)).module()
    torch.testing.assert_close(exported(IMAGES.flip(2)), vit(IMAGES.flip(2)))


def test_what_cannot_be_recorded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "^impl: expected auto or impl=\"reference\" under torch.jit.trace, got 'cpu'$"
    with pytest.raises(ConfigError, match=expected):
        torch.jit.trace(model("cpu"), IMAGES)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for impl in ("cpu", "gather"):
        with pytest.raises(ConfigError, match=r'impl="reference" under ONNX export, got '):
            model(impl)(IMAGES)
    vit = model("auto")
    exported = torch.export.export(vit, (IMAGES,))
    assert not [node for node in exported.graph.nodes if "irpe_ds" in str(node.target)]


def test_timm_s_feature_extractor() -> None:
    vit = model("cpu")
    (features,) = FeatureGraphNet(vit, out_indices=(1,))(IMAGES)
    (expected,) = vit.forward_intermediates(IMAGES, [1], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(features[:, 1:], expected)


def test_torch_fx() -> None:
    expected = "^x: expected a tensor: torch.export or timm's create_feature_extractor can trace it"
    with pytest.raises(ConfigError, match=expected):
        torch.fx.symbolic_trace(model("cpu"))
