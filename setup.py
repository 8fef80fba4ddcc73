"""Package irpe_ds; irpe_ds/ops is a link to the folder ops/.

DS_BUILD_IRPE=1 pip install --no-build-isolation .     compiles the operators, where PyTorch and
                                                       DeepSpeed are installed already
"""

import contextlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = ROOT / "irpe_ds" / "__init__.py"
VERSION = re.findall(r'^__version__ = "(.+)"$', INIT.read_text(), re.MULTILINE)[0]

DESCRIPTION = "Vision transformers with image relative position encoding, trained with DeepSpeed"

EXTRAS = {
    "cuda": ["cuda-toolkit[cccl,crt,cudart,nvcc,nvvm]==13.0.*; sys_platform == 'linux'"],
    "train": ["deepspeed>=0.16", "psutil", "pydantic>=2.7", "pyyaml", "safetensors", "tqdm"],
    # Pillow 13 refuses to keep 0 bits, which RandAugment of timm 1.0.31 asks for.
    "data": [
        "ffcv>=1.0.2",
        "numpy",
        "opencv-python",
        "pillow<13",
        "scikit-learn",
        "scipy",
        "tqdm",
    ],
    "log": ["matplotlib", "tensorboard", "wandb"],
    "dev": ["mypy", "pytest>=8", "ruff", "types-PyYAML"],
    "all": ["irpe-ds[train,data,log,cuda,dev]"],
}


def compiled() -> tuple[dict[str, Any], contextlib.AbstractContextManager[None]]:
    """Arguments of setup that compile the operators, and what the compilation runs in."""
    sys.path.insert(0, str(ROOT))
    try:
        from torch.utils.cpp_extension import BuildExtension

        from irpe_ds.ops.build import library, toolchain
        from irpe_ds.ops.build.builder import IRPEBuilder
    except ImportError as error:
        sys.exit(
            f"error: DS_BUILD_IRPE=1 needs PyTorch, timm and DeepSpeed ({error}): install them "
            "first, and use pip install --no-build-isolation"
        )

    class Build(BuildExtension):
        """Leaves what the operators were built for beside them."""

        def run(self) -> None:
            super().run()
            info = library.needs() | {
                "architectures": toolchain.architectures(),
                "without_cuda": builder.without_cuda,
            }
            built = Path(self.get_ext_fullpath(library.PREBUILT))
            built.with_name("irpe_op.json").write_text(json.dumps(info, indent=2) + "\n")

    builder = IRPEBuilder()
    arguments = {"ext_modules": [builder.builder()], "cmdclass": {"build_ext": Build}}
    return arguments, builder.environment()


arguments: dict[str, Any] = {}
environment: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
if os.environ.get("DS_BUILD_IRPE") == "1":
    arguments, environment = compiled()

with environment:
    setup(
        name="irpe-ds",
        version=VERSION,
        description=DESCRIPTION,
        license="Apache-2.0",
        python_requires=">=3.10",
        packages=find_packages(include=["irpe_ds", "irpe_ds.*"]),
        package_data={
            "irpe_ds": ["py.typed"],
            "irpe_ds.ops": ["csrc/**/*"],
            "irpe_ds.ops.bench": ["*.cpp"],
        },
        include_package_data=False,
        install_requires=["torch>=2.6", "timm>=1.0.19"],
        extras_require=EXTRAS,
        **arguments,
    )
