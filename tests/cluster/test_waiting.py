"""Whatever waits says so every half minute."""

import time

import pytest

from irpe_ds.cluster import waiting
from irpe_ds.cluster.waiting import Waiting


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SECONDS", 0.02)


def wait_for(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    found, end = "", time.monotonic() + 60
    while text not in found:
        assert time.monotonic() < end, found
        time.sleep(0.01)
        found += capfd.readouterr().err


def test_it_is_said_again_and_again(capfd: pytest.CaptureFixture[str]) -> None:
    ranks = ["rank 1", "rank 2"]
    with Waiting(lambda: f"waiting for {', '.join(ranks)}") as wait:
        wait_for("waiting for rank 1, rank 2: 0 s so far\n", capfd)
        ranks.pop()
        wait_for("waiting for rank 1: 0 s so far\n", capfd)
        wait.next("update 5")
        wait_for("update 5: 0 s so far\n", capfd)


def test_nothing_is_said_where_something_happens(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "SECONDS", 60.0)
    with Waiting("update 1") as wait, Waiting("a checkpoint", active=False):
        wait.next("update 2")
    assert capfd.readouterr().err == ""
