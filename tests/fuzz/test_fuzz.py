"""Damage of every kind to every file that is read: a clear error, or what was written.

IRPE_FUZZ=SEED:CASES tries others than the usual ones.
"""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import start
from tests.fuzz.kinds import KINDS, Kind, damage
from tests.fuzz.process import Outcome, run

SEED, CASES = map(int, os.environ.get("IRPE_FUZZ", "0:66").split(":"))


def faults(name: str, cases: int, folder: Path) -> Iterator[str]:
    """What went wrong; called in a process that has no threads, so that it can fork."""
    kind, tried = KINDS[name], Counter[str]()
    (folder / "case").mkdir()
    kind.make(folder / "case")
    (folder / "case").rename(folder / "good")  # which is copied back: a conversion knows its path
    expected = run(lambda: kind.read(copy(folder)))
    if expected.how != "read":
        yield f"undamaged: {expected}"
        return
    for number in range(cases):
        rng = random.Random(f"{SEED} {name} {number}")
        what = damage(copy(folder), kind, rng)
        found = run(lambda: kind.read(folder / "case"))
        tried[found.how] += 1
        if fault := fault_of(kind, expected, found, what):
            yield f"case {number}, {what}: {fault}"
    (folder / "tried.json").write_text(json.dumps(tried))


def fault_of(kind: Kind, expected: Outcome, found: Outcome, what: str) -> str:
    if found.how == "read":
        differs = kind.exact and found.text not in (expected.text, "damage found")
        return f"accepted, and differs: {found.text}" if differs else ""
    if found.how == "error":
        long = len(found.text) > 2000
        return f"a message of {len(found.text)} characters" if long else ""
    return f"{found.how}: {found.text}"


def copy(folder: Path) -> Path:
    shutil.rmtree(folder / "case", ignore_errors=True)
    shutil.copytree(folder / "good", folder / "case", symlinks=True)
    return folder / "case"


def work(name: str, cases: int, folder: Path) -> None:
    (folder / "faults.json").write_text(json.dumps(list(faults(name, cases, folder))))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    process = start(work, name, CASES, tmp_path)
    process.join()
    assert process.exitcode == 0
    found = json.loads((tmp_path / "faults.json").read_text())
    assert not found, f"{len(found)} of {CASES}:\n" + "\n".join(found)
