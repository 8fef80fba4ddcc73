"""Processes forked from a server that has paid for the imports, to be killed at will.

multiprocessing has one such server. It keeps the environment and the modules that it starts with,
so all tests start it here: with another number of threads the same run rounds differently.
"""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any
from unittest import mock

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "tests.launch.ranks",
        "irpe_ds.data.beton.shards",
        "irpe_ds.training.trainer",
        "tests.compiled",
    ]
)


def start(target: Callable[..., object], *args: Any, **kwargs: Any) -> ForkServerProcess:
    """A process that calls target."""
    process = CONTEXT.Process(target=target, args=args, kwargs=kwargs)
    with mock.patch.dict(os.environ, ENVIRONMENT):
        process.start()
    return process
