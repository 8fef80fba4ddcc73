"""Damage to files: blind to what they hold, or knowing JSON, tar, safetensors and text."""

import io
import json
import os
import random
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

NUMBERS = (0, 1, 2, 127, 255, 4096, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 1.5, 1e300, 2**31, 2**63, 10**30, "", "x", "24", "-1"),
    *("../x", "/etc/passwd", "\x1b[31m", "\ud800", "nan", "=1+1", "a" * 10_000),
    *([], [1], [None], {}, {"a": 1}, [[[[]]]], {"": {"": {"": 0}}}),
)
LITERALS = ("NaN", "Infinity", "1e999", "-0", "9" * 5000, "[" * 5000, '{"a":' * 3000, "tru", "'x'")
WORDS = (
    *("-1", "0", "1e999", "nan", "99999999999999999999", "../x", "-oProxyCommand=x", "$(id)", "é"),
    *("\x00", "\x1b[2J", "?", "[", "{", "*a", "&a", "!!python/object:x", "'", '"', ":", "#", "\t"),
)


def flipped(data: bytes, rng: random.Random) -> bytes:
    """One bit."""
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def cut(data: bytes, rng: random.Random) -> bytes:
    """The end is missing."""
    return data[: rng.choice([0, 1, 8, len(data) // 2, len(data) - 1, rng.randrange(len(data))])]


def longer(data: bytes, rng: random.Random) -> bytes:
    """Bytes too many, at the end or inside."""
    place = rng.choice([len(data), rng.randrange(len(data))])
    return data[:place] + rng.randbytes(rng.choice([1, 8, 600])) + data[place:]


def overwritten(data: bytes, rng: random.Random) -> bytes:
    """A run of zeros, ones or noise."""
    place, size = rng.randrange(len(data)), rng.choice([1, 4, 16, 200, 5000])
    new = rng.choice([bytes(size), b"\xff" * size, rng.randbytes(size)])[: len(data) - place]
    return data[:place] + new + data[place + len(new) :]


def moved(data: bytes, rng: random.Random) -> bytes:
    """A piece is missing, twice there, or elsewhere."""
    one, two, three = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    a, b, c = data[:one], data[one:two], data[two:three]
    rest = data[three:]
    return rng.choice([a + c + rest, a + b + b + c + rest, a + c + b + rest])


def numbered(data: bytes, rng: random.Random) -> bytes:
    """An aligned integer, and most files have those that matter near the start or the end."""
    form, size = rng.choice([("<Q", 8), (">Q", 8), ("<I", 4), (">I", 4), ("<H", 2)])
    window = min(len(data) // size, 64)
    if not window:
        return flipped(data, rng)
    place = size * rng.choice([rng.randrange(window), rng.randrange(len(data) // size)])
    place = rng.choice([place, len(data) - size - place])
    new = struct.pack(form, rng.choice(NUMBERS) % 2 ** (8 * size))
    return data[:place] + new + data[place + size :]


BLIND: tuple[Mutation, ...] = (flipped, cut, longer, overwritten, moved, numbered)


def json_node(data: bytes, rng: random.Random) -> bytes:
    """One value of a JSON text, at any depth, is another, missing, twice there or no JSON."""
    root = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        keys = node.keys() if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                visit(node[key])

    visit(root)
    node, key = rng.choice(places)
    match rng.randrange(5):
        case 0:
            del node[key]
        case 1 if isinstance(node, list):
            node.append(node[key])
        case 2:
            mark = "a mark of nobody's"
            node[key] = mark
            return json.dumps(root).replace(json.dumps(mark), rng.choice(LITERALS)).encode()
        case 3 if isinstance(node[key], (int, float)):
            node[key] = rng.choice([-1, 1, 2, 1000]) * node[key] + rng.choice([0, 1, -1])
        case _:
            node[key] = rng.choice(VALUES)
    return json.dumps(root).encode()


def json_lines(data: bytes, rng: random.Random) -> bytes:
    """A row of several: one value, or the row is missing, twice there or cut."""
    lines = data.splitlines(keepends=True)
    number = rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            lines.insert(number, rng.choice(lines))
        case 1:
            lines[number] = cut(lines[number], rng) + rng.choice([b"", b"\n"])
        case _:
            lines[number] = json_node(lines[number], rng) + b"\n"
    return b"".join(lines)


def words(data: bytes, rng: random.Random) -> bytes:
    """A word of a text is another, missing or twice there; lines too."""
    parts = re.split(r"(\W+)", data.decode("utf-8", "surrogateescape"))
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(parts))
        new = rng.choice([*WORDS, "", parts[place] * 2, rng.choice(parts), "9" * 5000, "[" * 4000])
        parts[place] = new
    return "".join(parts).encode("utf-8", "surrogateescape")


_TAR_FIELDS = {
    **{"name": (0, 100), "mode": (100, 8), "size": (124, 12), "mtime": (136, 12)},
    **{"type": (156, 1), "link": (157, 100), "magic": (257, 8), "prefix": (345, 155)},
}
_TAR_VALUES = (
    *(b"", b"0", b"777777777777", b"-1", b"99", b"abc", b"\xff" * 12, b"\xff" * 10 + b"\xfe\x00"),
    *(b"\x80" + b"\x7f" * 11, b"\x80" + bytes(10) + b"\x01", b"../../x", b"/etc/x", b"\xff\x1b[2J"),
    *(b"L", b"K", b"x", b"g", b"S", b"1", b"2", b"3", b"6", b"V", b"00000001000", b"1 2 3"),
)


def tar_header(data: bytes, rng: random.Random) -> bytes:
    """A field of a tar's header, or of a PAX record; the header's checksum is right."""
    blocks = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    records = [at for at in blocks if data[at + 156 : at + 157] in (b"x", b"g")]
    if records and rng.random() < 0.3:
        at = rng.choice(records) + 512
        text = rng.choice(
            [b"15 size=-1536\n", b"12 size=abc\n", b"99999 path=x\n", b"0 a=b\n", b"x"]
        )
        return data[:at] + text + data[at + len(text) :]
    at = rng.choice(blocks)
    begin, length = _TAR_FIELDS[rng.choice([*_TAR_FIELDS, "size", "size", "type"])]
    value = rng.choice(_TAR_VALUES)[:length].ljust(length, b"\0")
    header = bytearray(data[at : at + 512])
    header[begin : begin + length] = value
    checksum = sum(header[:148]) + sum(header[156:]) + 8 * 32
    header[148:156] = b"%06o\0 " % checksum
    return data[:at] + bytes(header) + data[at + 512 :]


def safetensors_header(data: bytes, rng: random.Random) -> bytes:
    """A value of the JSON header; its length fits."""
    size = int.from_bytes(data[:8], "little")
    header = json_node(data[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def replaced(path: Path, rng: random.Random) -> None:
    """Something else has the file's name: a FIFO, a device, a folder, a dangling link, nothing."""
    path.unlink()
    match rng.randrange(6):
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to("/dev/zero")
        case 2:
            path.mkdir()
        case 3:
            path.symlink_to("nothing")
        case 4:
            path.symlink_to("/proc/self/environ")


def packed(files: dict[str, bytes], rng: random.Random) -> bytes:
    """A tar with these files, some of them in PAX format with long names."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            if rng.random() < 0.3:
                entry.pax_headers = {"comment": "x" * rng.randrange(600)}
            tar.addfile(entry, io.BytesIO(data))
    return made.getvalue()
