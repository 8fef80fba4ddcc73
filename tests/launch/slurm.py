"""A SLURM of this machine alone: two nodes that are namespaces of processes and of names.

Root, util-linux and Debian's packages slurmctld, slurmd, slurm-client and munge are needed.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from tests.launch.hosts import SBIN
from tests.launch.ranks import free_port

ROOT = Path(__file__).parents[2]
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
NODES = ("node1", "node2")
APART = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillOnBadExit=1
KillWait=60
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why SLURM cannot run here; None where it can."""
    if os.geteuid() != 0:
        return "needs root"
    lacking = [tool for tool in TOOLS if shutil.which(tool, path=_path()) is None]
    if lacking:
        return f"needs {', '.join(lacking)} (slurmctld, slurmd, slurm-client, munge, util-linux)"
    trial = subprocess.run([*APART, "true"], capture_output=True, text=True)
    return f"needs namespaces: {trial.stderr.strip()}" if trial.returncode else None


class Slurm:
    """The daemons from the beginning to the end of a `with`.

    A job that is requeued may start again after 6 seconds, and one that is preempted has a minute.

    Args:
        folder: where keys, states and logs lie.
        environment: variables that every job gets.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self._environment = os.environ | dict(environment)
        self._environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path(environment)}
        self._daemons = ExitStack()

    def __enter__(self) -> "Slurm":
        with ExitStack() as stack:
            self._daemons = stack
            self._configure()
            munge = f"--socket={self.folder}/munge.socket --pid-file={self.folder}/munge.pid"
            key = f"--key-file={self.folder}/munge.key --seed-file={self.folder}/munge.seed"
            self._start("munged", f"munged --foreground --force {key} {munge}")
            self._wait("munge.socket", (self.folder / "munge.socket").exists)
            self._start("slurmctld", "slurmctld -D")
            for node in NODES:
                names = f"mount --bind {self.folder}/hosts /etc/hosts"
                self._start(node, f"hostname {node} && {names} && slurmd -D -N {node}")
            self._wait("nodes", lambda: self._run("sinfo", "-ho", "%D %t").stdout == "2 idle\n")
            self._daemons = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._daemons.close()

    def call(self, *command: object) -> str:
        """A command of SLURM, in the repository's root; what it says."""
        done = self._run(*map(str, command))
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def job(self, name: str) -> dict[str, str]:
        """What SLURM knows of a job, or of an element ID_NUMBER of an array."""
        words = self.call("scontrol", "show", "--oneliner", "job", name).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, name: str, state: str, seconds: float = 180) -> dict[str, str]:
        """Wait until a job is in this state; what SLURM knows of it."""
        end = time.monotonic() + seconds
        while (job := self.job(name))["JobState"] != state:
            found = f"{job['JobState']}: {self.log(name)}"
            assert job["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), found
            assert time.monotonic() < end, found
            time.sleep(0.2)
        return job

    def log(self, name: str) -> str:
        """What a job has written."""
        path = Path(self.job(name)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def _configure(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {' '.join(NODES)}\n")
        text = CONFIGURATION.format(folder=self.folder, controller=free_port())
        for node in NODES:
            address = f"NodeHostname=localhost NodeAddr=127.0.0.1 Port={free_port()}"
            text += f"NodeName={node} {address} CPUs=2\n"
        (self.folder / "slurm.conf").write_text(text)

    def _start(self, name: str, command: str) -> None:
        """A daemon whose processes all end with it."""
        with (self.folder / f"{name}.out").open("wb") as output:
            daemon = subprocess.Popen(
                [*APART, "sh", "-c", f"{command}; exit"],  # not exec: a shell reaps orphans
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._daemons.callback(daemon.wait)
        self._daemons.callback(daemon.kill)

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not ready():
            logs = "\n".join(log.read_text() for log in self.folder.glob("*.log"))
            assert time.monotonic() < end, f"no {what}: {logs}"
            time.sleep(0.1)

    def _run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        env = self._environment
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def _path(environment: Mapping[str, str] = os.environ) -> str:
    return f"{environment['PATH']}:{SBIN}"
