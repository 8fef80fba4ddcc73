"""The hosts of a run, read from the file that `deepspeed --hostfile` and Open MPI take."""

import re
from pathlib import Path
from typing import NamedTuple

from irpe_ds.errors import ClusterError
from irpe_ds.files import read_regular

MAX_BYTES = 1 << 24
"""Of a hostfile."""
MAX_SLOTS = 4096
"""Of a host: more than any has GPUs or cores."""
LABEL = "[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
"""Of a host name: RFC 1123's, and `_`, which Docker Compose uses."""
NAME = re.compile(rf"(?:[A-Za-z0-9_][A-Za-z0-9_.-]{{0,63}}@)?(?=.{{1,253}}$){LABEL}(?:\.{LABEL})*")
"""A host, with or without USER@. No IPv6 address: pdsh and `deepspeed --include` read colons as
something else."""


class Host(NamedTuple):
    """One line of a hostfile: `slots` ranks on this host."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts in order, rank 0 on the first; lines of `NAME slots=NUMBER`, `#` starts a comment.

    Stricter than DeepSpeed 0.19.8, which trains on this host alone if the file does not exist,
    drops hosts without slots, and hands names to ssh and to a shell as they are.

    Raises:
        ClusterError: no such file, no host, or a malformed line; names file and line.
    """
    try:
        lines = read_regular(path, MAX_BYTES).decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(path, "a hostfile", error) from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        where = f"{path}, line {number}"
        match = re.fullmatch(r"(\S+)[ \t]+slots=([0-9]{1,9})", text)
        if match is None:
            raise ClusterError(where, "NAME slots=NUMBER", _shown(text))
        host = Host(match[1], int(match[2]))
        if NAME.fullmatch(host.name) is None:
            expected = "the name of a host (letters, digits, dots, - and _)"
            raise ClusterError(where, expected, _shown(host.name))
        if host.slots == 0:
            raise ClusterError(where, "at least one slot (or remove the line)", _shown(text))
        if host.slots > MAX_SLOTS:
            raise ClusterError(where, f"at most {MAX_SLOTS} slots, ranks on one host", host.slots)
        if host.name in hosts:
            raise ClusterError(where, "every host once", f"{host.name} again")
        hosts[host.name] = host
    if not hosts:
        raise ClusterError(path, "at least one line NAME slots=NUMBER", "none")
    return list(hosts.values())


def _shown(text: str) -> str:
    """A part of the file in a message."""
    return repr(text if len(text) <= 100 else f"{text[:100]}...")
