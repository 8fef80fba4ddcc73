"""Package irpe_ds; the folder ops/ is imported, and shipped, as irpe_ds.ops."""

import re
from pathlib import Path

from setuptools import find_packages, setup

INIT = Path(__file__).parent / "irpe_ds" / "__init__.py"
VERSION = re.findall(r'^__version__ = "(.+)"$', INIT.read_text(), re.MULTILINE)[0]

EXTRAS = {
    "train": ["deepspeed>=0.16", "pydantic>=2.7", "pyyaml", "safetensors", "tqdm"],
    "data": ["ffcv>=1.0.2", "numpy", "opencv-python", "pillow", "scikit-learn"],
    "log": ["matplotlib", "tensorboard", "wandb"],
    "dev": ["mypy", "pytest>=8", "ruff", "types-PyYAML"],
    "all": ["irpe-ds[train,data,log,dev]"],
}

setup(
    name="irpe-ds",
    version=VERSION,
    description="Vision transformers with image relative position encoding, trained with DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"irpe_ds.ops": "ops"},
    packages=[
        *find_packages(include=["irpe_ds", "irpe_ds.*"]),
        "irpe_ds.ops",
        *(f"irpe_ds.ops.{name}" for name in find_packages("ops")),
    ],
    package_data={"irpe_ds": ["py.typed"], "irpe_ds.ops": ["csrc/**/*"]},
    include_package_data=False,
    install_requires=["torch>=2.6", "timm>=1.0.19"],
    extras_require=EXTRAS,
)
