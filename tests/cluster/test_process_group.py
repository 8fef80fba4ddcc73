"""An error of one rank is raised on all: of its class, with the rank's name on the others."""

import resource

import pytest
import torch

from irpe_ds.cluster.process_group import Ranks, allow_connections
from irpe_ds.errors import CheckpointError, ConfigError, DataError, UserError

ERRORS = [
    ConfigError("train.epochs", "an integer", "many"),
    DataError("train.beton has 3 bytes too few"),
    CheckpointError("cannot write checkpoint: no space left on device"),
]


def rank(number: int, monkeypatch: pytest.MonkeyPatch, errors: list[UserError | None]) -> Ranks:
    """A rank of a run in which all ranks have these errors."""
    monkeypatch.setattr(Ranks, "all_gather", lambda self, own: errors)
    hosts = [f"node{n}" for n in range(len(errors))]
    return Ranks(
        rank=number,
        world_size=len(errors),
        device=torch.device("cpu"),
        cpu_group=None,
        hostnames=hosts,
    )


@pytest.mark.parametrize("error", ERRORS)
def test_the_others_name_the_rank_that_failed(
    error: UserError, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(type(error)) as raised:
        rank(0, monkeypatch, [None, None, error]).run_checked(lambda: 5)
    assert type(raised.value) is type(error)
    assert str(raised.value) == f"rank 2 on node2: {error}"


@pytest.mark.parametrize("error", ERRORS)
def test_the_rank_that_failed_raises_its_own_error(
    error: UserError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        rank(1, monkeypatch, [ERRORS[0], error]).run_checked(fail)
    assert raised.value is error


def test_without_errors_it_is_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank(0, monkeypatch, [None, None]).run_checked(lambda: 5) == 5


@pytest.mark.parametrize("error", [None, ERRORS[1]])
def test_the_others_ask_until_what_takes_long_is_done(
    error: UserError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def work() -> int:
        if error is not None:
            raise error
        return 5

    def any_rank(_: Ranks, busy: bool) -> bool:
        asked.append(busy)
        return len(asked) < 3  # as if another minute had passed

    monkeypatch.setattr(Ranks, "any_rank", any_rank)
    main = rank(0, monkeypatch, [None])
    if error is None:
        assert main.on_rank0_at_length(work) == 5
    else:
        with pytest.raises(DataError, match="3 bytes too few"):
            main.on_rank0_at_length(work)
    assert asked == [False] * 3


def test_rank_0_may_have_connections_of_4096_ranks() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, limits[1]))
        allow_connections(4096)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(limits[1], 1024 + 8 * 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
