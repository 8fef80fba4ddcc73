"""What records a model to run elsewhere: PyTorch's tracers, ONNX, timm's feature extractors."""

from pathlib import Path

import pytest
import timm
import torch
from timm.models import FeatureGraphNet, VisionTransformer
from torch.export import ExportedProgram

from irpe_ds import equip
from irpe_ds.errors import ConfigError
from irpe_ds.rpe.config import RPEConfig

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
BATCHES = IMAGES.flip(2), IMAGES.repeat(3, 1, 1, 1).roll(1, dims=3)[:5]


def model(impl: str, method: str = "product") -> VisionTransformer:
    options = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
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
    for images in BATCHES:
        torch.testing.assert_close(traced(images), vit(images), rtol=0, atol=1e-5)
    foreign = {node.kind() for node in traced.inlined_graph.nodes() if "irpe" in node.kind()}
    assert bool(foreign) == (impl != "auto")  # auto: it runs where irpe_ds is not installed


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    return model("auto")


@pytest.fixture(scope="module")
def program(vit: VisionTransformer) -> ExportedProgram:
    """It, recorded for any batch."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    return torch.export.export(vit, (IMAGES,), dynamic_shapes=({0: batch},))


def operators_of_ours(program: ExportedProgram) -> set[str]:
    return {name for node in program.graph.nodes if "irpe_ds" in (name := str(node.target))}


def test_torch_export(vit: VisionTransformer, program: ExportedProgram, tmp_path: Path) -> None:
    assert not operators_of_ours(program)  # auto: it runs where irpe_ds is not installed
    torch.export.save(program, tmp_path / "vit.pt2")
    loaded = torch.export.load(tmp_path / "vit.pt2").module()
    for images in BATCHES:
        torch.testing.assert_close(loaded(images), vit(images), rtol=0, atol=1e-5)


def test_torch_export_of_the_compiled_operators() -> None:
    vit = model("cpu")
    exported = torch.export.export(vit, (IMAGES,))
    assert operators_of_ours(exported)
    torch.testing.assert_close(exported.module()(IMAGES.flip(2)), vit(IMAGES.flip(2)))


def test_onnx_runtime(vit: VisionTransformer, program: ExportedProgram, tmp_path: Path) -> None:
    import onnxruntime

    names = {"input_names": ["images"], "output_names": ["logits"]}
    torch.onnx.export(program, (), tmp_path / "vit.onnx", dynamo=True, verbose=False, **names)
    session = onnxruntime.InferenceSession(
        tmp_path / "vit.onnx", providers=["CPUExecutionProvider"]
    )
    for images in BATCHES:
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), vit(images), rtol=0, atol=1e-5)


def test_what_cannot_be_recorded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "^impl: expected auto or impl=\"reference\" under torch.jit.trace, got 'cpu'$"
    with pytest.raises(ConfigError, match=expected):
        torch.jit.trace(model("cpu"), IMAGES)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for impl in ("cpu", "gather"):
        with pytest.raises(ConfigError, match=r'impl="reference" under ONNX export, got '):
            model(impl)(IMAGES)


def test_timm_s_feature_extractor(vit: VisionTransformer) -> None:
    (features,) = FeatureGraphNet(vit, out_indices=(0,))(IMAGES)
    (expected,) = vit.forward_intermediates(IMAGES, [0], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(features[:, 1:], expected)


def test_torch_fx() -> None:
    expected = "^x: expected a tensor: torch.export or timm's create_feature_extractor can trace it"
    with pytest.raises(ConfigError, match=expected):
        torch.fx.symbolic_trace(model("cpu"))
