"""Machine code: ELF files of CUDA kernels, and their instructions as nvdisasm prints them."""

import contextlib
import mmap
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from irpe_ds.ops.build import toolchain
from irpe_ds.ops.build.toolchain import Unavailable

INSTRUCTION_BYTES = 16
SYMBOL = np.dtype("<u4, u1, u1, <u2, <u8, <u8")
SYMBOL.names = ("name", "info", "other", "section", "value", "size")
"""Elf64_Sym."""
FUNCTION, FILE = 2, 4
"""Types of symbols, the low bits of `info`."""


class Section(NamedTuple):
    """Of an ELF file."""

    name: str
    type: int
    address: int
    offset: int
    size: int
    link: int


class Elf:
    """An ELF file, given as its bytes or mapped into memory."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.data = data
        (headers,) = struct.unpack_from("<Q", data, 0x28)
        count, names = struct.unpack_from("<HH", data, 0x3C)
        rows = [struct.unpack_from("<IIQQQQII", data, headers + 64 * n) for n in range(count)]
        at = rows[names][4]
        self.sections = [
            Section(self.text(at + name), kind, address, offset, 0 if kind == 8 else size, link)
            for name, kind, _, address, offset, size, link, _ in rows
        ]  # 8: SHT_NOBITS, which takes no place in the file

    def text(self, at: int) -> str:
        """The string at this place of the file."""
        return self.data[at : self.data.find(b"\0", at)].decode()

    def section(self, name: str) -> Section | None:
        """The first one of this name."""
        return next((x for x in self.sections if x.name == name), None)

    def content(self, name: str) -> bytes:
        """The bytes of a section; none if there is no such section."""
        found = self.section(name)
        return self.data[found.offset : found.offset + found.size] if found else b""

    def symbols(self) -> tuple[np.ndarray, int]:
        """The table of symbols, and where their names begin in the file."""
        table = next(x for x in self.sections if x.type == 2)  # SHT_SYMTAB
        count = table.size // SYMBOL.itemsize
        return (
            np.frombuffer(self.data, SYMBOL, count, table.offset),
            self.sections[table.link].offset,
        )


class Instruction(NamedTuple):
    """One of SASS, and what ptxas has encoded for the scheduler."""

    text: str
    guard: str
    """The predicate it depends on, `!P0`; empty if none."""
    opcode: tuple[str, ...]
    """With its modifiers: HMMA, 16816, F32, BF16."""
    operands: tuple[str, ...]
    stall: int
    """Cycles until the warp may issue its next instruction."""
    write_barrier: int
    """Which of 6 scoreboards is released when the result is there; 7: none."""
    read_barrier: int
    """Which one is released when the sources have been read; 7: none."""
    wait_mask: int
    """Scoreboards that have to be free, by bits."""


class Program(NamedTuple):
    """A kernel."""

    name: str
    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]
    """The number of the instruction at each label."""
    constants: Mapping[int, bytes]
    """Constant banks; bank 0 is filled at a launch, with the parameters at its end."""
    registers: int
    """Of a thread."""


def program(cubin: bytes, pattern: str) -> Program:
    """The first kernel whose mangled name matches.

    Raises:
        Unavailable: there is no nvdisasm.
        LookupError: no kernel of that name.
    """
    elf = Elf(cubin)
    symbols, names = elf.symbols()
    for number in np.flatnonzero(symbols["info"] & 15 == FUNCTION):
        name = elf.text(names + int(symbols["name"][number]))
        if re.search(pattern, name) and not name.startswith("$"):
            break
    else:
        raise LookupError(f"no kernel matches {pattern}")
    constants = {
        bank: elf.content(f".nv.constant{bank}.{name}") or elf.content(f".nv.constant{bank}")
        for bank in (0, 2, 3, 4)
    }
    instructions, labels = _parse(_disassemble(cubin, int(number)))
    return Program(name, instructions, labels, constants, _registers(elf, int(number)))


def _registers(elf: Elf, symbol: int) -> int:
    """What .nv.info says: attributes are format, name, and with format 4 a length and a value."""
    data, at, register_count = elf.content(".nv.info"), 0, 0x2F  # EIATTR_REGCOUNT
    while at < len(data):
        kind, name, length = struct.unpack_from("<BBH", data, at)
        if kind == 4 and name == register_count:
            of, count = struct.unpack_from("<II", data, at + 4)
            if of == symbol:
                return int(count)
        at += 4 + (length if kind == 4 else 0)
    raise LookupError("no number of registers")


def tool(name: str) -> str:
    """nvdisasm or cuobjdump: of a CUDA toolkit, or those that Triton's wheel brings along.

    Raises:
        Unavailable: it is in none of these places.
    """
    folders = [os.environ.get("PATH", "")]
    spec = find_spec("triton")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folders.append(f"{place}/backends/nvidia/bin")
    with contextlib.suppress(Unavailable):
        folders.append(str(toolchain.cuda().home / "bin"))
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise Unavailable(f"no {name}: pip install triton, or install a CUDA toolkit")
    return found


def _disassemble(cubin: bytes, number: int) -> str:
    """The kernel of this symbol, with the encodings of its instructions."""
    command = [tool("nvdisasm"), "-c", "-hex", "-fun", str(number)]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([*command, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def _parse(listing: str) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    """Each instruction is a line with its address and half of its encoding, and one with the rest,
    which ends with what the scheduler is told:

        .L_x_1:
                /*0560*/              @P0 IMAD R2, R3, 0x8, R4 ;        /* 0x0000000803020824 */
                                                                        /* 0x000fe200078e0204 */
    """
    pattern = (
        r"^(?P<label>\.L_x_\w+|\$[\w$]+):$|"
        r"/\*[0-9a-f]{4,}\*/\s+(?P<text>\S.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/\s*"
        r"/\* 0x(?P<control>[0-9a-f]{16}) \*/"
    )
    instructions: list[Instruction] = []
    labels = {}
    for found in re.finditer(pattern, listing, re.MULTILINE):
        if found["label"]:
            labels[found["label"]] = len(instructions)
        else:
            text = re.sub(r"\s+", " ", found["text"])
            instructions.append(_instruction(text, int(found["control"], 16) >> 41))
    return tuple(instructions), labels


def _instruction(text: str, control: int) -> Instruction:
    """Args:
    control: from the low bit on 4 bits of stall cycles, one of yield, three each for the two
        scoreboards and six for those to wait for (Jia et al., arXiv:1804.06826, section 2.1).
    """
    guard, opcode, operands = re.fullmatch(r"(?:@(\S+) )?(\S+) ?(.*)", text).groups()  # type: ignore[union-attr]
    return Instruction(
        text,
        guard or "",
        tuple(opcode.split(".")),
        tuple(_split(operands)),
        stall=control & 15,
        write_barrier=control >> 5 & 7,
        read_barrier=control >> 8 & 7,
        wait_mask=control >> 11 & 63,
    )


def _split(operands: str) -> Iterator[str]:
    """At commas outside of brackets."""
    yield from (part.strip() for part in re.findall(r"(?:[^,\[(]|\[[^\]]*\]|\([^)]*\))+", operands))
