"""Package irpe_ds; irpe_ds/ops is a link to the folder ops/, irpe_ds/scripts/ holds further links.

DS_BUILD_IRPE=1 pip install --no-build-isolation .   compiles the operators; PyTorch must be
                                                     installed already
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
INIT = (ROOT / "irpe_ds" / "__init__.py").read_text()

EXTRAS = {
    "cuda": ["cuda-toolkit[cccl,crt,cudart,nvcc,nvvm]==13.0.*; sys_platform == 'linux'"],
    "train": ["deepspeed>=0.16.4", "psutil", "pydantic>=2.7", "pyyaml", "safetensors", "tqdm"],
    # timm 1.0.31: RandAugment posterizes to 0 bits, an error in Pillow 13. Lift it with a timm that
    # keeps at least 1 bit.
    "data": [
        *("ffcv>=1.0.2", "numpy", "opencv-python", "pillow<13", "pydantic>=2.7", "scikit-learn"),
        *("scipy", "tqdm"),
    ],
    "log": ["matplotlib", "tensorboard", "wandb"],
    "parquet": ["pyarrow"],
    "dev": [
        *("mypy", "pytest>=8", "pytest-xdist", "ruff", "types-PyYAML"),
        *("onnx", "onnxruntime", "onnxscript", "transformers"),
    ],
    "all": ["irpe-ds[train,data,log,parquet,cuda,dev]"],
}

SCRIPTS = [f"scripts/**/*.{suffix}" for suffix in ("py", "yaml", "json", "sbatch", "example")]


def operators() -> tuple[dict[str, Any], contextlib.AbstractContextManager[None]]:
    """Arguments of setup() that compile the operators, and the context that it must run in."""
    sys.path.insert(0, str(ROOT))
    try:
        from torch.utils.cpp_extension import BuildExtension

        from irpe_ds.ops.build import prebuilt, toolchain
        from irpe_ds.ops.build.extension import ExtensionBuilder
    except ImportError as error:
        sys.exit(
            f"error: DS_BUILD_IRPE=1 needs PyTorch ({error}): install it first, and use "
            "pip install --no-build-isolation"
        )
    try:
        toolchain.architectures()
    except toolchain.Unavailable as error:
        sys.exit(f"error: {error}")
    builder = ExtensionBuilder()

    class Build(BuildExtension):
        """Writes beside the operators what they were built for."""

        def run(self) -> None:
            super().run()
            info = prebuilt.needs() | {
                "architectures": toolchain.architectures(),
                "without_cuda": builder.without_cuda,
            }
            module = Path(self.get_ext_fullpath(prebuilt.MODULE))
            module.with_name(prebuilt.INFO.name).write_text(json.dumps(info, indent=2) + "\n")

    extension = {"ext_modules": [builder.builder()], "cmdclass": {"build_ext": Build}}
    return extension, builder.environment()


arguments: dict[str, Any] = {}
environment: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
if os.environ.get("DS_BUILD_IRPE") == "1":
    arguments, environment = operators()

with environment:
    setup(
        name="irpe-ds",
        version=re.findall(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[0],
        description="ViTs with image relative position encoding, trained with DeepSpeed",
        license="Apache-2.0",
        python_requires=">=3.10",
        packages=find_packages(include=["irpe_ds", "irpe_ds.*"]),
        package_data={
            "irpe_ds": ["py.typed", "data/*/*.cpp", "data/*/*.h", *SCRIPTS],
            "irpe_ds.ops": ["csrc/**/*", "bench/predict/multiprocessor.*"],
        },
        include_package_data=False,
        install_requires=["torch>=2.8", "timm>=1.0.24", "ninja"],
        extras_require=EXTRAS,
        entry_points={"console_scripts": ["irpe-ds = irpe_ds.__main__:console"]},
        **arguments,
    )
