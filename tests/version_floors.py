"""Install the lower bounds of setup.py into an environment of their own, and run the core tests.

python -m tests.version_floors FOLDER     FOLDER is made; 7 GB, about half an hour on two cores

Without a CUDA toolkit, so without the tests that need nvcc or the fused kernels, and without FFCV,
whose lower bound is the version that all other tests run with.
"""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNBOUNDED = ["ninja", "packaging", "psutil", "pyyaml", "safetensors", "setuptools", "tqdm", "wheel"]
TESTS = ["tests/rpe", "tests/models", "tests/ops", "tests/test_config.py"]
NEED_NVCC = ["build", "test_fused.py", "test_fused_in_a_model.py", "test_gather_kernels.py"]


def main() -> None:
    folder = Path(sys.argv[1])
    venv.create(folder, with_pip=True)
    bounds = dict(re.findall(r'"([a-z]+)>=([\d.]+)"', (ROOT / "setup.py").read_text()))
    pins = {name: f"{name}=={bounds[name]}" for name in ("torch", "timm", "deepspeed", "pydantic")}
    pip = [folder / "bin" / "pip", "install", "-q", "--no-build-isolation"]
    # timm takes the torchvision that fits torch; DeepSpeed is built, for which torch must be there.
    subprocess.run([*pip, *UNBOUNDED, pins["torch"], pins["timm"]], check=True)
    subprocess.run([*pip, *pins.values(), f"pytest=={bounds['pytest']}"], check=True)
    print("Testing", *pins.values(), flush=True)
    ignored = [f"--ignore=tests/ops/{name}" for name in NEED_NVCC]
    pytest = [folder / "bin" / "python", "-m", "pytest", "-q", "-m", "not gpu and not slow"]
    environment = {**os.environ, "PATH": f"{folder.absolute() / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run([*pytest, *ignored, *TESTS], cwd=ROOT, env=environment)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
