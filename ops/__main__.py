"""Report which iRPE operators run on this machine, and why others do not: python -m irpe_ds.ops

With --build they are built first if need be.
"""

import argparse
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from irpe_ds.ops import dispatch
from irpe_ds.ops.build import folders, library, nvrtc, prebuilt, toolchain
from irpe_ds.ops.build.toolchain import Unavailable

NAME_WIDTH, STATE_WIDTH = 24, 12


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", action="store_true", help="build the operators if need be")
    if parser.parse_args().build:
        library.load()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # paths not UTF-8
    rule = "-" * (NAME_WIDTH + 2 * STATE_WIDTH)
    print("\n".join([rule, *implementations(), rule, *installation(), rule]))


def implementations() -> Iterator[str]:
    """One line per implementation and device: installed, compatible, and why not."""
    ready = ready_library()
    yield _dotted("implementation", _dotted("installed", "compatible", STATE_WIDTH))
    for name, row in dispatch.IMPLEMENTATIONS.items():
        if not row.compiled:
            reason = nvrtc.unavailable_reason() if name == "fused" else None
            states = ("[YES]", "[OKAY]") if reason is None else ("[NO]", f"[NO] {reason}")
            yield _dotted(name, _dotted(*states, STATE_WIDTH))
            continue
        for device in row.devices:
            if ready or library.is_loaded():  # built, or tried without success
                reason = getattr(library.load(), device)
            else:
                reason = missing_build_tool(device)
            installed = "[YES]" if ready and reason is None else "[NO]"
            compatible = "[OKAY]" if reason is None else f"[NO] {reason}"
            yield _dotted(f"{name} ({device})", _dotted(installed, compatible, STATE_WIDTH))


def installation() -> Iterator[str]:
    """Versions, compilers and folders."""
    yield _dotted("torch", f"{torch.__version__}, CUDA {torch.version.cuda}")
    yield _dotted("deepspeed", _deepspeed_version())
    yield _dotted("C++ compiler", _or_reason(_cxx_version))
    yield _dotted("CUDA compiler", _or_reason(_cuda_version))
    yield _dotted("architectures", _or_reason(toolchain.architectures))
    yield _dotted("ninja", _or_reason(toolchain.ninja))
    yield _dotted("NVRTC", _or_reason(nvrtc.version))
    yield _dotted("prebuilt", prebuilt.MODULE if find_spec(prebuilt.MODULE) else "no")
    yield _dotted("cache", str(cache()))
    yield _dotted("ready", ready_library() or "no: built on first use, or by --build")


def ready_library() -> str | None:
    """The file of the operators, if they need not be compiled first."""
    if library.is_loaded():
        return library.load().origin or None
    spec, file = find_spec(prebuilt.MODULE), cache() / "irpe" / "irpe.so"
    return spec.origin if spec else str(file) if folders.is_complete(file) else None


def cache() -> Path:
    """The folder of a just-in-time build, existing or not."""
    try:
        return toolchain.cache(toolchain.cuda())
    except Unavailable:
        return toolchain.cache(None)


def missing_build_tool(device: str) -> str | None:
    """What a just-in-time build for a device type lacks; None when it can be attempted."""
    try:
        toolchain.cxx()
        toolchain.ninja()
        folders.check(cache() / "irpe", cache().parent)
        if device == "cuda":
            toolchain.cuda()
    except Unavailable as error:
        return str(error)
    return None


def _deepspeed_version() -> str:
    try:
        return importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return "not installed: PyTorch alone builds the operators"


def _cxx_version() -> str:
    command = toolchain.cxx()
    try:
        printed = subprocess.run(
            [*command.split(), "--version"], capture_output=True, timeout=60, errors="replace"
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"cannot run {command} ({error})") from error
    return f"{command}: {(printed.stdout.splitlines() or ['does not run'])[0]}"


def _cuda_version() -> str:
    toolkit = toolchain.cuda()
    return f"{toolkit.home / 'bin' / 'nvcc'}: {toolkit.version}"


def _or_reason(call: Callable[[], str]) -> str:
    try:
        return call()
    except Unavailable as error:
        return f"[NO] {error}"


def _dotted(name: str, value: str, width: int = NAME_WIDTH) -> str:
    return f"{name} {'.' * (width - len(name) - 2)} {value}"


if __name__ == "__main__":
    main()
