"""Damage of every kind to every file that is read: a clear error, or what was written.

IRPE_FUZZ=SEED:CASES tries others than the usual ones.
"""

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import start
from tests.fuzz import mutations
from tests.fuzz.kinds import KINDS, Kind
from tests.fuzz.process import Outcome, run

SEED, CASES = map(int, os.environ.get("IRPE_FUZZ", "0:60").split(":"))


def faults(name: str, cases: int, folder: Path) -> Iterator[str]:
    """What went wrong; called in a process that has no threads, so that it can fork."""
    kind = KINDS[name]
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
        if fault := fault_of(kind, expected, found, what):
            yield f"case {number}, {what}: {fault}"


def damage(folder: Path, kind: Kind, rng: random.Random) -> str:
    """Damage one of the victims; which, and how."""
    victims = sorted({path for pattern in kind.victims for path in folder.glob(pattern)})
    victim = rng.choice([path for path in victims if path.is_file()])
    if rng.random() < 0.03:
        mutations.replaced(victim, rng)
        return f"{victim.name}: replaced"
    mutate = rng.choice(kind.mutations)
    data = victim.read_bytes()
    try:
        new = mutate(data, rng) if data else b"x"
    except (ValueError, IndexError):  # nothing that this damage could hit
        mutate, new = mutations.flipped, mutations.flipped(data, rng)
    victim.write_bytes(new)
    return f"{victim.name}: {mutate.__name__}" + (" (no change)" if new == data else "")


def fault_of(kind: Kind, expected: Outcome, found: Outcome, what: str) -> str:
    if found.how == "read":
        differs = kind.exact and found.text not in (expected.text, "damage found")
        return f"accepted, and differs: {found.text}" if differs else ""
    if found.how == "error":
        long = len(found.text) > 3000
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
