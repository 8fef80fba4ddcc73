"""Heartbeats: what they do while a rank is ending."""

from typing import Any, NoReturn

import pytest
import torch

from irpe_ds.cluster.heartbeat import Heartbeat
from irpe_ds.cluster.process_group import Ranks


class GoneStore:
    """A store that rank 0 has closed, while the rank that asks is ending too."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat

    def set(self, *_: Any) -> NoReturn:
        self.heartbeat._stopping.set()
        raise RuntimeError("Connection reset by peer")


def test_a_rank_that_is_ending_hears_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    device = torch.device("cpu")
    heartbeat = Heartbeat(
        Ranks(rank=1, world_size=2, device=device, cpu_group=None, hostnames=["a", "b"])
    )
    heartbeat.silence = 0.01
    heartbeat.store = GoneStore(heartbeat)  # type: ignore[assignment]
    heartbeat._beat()
    assert capsys.readouterr().err == ""
