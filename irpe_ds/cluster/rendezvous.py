"""The rendezvous of all ranks at start-up: ranks that do not join are named, with their hosts.

Ranks join at a store on the host of rank 0, and learn there which network interface of each host
leads to the others.
"""

import ipaddress
import json
import os
import secrets
import socket
import time
from datetime import timedelta

import psutil
from torch.distributed import PrefixStore, Store, TCPStore

from irpe_ds.cluster import launchers
from irpe_ds.cluster.waiting import Waiting
from irpe_ds.errors import ClusterError

TIMEOUT_KEY = "train.join_seconds"
INTERFACE = "GLOO_SOCKET_IFNAME"
ERROR_GRACE_SECONDS = 5.0
"""How long rank 0 keeps the store open for the others to read why the run ends."""


def rendezvous(
    rank: int, world_size: int, seconds: float, error: ClusterError | None = None
) -> Store:
    """Wait until all ranks have joined, `seconds` at most; the store that they joined at.

    With several nodes the network interface is set, unless the user has chosen one.

    Args:
        error: why this rank cannot take part, to be raised on all ranks.

    Raises:
        ClusterError: on every rank that joined: a rank is missing or cannot take part.
    """
    here = socket.gethostname()
    error = error or _interface_error(here)
    address = _local_address(os.environ["MASTER_ADDR"], here)
    store = _open_store(rank, seconds)
    entry = {"host": here, "address": address, "error": error and _error_arguments(error)}
    own = json.dumps(entry | {"id": secrets.token_hex(8)})
    if store.compare_set(str(rank), "", own) != own.encode():
        raise _other_run(f"rank {rank} has joined already")
    store.add("joined", 1)
    if rank == 0:
        store.set("outcome", json.dumps(_wait_for_all(store, world_size, seconds)))
    try:
        store.wait(["outcome"], timedelta(seconds=seconds + ERROR_GRACE_SECONDS))
        outcome = json.loads(store.get("outcome"))
        read = store.add("read", 1)
    except RuntimeError as lost:
        where = f"rank 0 at {os.environ['MASTER_ADDR']}"
        raise ClusterError(f"{where} stopped responding while ranks were joining") from lost
    if outcome["world_size"] != world_size:
        raise _other_run(f"it has {outcome['world_size']} ranks, this one {world_size}")
    if outcome["error"]:
        deadline = time.monotonic() + ERROR_GRACE_SECONDS
        while rank == 0 and read < outcome["joined"] and time.monotonic() < deadline:
            time.sleep(0.05)
            read = store.add("read", 0)
        raise ClusterError(*outcome["error"])
    if int(os.environ["LOCAL_WORLD_SIZE"]) < world_size:
        if _is_loopback(address) and outcome["remote"]:
            address = _local_address(outcome["remote"], here)
        set_interface(address)
    return PrefixStore("torch", store)


def set_interface(address: str) -> None:
    """Make gloo use the interface of a local address, unless the user has chosen one.

    By default gloo takes the one that the host's own name resolves to: 127.0.1.1 on Debian. NCCL
    finds interfaces by itself, and may use several.
    """
    name = _interface(address)
    if name is not None:
        os.environ.setdefault(INTERFACE, name)


def interface_to(target: str, here: str) -> str | None:
    """The interface by which packets to a host leave this one; loopback from a host to itself."""
    return _interface(_local_address(target, here))


def name_ranks(ranks: list[int], hosts: list[str] | None) -> str:
    """Ranks and their hosts, in words: `rank 1 on a, ranks 2, 3 on b`."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(f" on {hosts[rank]}" if hosts else "", []).append(rank)
    return ", ".join(
        f"rank{'s' if len(some) > 1 else ''} {', '.join(map(str, some))}{host}"
        for host, some in by_host.items()
    )


def _open_store(rank: int, seconds: float) -> Store:
    """The store of this start. torchrun's agent serves one, which survives its restarts."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and not launchers.serves_store(os.environ)
    timeout = timedelta(seconds=seconds)
    if not serves:
        with Waiting(f"[rank {rank}] waiting for rank 0 at {address}, port {port}"):
            _wait_for_server(address, port, seconds)
    try:
        store = TCPStore(address, port, None, serves, timeout, wait_for_workers=False)
    except RuntimeError as error:
        if serves:
            raise launchers.port_error(port, str(error).splitlines()[0]) from error
        raise _no_answer(seconds, error) from error
    return PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait_for_server(address: str, port: int, seconds: float) -> None:
    """Wait until rank 0 accepts connections; torch 2.12's TCPStore may wait twice its timeout."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            timeout = min(5.0, max(1.0, deadline - time.monotonic()))
            socket.create_connection((address, port), timeout).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise _no_answer(seconds, error) from error
        time.sleep(0.1)


def _wait_for_all(store: Store, world_size: int, seconds: float) -> dict[str, object]:
    """What rank 0 tells all ranks: an error if there is one, and an address not on loopback."""
    deadline = time.monotonic() + seconds
    ranks = range(world_size)

    def missing_ranks() -> list[int]:
        return [rank for rank in ranks if not store.check([str(rank)])]

    def awaited() -> str:
        return f"[rank 0] waiting for {name_ranks(missing_ranks(), _hosts())} to join"

    with Waiting(awaited):
        while store.add("joined", 0) < world_size and time.monotonic() < deadline:
            time.sleep(0.05)
    missing = missing_ranks()
    entries = {rank: json.loads(store.get(str(rank))) for rank in ranks if rank not in missing}
    errors = [entry["error"] for entry in entries.values() if entry["error"]]
    if missing and not errors:
        hosts = [entry["host"] for entry in entries.values()]
        errors = [_error_arguments(_missing_ranks(missing, hosts, seconds))]
    addresses = [entry["address"] for entry in entries.values()]
    return {
        "error": errors[0] if errors else None,
        "joined": len(entries),
        "world_size": world_size,
        "remote": next((a for a in addresses if not _is_loopback(a)), None),
    }


def _missing_ranks(missing: list[int], joined_hosts: list[str], seconds: float) -> ClusterError:
    hosts = _hosts()
    names = ", ".join(dict.fromkeys(joined_hosts))
    known = "" if hosts else f"; only ranks on {names} did"
    return ClusterError(
        f"{name_ranks(missing, hosts)} did not join within {seconds:g} s ({TIMEOUT_KEY}){known}"
    )


def _hosts() -> list[str] | None:
    """The host that each rank should run on, if the launcher says so."""
    return launchers.hosts_of_ranks(os.environ, next(iter(launchers.parent_commands()), []))


def _no_answer(seconds: float, reason: object) -> ClusterError:
    where = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
    return ClusterError(
        f"rank 0 at {where} did not answer within {seconds:g} s ({TIMEOUT_KEY}): {reason}"
    )


def _other_run(reason: str) -> ClusterError:
    where = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
    other = "take another port with deepspeed's --master_port, or MASTER_PORT"
    return ClusterError(f"another run is at {where} ({reason}): {other}")


def _interface_error(here: str) -> ClusterError | None:
    """What is wrong with the interfaces that the user has chosen for gloo."""
    interfaces = psutil.net_if_addrs()
    for name in filter(None, os.environ.get(INTERFACE, "").split(",")):
        if name not in interfaces:
            return ClusterError(f"{INTERFACE} on {here}", f"one of {', '.join(interfaces)}", name)
    return None


def _local_address(target: str, here: str) -> str:
    """The address of this host from which packets to another one are sent."""
    try:
        family, _, _, _, place = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ClusterError(f"{here} has no route to {target}: {error}") from error


def _interface(address: str) -> str | None:
    """Name of the interface that has a local address."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, of in interfaces if any(x.address == address for x in of)), None)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def _error_arguments(error: ClusterError) -> tuple[str, str, str]:
    """Arguments that make the same error again, as JSON."""
    return str(error.where), error.expected, str(error.got)
