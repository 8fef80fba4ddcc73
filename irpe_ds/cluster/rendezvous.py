"""Before anything else the ranks meet: who does not come is named, with the host it should be on.

They meet at a store on the host of rank 0, and learn there which network interface leads from each
host to the others.
"""

import ipaddress
import json
import os
import socket
import time
from datetime import timedelta

import psutil
from torch.distributed import PrefixStore, Store, TCPStore

from irpe_ds.cluster import launchers
from irpe_ds.errors import ClusterError

SETTING = "train.join_seconds"
INTERFACE = "GLOO_SOCKET_IFNAME"
FAREWELL = 5.0
"""Seconds that rank 0 leaves to the others to read why the run ends."""


def rendezvous(
    rank: int, world_size: int, seconds: float, fault: ClusterError | None = None
) -> Store:
    """Wait until all ranks have come, so long at most; the store that they met at.

    Over several nodes the network interface is set, unless the user has chosen one.

    Args:
        fault: why this rank cannot take part, for all to know.

    Raises:
        ClusterError: on every rank that came: a rank did not, or one has a fault.
    """
    here = socket.gethostname()
    fault = fault or _interface_fault(here)
    address = _local_address(os.environ["MASTER_ADDR"], here)
    store = _open(rank, seconds)
    note = {"host": here, "address": address, "fault": fault and _parts(fault)}
    store.set(str(rank), json.dumps(note))
    store.add("come", 1)
    if rank == 0:
        store.set("all", json.dumps(_wait_for_all(store, world_size, seconds)))
    try:
        store.wait(["all"], timedelta(seconds=seconds + FAREWELL))
        found = json.loads(store.get("all"))
        read = store.add("read", 1)
    except RuntimeError as error:
        raise _no_first(seconds, "no more of it") from error
    if found["fault"]:
        end = time.monotonic() + FAREWELL
        while rank == 0 and read < found["come"] and time.monotonic() < end:
            time.sleep(0.05)
            read = store.add("read", 0)
        raise ClusterError(*found["fault"])
    if int(os.environ["LOCAL_WORLD_SIZE"]) < world_size:
        if _is_loopback(address) and found["remote"]:
            address = _local_address(found["remote"], here)
        set_interface(address)
    return PrefixStore("torch", store)


def set_interface(address: str) -> None:
    """Let gloo use the interface of a local address, unless the user has chosen.

    Left alone, gloo takes the one that the host's own name leads to: on Debian, 127.0.1.1. NCCL
    looks for itself, and may use several.
    """
    name = _interface(address)
    if name is not None:
        os.environ.setdefault(INTERFACE, name)


def interface_to(target: str, here: str) -> str | None:
    """The interface by which packets to a host leave this one; loopback from a host to itself."""
    return _interface(_local_address(target, here))


def describe(ranks: list[int], hosts: list[str] | None) -> str:
    """Ranks and their hosts, in words: `rank 1 on a, ranks 2, 3 on b`."""
    together: dict[str, list[int]] = {}
    for rank in ranks:
        together.setdefault(f" on {hosts[rank]}" if hosts else "", []).append(rank)
    return ", ".join(
        f"rank{'s' if len(some) > 1 else ''} {', '.join(map(str, some))}{host}"
        for host, some in together.items()
    )


def _open(rank: int, seconds: float) -> Store:
    """The store of this start; torchrun's agent has one ready, which outlives a restart."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    patience = timedelta(seconds=seconds)
    if not serves:
        _wait_for_first(address, port, seconds)
    try:
        store = TCPStore(address, port, None, serves, patience, wait_for_workers=False)
    except RuntimeError as error:
        if serves:
            where = f"MASTER_PORT on {socket.gethostname()}"
            reason = str(error).splitlines()[0]
            raise ClusterError(where, "a free port", f"{port}: {reason}") from error
        raise _no_first(seconds, error) from error
    return PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait_for_first(address: str, port: int, seconds: float) -> None:
    """Until something answers there; PyTorch's own waiting may take twice as long."""
    end = time.monotonic() + seconds
    while True:
        try:
            patience = min(5.0, max(1.0, end - time.monotonic()))
            socket.create_connection((address, port), patience).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise _no_first(seconds, error) from error
        time.sleep(0.1)


def _wait_for_all(store: Store, world_size: int, seconds: float) -> dict[str, object]:
    """What rank 0 tells all: a fault, if there is one, and an address that is not loopback."""
    end = time.monotonic() + seconds
    while store.add("come", 0) < world_size and time.monotonic() < end:
        time.sleep(0.05)
    ranks = range(world_size)
    notes = {rank: json.loads(store.get(str(rank))) for rank in ranks if store.check([str(rank)])}
    absent = [rank for rank in ranks if rank not in notes]
    faults = [note["fault"] for note in notes.values() if note["fault"]]
    if absent and not faults:
        faults = [_parts(_absent(absent, [note["host"] for note in notes.values()], seconds))]
    addresses = [note["address"] for note in notes.values()]
    return {
        "fault": faults[0] if faults else None,
        "come": len(notes),
        "remote": next((a for a in addresses if not _is_loopback(a)), None),
    }


def _absent(absent: list[int], came: list[str], seconds: float) -> ClusterError:
    hosts = launchers.hosts_of_ranks(os.environ, next(iter(launchers.parents()), []))
    names = "" if hosts else f", only ranks on {', '.join(dict.fromkeys(came))}"
    expected = f"to join within {seconds:g} s ({SETTING})"
    return ClusterError(describe(absent, hosts), expected, f"no sign of life{names}")


def _no_first(seconds: float, got: object) -> ClusterError:
    place = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
    return ClusterError(f"rank 0 on {place}", f"an answer within {seconds:g} s ({SETTING})", got)


def _interface_fault(here: str) -> ClusterError | None:
    """What is wrong with the interfaces that the user has chosen for gloo."""
    there = psutil.net_if_addrs()
    for name in filter(None, os.environ.get(INTERFACE, "").split(",")):
        if name not in there:
            return ClusterError(f"{INTERFACE} on {here}", f"one of {', '.join(there)}", name)
    return None


def _local_address(target: str, here: str) -> str:
    """The address of this host that packets to another one leave from."""
    try:
        family, _, _, _, place = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ClusterError(here, f"a way to {target}", error) from error


def _interface(address: str) -> str | None:
    """Name of the interface that has a local address."""
    there = psutil.net_if_addrs().items()
    return next((name for name, of in there if any(x.address == address for x in of)), None)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def _parts(fault: ClusterError) -> tuple[str, str, str]:
    return str(fault.where), fault.expected, str(fault.got)
