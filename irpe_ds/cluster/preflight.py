"""Before a run on many hosts: is each reachable, are all alike, does each have what it needs?"""

import json
import os
import re
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

from irpe_ds.cluster.consistency import differences, software_facts
from irpe_ds.cluster.hostfile import Host
from irpe_ds.cluster.process_group import device_type
from irpe_ds.cluster.rendezvous import interface_to
from irpe_ds.cluster.waiting import Waiting
from irpe_ds.config import RunConfig
from irpe_ds.errors import ClusterError, UserError
from irpe_ds.files import read_regular

CONNECT_SECONDS = 20
"""How long a host may take to answer."""
BUILD_SECONDS = 600
"""How long it may take after that; the operators may have to be compiled."""
FREE_SHARE = 0.9
"""A GPU is free when this share of its memory is."""
MAX_ENV_BYTES = 1 << 20
"""Of a .deepspeed_env."""
REPORT_PREFIX = "irpe_ds check: "


class HostReport(NamedTuple):
    """What one host reports about itself."""

    facts: dict[str, str]
    """What has to be the same on all."""
    interface: str | None
    """The network interface that leads to the host of rank 0."""
    gpus: int | None
    """Number of free GPUs; None for a run on CPUs."""


InputFacts = Callable[[RunConfig], Mapping[str, str]]


def inspect_host(config: RunConfig, first_host: str, input_facts: InputFacts) -> HostReport:
    """Inspect this host; compiles the operators if need be.

    Args:
        first_host: the host of rank 0.
        input_facts: what to compare besides software, such as data and op.

    Raises:
        UserError: the run could not start here.
    """
    facts = {**software_facts(config), **input_facts(config)}
    gpus = None
    if device_type() == "cuda":
        memory = [torch.cuda.mem_get_info(gpu) for gpu in range(torch.cuda.device_count())]
        gpus = sum(free > FREE_SHARE * total for free, total in memory)
    interface = interface_to(first_host, socket.gethostname())
    return HostReport(facts, interface, gpus)


def print_report(config: RunConfig, first_host: str, input_facts: InputFacts) -> None:
    """Print this host's report, or its error, for `query_hosts` to read."""
    try:
        answer: object = inspect_host(config, first_host, input_facts)
    except UserError as error:
        answer = str(error)
    print(f"{REPORT_PREFIX}{json.dumps(answer)}", flush=True)


def query_hosts(hosts: Sequence[Host], command: Sequence[str]) -> list[HostReport | ClusterError]:
    """Run a command that ends in `print_report` on all hosts at once, over ssh."""
    line = "; ".join([*_exports(), f"cd {shlex.quote(os.getcwd())}", shlex.join(command)])
    silent = [host.name for host in hosts]

    def query(host: Host) -> HostReport | ClusterError:
        try:
            return _query(host.name, line)
        finally:
            silent.remove(host.name)

    awaited = Waiting(lambda: f"waiting for {', '.join(silent)}")
    with awaited, ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(query, hosts))


def problems(
    hosts: Sequence[Host], reports: Sequence[HostReport | ClusterError]
) -> list[ClusterError]:
    """Everything that would stop a run, by host."""
    found = [report for report in reports if isinstance(report, ClusterError)]
    answered = [
        (host, report)
        for host, report in zip(hosts, reports, strict=True)
        if isinstance(report, HostReport)
    ]
    for host, report in answered:
        if report.gpus is not None and report.gpus < host.slots:
            expected = f"{host.slots} free GPUs, one for each slot"
            found.append(ClusterError(host.name, expected, report.gpus))
    return [*found, *differences([(host.name, report.facts) for host, report in answered])]


def table(hosts: Sequence[Host], reports: Sequence[HostReport | ClusterError]) -> str:
    """One line per host."""
    rows = [("host", "slots", "free GPUs", "interface", "op", "source")]
    for host, report in zip(hosts, reports, strict=True):
        if isinstance(report, HostReport):
            gpus = "-" if report.gpus is None else str(report.gpus)
            op, source = (report.facts[f"the {x}"] for x in ("attention op", "source of irpe_ds"))
            rows.append((host.name, str(host.slots), gpus, report.interface or "none", op, source))
        else:
            rows.append((host.name, str(host.slots), "?", "?", "?", "?"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)


def _query(host: str, line: str) -> HostReport | ClusterError:
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    command = ["ssh", *options, "--", host, line]
    seconds = CONNECT_SECONDS + BUILD_SECONDS
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return ClusterError(host, f"an answer over ssh within {seconds} s", error)
    answers = [text for text in done.stdout.splitlines() if text.startswith(REPORT_PREFIX)]
    if not answers:
        last_line = (done.stderr.strip() or "no output").splitlines()[-1]
        return ClusterError(host, "an answer over ssh", f"exit code {done.returncode}: {last_line}")
    answer = json.loads(answers[-1].removeprefix(REPORT_PREFIX))
    if isinstance(answer, str):
        return ClusterError(f"{host}: the run cannot start here: {answer}")
    return HostReport(*answer)


def _exports() -> list[str]:
    """Shell commands that set what `deepspeed` exports over pdsh: by name, and .deepspeed_env's.

    DeepSpeed 0.19.8 builds its own in PDSHRunner.get_cmd, together with the whole command line.
    """
    names = tuple(runner.EXPORT_ENVS + get_accelerator().export_envs())
    found = {name: value for name, value in os.environ.items() if name.startswith(names)}
    for folder in runner.DEEPSPEED_ENVIRONMENT_PATHS:
        path = Path(folder) / runner.DEEPSPEED_ENVIRONMENT_NAME
        if path.is_file():
            found |= _read_exports(path)
    return [f"export {name}={shlex.quote(value)}" for name, value in found.items()]


def _read_exports(path: Path) -> dict[str, str]:
    """The variables in a .deepspeed_env.

    Raises:
        ClusterError: a line with which `deepspeed` would fail, or that a shell would run.
    """
    try:
        lines = read_regular(path, MAX_ENV_BYTES).decode().removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(path, "lines NAME=VALUE", error) from None
    found = {}
    for number, line in enumerate(lines if lines != [""] else [], 1):
        name, equals, value = line.partition("=")
        if not equals or re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name.strip()) is None:
            raise ClusterError(f"{path}, line {number}", "NAME=VALUE", repr(line[:100]))
        found[name.strip()] = value.strip()
    return found
