"""Large ViTs take the fused kernels on every GPU that these claim."""

from typing import Any

import pytest
import timm
import torch

from irpe_ds.models import equip
from irpe_ds.ops import fused, fused_kernels
from irpe_ds.ops.fused_plan import plan
from irpe_ds.rpe.config import RPEConfig
from tests.ops.ptxsim import LIMITS

MODELS: dict[str, dict[str, Any]] = {
    "vit_huge_patch14_224": {},  # head dimension 80
    "vit_giant_patch14_224": {},  # 88
    "vit_gigantic_patch14_224": {},  # 104
    "vit_so400m_patch14_siglip_384": {},  # 72; 27 x 27 patches
    "vit_base_patch16_224": {"embed_dim": 512, "num_heads": 4},  # 128, as ViT-22B
    "vit_large_patch14_reg4_dinov2": {},  # 37 x 37 patches, 5 prefix tokens
}


@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("name", MODELS)
def test_every_kernel_has_a_plan(name: str, capability: str) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model(name, depth=1, **MODELS[name])
    attention = equip(model, RPEConfig(on="k")).blocks[0].attn
    key = attention.dispatch_key("cuda", torch.bfloat16)
    assert fused.unsupported_reason(key) is None
    for kernel, needed in fused_kernels.NEEDED.items():
        shape = fused.kernel_shape(key, keys=kernel == "backward_keys")
        assert shape is not None
        found = plan(shape, LIMITS[capability], needed)
        assert found is not None, kernel
        assert found.warps >= 8 or capability in ("86", "89", "120"), kernel
