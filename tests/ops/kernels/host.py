"""CUDA kernels compiled for the host, and AddressSanitizer around them."""

import os
from pathlib import Path

KERNELS = Path(__file__).parent
CSRC = KERNELS.parents[2] / "ops" / "csrc"
SANITIZED = "IRPE_TEST_SANITIZER" in os.environ
INCLUDES = [f"-I{CSRC}", f"-I{KERNELS}"]  # the latter for on_host.h
GXX = ["g++", "-g", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *INCLUDES]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
OPTIONS = ["-O1", *(SANITIZERS if SANITIZED else [])]
