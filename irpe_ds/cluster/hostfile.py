"""The hosts of a run, read from the file that `deepspeed --hostfile` and Open MPI take."""

import re
from pathlib import Path
from typing import NamedTuple

from irpe_ds.errors import ClusterError


class Host(NamedTuple):
    """One line of a hostfile: `slots` ranks on this host."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts in order, rank 0 on the first; lines of `NAME slots=NUMBER`, `#` starts a comment.

    Stricter than DeepSpeed 0.19.8, which trains on this host alone if the file does not exist, and
    drops hosts without slots.

    Raises:
        ClusterError: no such file, no host, or a malformed line; names file and line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(path, "a hostfile", error) from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        where = f"{path}, line {number}"
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if match is None:
            raise ClusterError(where, "NAME slots=NUMBER", repr(text))
        host = Host(match[1], int(match[2]))
        if host.slots == 0:
            raise ClusterError(where, "at least one slot (or remove the line)", repr(text))
        if host.name in hosts:
            raise ClusterError(where, "every host once", f"{host.name} again")
        hosts[host.name] = host
    if not hosts:
        raise ClusterError(path, "at least one line NAME slots=NUMBER", "none")
    return list(hosts.values())
