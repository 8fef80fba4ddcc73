"""Hosts that are network namespaces of this machine, joined by a bridge, with an sshd in each.

They know each other by name, and one more, `absent`, at whose address there is nothing.
They share files and processors, and nothing of the network. Root, iproute2, openssh-server and pdsh
are needed.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

TOOLS = ("ip", "unshare", "sshd", "ssh-keygen", "pdsh")
SBIN = "/usr/sbin:/sbin"
SUBNET = "10.77.0"
PREFIX = f"irpe{os.getpid()}"
"""Of the names of everything made here: a second suite on this machine has another."""


def missing() -> str | None:
    """Why there can be no hosts here; None where there can."""
    if os.geteuid() != 0:
        return "needs root"
    path = f"{os.environ['PATH']}:{SBIN}"
    lacking = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if lacking:
        return f"needs {', '.join(lacking)} (iproute2, openssh-server, pdsh)"
    trial = subprocess.run(["ip", "netns", "add", _space("x")], capture_output=True, text=True)
    if trial.returncode:
        return f"needs network namespaces: {trial.stderr.strip()}"
    _call("ip", "netns", "delete", _space("x"))
    return None


class Hosts:
    """node1, node2, ... from the beginning to the end of a `with`.

    Args:
        folder: where keys and configurations lie.
        environment: variables that every process of a launch gets.
        mounts: folders that a host sees in the place of others: host -> (folder, place).
    """

    def __init__(
        self,
        folder: Path,
        count: int,
        environment: Mapping[str, str],
        mounts: Mapping[str, Sequence[tuple[Path, Path]]] | None = None,
    ) -> None:
        self.folder, self.names = folder, [f"node{number}" for number in range(1, count + 1)]
        self._mounts = mounts or {}
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = dict(environment)

    def __enter__(self) -> "Hosts":
        self._remove()
        try:
            self._configure()
            _call("ip", "link", "add", _link("b"), "type", "bridge")
            _call("ip", "link", "set", _link("b"), "up")
            for number, name in enumerate(self.names, 1):
                self._add(number, name)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def hostfile(self, names: Sequence[str], slots: int = 1) -> Path:
        """A hostfile of these hosts, for DeepSpeed."""
        path = self.folder / "-".join(["hostfile", *names])
        path.write_text("".join(f"{name} slots={slots}\n" for name in names))
        return path

    def start(
        self, command: Sequence[object], output: Path, host: str = "node1"
    ) -> "subprocess.Popen[bytes]":
        """Start a command on a host, its output in a file."""
        environment = os.environ | self._environment | {"DS_ENV_FILE": str(self.folder / "env")}
        environment["PATH"] = f"{self.folder / 'bin'}:{self._environment['PATH']}"
        with output.open("wb") as file:
            return subprocess.Popen(
                self._on(host, *command),
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def tear_down(self, name: str) -> None:
        """End a host: its processes, and its network without a farewell."""
        _call("ip", "netns", "exec", _space(name), "ip", "link", "set", "eth0", "down")
        for pid in _output("ip", "netns", "pids", _space(name)).split():
            subprocess.run(["kill", "-9", pid], check=False)

    def link(self, name: str, state: str) -> None:
        """Set the bridge's end of a host's link up or down."""
        _call("ip", "link", "set", _link(name), state)

    def shape(self, rate: str | None) -> None:
        """Let every host send at most at a rate, as tc spells it (200mbit); None: as it can."""
        for name in self.names:
            inside = ("ip", "netns", "exec", _space(name), "tc", "qdisc")
            subprocess.run([*inside, "delete", "dev", "eth0", "root"], capture_output=True)
            if rate is not None:
                limits = ("tbf", "rate", rate, "burst", "128kb", "latency", "200ms")
                _call(*inside, "add", "dev", "eth0", "root", *limits)

    def _configure(self) -> None:
        folder = self.folder
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        for key in ("host_key", "user_key"):
            (folder / key).unlink(missing_ok=True)
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        (folder / "sshd_config").write_text(
            f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\n"
            "PermitRootLogin yes\nStrictModes no\nUsePAM no\nPidFile none\nMaxStartups 50\n"
        )
        (folder / "ssh_config").write_text(
            f"IdentityFile {folder}/user_key\nStrictHostKeyChecking no\nLogLevel ERROR\n"
            "UserKnownHostsFile /dev/null\nConnectTimeout 10\n"
            "ServerAliveInterval 10\nServerAliveCountMax 3\n"
        )
        ssh = folder / "bin/ssh"
        ssh.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {folder}/ssh_config "$@"\n')
        ssh.chmod(0o755)
        lines = [f"{name}={value}\n" for name, value in self._environment.items()]
        (folder / "env").write_text("".join(lines))
        Path("/run/sshd").mkdir(exist_ok=True)

    def _add(self, number: int, name: str) -> None:
        space = _space(name)
        names = Path("/etc/netns") / space / "hosts"
        names.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{SUBNET}.{n} {host}" for n, host in enumerate(self.names, 1)]
        own = f"127.0.1.1 {name}"  # as Debian has it
        lines.append(f"{SUBNET}.{len(self.names) + 1} absent")
        names.write_text("\n".join(["127.0.0.1 localhost", own, *lines, ""]))
        _call("ip", "netns", "add", space)
        ends = ("type", "veth", "peer", "name", "eth0", "netns", space)
        _call("ip", "link", "add", _link(name), *ends)
        _call("ip", "link", "set", _link(name), "master", _link("b"), "up")
        inside = ("ip", "netns", "exec", space, "ip")
        _call(*inside, "address", "add", f"{SUBNET}.{number}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _call(*inside, "link", "set", device, "up")
        command = self._on(name, shutil.which("sshd", path=SBIN), "-D", "-f", "sshd_config")
        self._servers[name] = subprocess.Popen(
            [*command[:-1], str(self.folder / "sshd_config")], stderr=subprocess.DEVNULL
        )

    def _on(self, name: str, *command: object) -> list[str]:
        """The command line of a command on a host, which knows its own name."""
        mounts = [
            f"mount --rbind {folder} {place}; " for folder, place in self._mounts.get(name, ())
        ]
        script = f'hostname "$0"; {"".join(mounts)}cd "$PWD"; exec "$@"'
        place = ["ip", "netns", "exec", _space(name), "unshare", "--uts"]
        return [*place, "sh", "-c", script, name, *map(str, command)]

    def _remove(self) -> None:
        for server in self._servers.values():
            server.kill()
            server.wait()
        self._servers.clear()
        for line in _output("ip", "netns", "list").splitlines():
            space = line.split()[0]
            owner = re.match(r"irpe(\d+)-", space)
            if owner is None or (int(owner[1]) != os.getpid() and psutil.pid_exists(int(owner[1]))):
                continue  # another suite's, which is running
            for pid in _output("ip", "netns", "pids", space).split():
                subprocess.run(["kill", "-9", pid], check=False)
            time.sleep(0.1)
            _call("ip", "netns", "delete", space)
            subprocess.run(["ip", "link", "delete", f"irpe{owner[1]}b"], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)
        subprocess.run(["ip", "link", "delete", _link("b")], capture_output=True)


def _space(name: str) -> str:
    """The network namespace of a host."""
    return f"{PREFIX}-{name}"


def _link(name: str) -> str:
    """A host's end on the bridge, or the bridge; 15 characters at most, says Linux."""
    return f"{PREFIX}{name.removeprefix('node')}"


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def python_environment() -> dict[str, str]:
    """What a process needs to be one of ours: this Python first, one thread, the CPU."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:{SBIN}"
    return {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
