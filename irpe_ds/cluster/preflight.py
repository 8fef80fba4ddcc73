"""Before a run on many hosts: can each be reached, are all alike, does each have what it needs."""

import json
import os
import shlex
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.launcher import runner

from irpe_ds.cluster.consistency import differences, software
from irpe_ds.cluster.hostfile import Host
from irpe_ds.cluster.process_group import device_type
from irpe_ds.cluster.rendezvous import interface_to
from irpe_ds.config import RunConfig
from irpe_ds.errors import ClusterError, UserError

CONNECT_SECONDS = 20
"""How long a host may take to answer."""
BUILD_SECONDS = 600
"""How long it may take after that; the operators may have to be compiled."""
FREE = 0.9
"""A GPU is free when so much of its memory is."""
MARK = "irpe_ds check: "


class Finding(NamedTuple):
    """What one host has told of itself."""

    facts: dict[str, str]
    """What has to be the same on all."""
    interface: str | None
    """What leads to the host of rank 0."""
    gpus: int | None
    """Free ones; None where the run computes on the CPU."""


InputFacts = Callable[[RunConfig], Mapping[str, str]]


def look(config: RunConfig, first: str, input_facts: InputFacts) -> Finding:
    """What there is on this host; builds the operators if need be.

    Args:
        first: the host of rank 0.
        input_facts: what to compare beside software, such as data and op.

    Raises:
        ClusterError: the run could not start here.
    """
    facts = {**software(config), **input_facts(config)}
    gpus = None
    if device_type() == "cuda":
        memory = [torch.cuda.mem_get_info(gpu) for gpu in range(torch.cuda.device_count())]
        gpus = sum(free > FREE * total for free, total in memory)
    interface = interface_to(first, socket.gethostname())
    return Finding(facts, interface, gpus)


def report(config: RunConfig, first: str, input_facts: InputFacts) -> None:
    """Print what `look` finds, or why it finds nothing, for the host that asked."""
    try:
        found: object = look(config, first, input_facts)
    except UserError as error:
        found = str(error)
    print(f"{MARK}{json.dumps(found)}", flush=True)


def ask(hosts: Sequence[Host], command: Sequence[str]) -> list[Finding | ClusterError]:
    """Run a command that ends in `report` on all hosts at once, over ssh, where DeepSpeed would."""
    line = "; ".join([*_exports(), f"cd {shlex.quote(os.getcwd())}", shlex.join(command)])
    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(lambda host: _ask(host.name, line), hosts))


def faults(hosts: Sequence[Host], found: Sequence[Finding | ClusterError]) -> list[ClusterError]:
    """Everything that is in the way of a run, by host."""
    told = [error for error in found if isinstance(error, UserError)]
    whole = [(h, f) for h, f in zip(hosts, found, strict=True) if isinstance(f, Finding)]
    for host, finding in whole:
        if finding.gpus is not None and finding.gpus < host.slots:
            got = f"{finding.gpus} free ones"
            told.append(ClusterError(host.name, f"{host.slots} GPUs, its slots", got))
    return [*told, *differences([(host.name, finding.facts) for host, finding in whole])]


def table(hosts: Sequence[Host], found: Sequence[Finding | ClusterError]) -> str:
    """A line for each host."""
    rows = [("host", "slots", "free GPUs", "interface", "op", "source")]
    for host, finding in zip(hosts, found, strict=True):
        if isinstance(finding, Finding):
            gpus = "-" if finding.gpus is None else str(finding.gpus)
            op, source = (finding.facts[f"the {x}"] for x in ("attention op", "source of irpe_ds"))
            rows.append((host.name, str(host.slots), gpus, finding.interface or "none", op, source))
        else:
            rows.append((host.name, str(host.slots), "?", "?", "?", "?"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)


def _ask(host: str, line: str) -> Finding | ClusterError:
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    command = ["ssh", *options, host, line]
    seconds = CONNECT_SECONDS + BUILD_SECONDS
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return ClusterError(host, f"an answer over ssh within {seconds} s", error)
    marked = [text for text in done.stdout.splitlines() if text.startswith(MARK)]
    if not marked:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        return ClusterError(host, "an answer over ssh", f"exit code {done.returncode}: {said}")
    answer = json.loads(marked[-1].removeprefix(MARK))
    if isinstance(answer, str):
        return ClusterError(host, "a host that the run can start on", answer)
    return Finding(*answer)


def _exports() -> list[str]:
    """The variables that `deepspeed` hands on with pdsh: by name, and from .deepspeed_env."""
    names = tuple(runner.EXPORT_ENVS + get_accelerator().export_envs())
    found = {name: value for name, value in os.environ.items() if name.startswith(names)}
    for folder in runner.DEEPSPEED_ENVIRONMENT_PATHS:
        path = Path(folder) / runner.DEEPSPEED_ENVIRONMENT_NAME
        if path.is_file():
            pairs = [line.split("=", 1) for line in path.read_text().splitlines() if "=" in line]
            found |= {name.strip(): value.strip() for name, value in pairs}
    return [f"export {name}={shlex.quote(value)}" for name, value in found.items()]
