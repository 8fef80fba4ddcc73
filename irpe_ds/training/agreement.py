"""Do all ranks run the same thing? A node with other software or other data is named at once."""

import hashlib
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from irpe_ds.config import RunConfig
from irpe_ds.data.dataset import DatasetInfo
from irpe_ds.errors import ConfigError
from irpe_ds.ops import dispatch
from irpe_ds.ops.dispatch import Choice
from irpe_ds.training.distributed import Ranks
from irpe_ds.training.record import commit, package_versions

SOURCE = "the source of irpe_ds"
"""Compared by its hash; the commit is told too, where git knows it."""
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")


def check_agreement(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Compare what all ranks have found.

    Raises:
        ConfigError: on every rank; names the first rank, and its host, that is not as most are.
    """
    found = zip(ranks.names, ranks.gather(facts), strict=True)
    compare([(f"rank {rank} on {host}", theirs) for rank, (host, theirs) in enumerate(found)])


def software(config: RunConfig) -> dict[str, str]:
    """Versions, source and configuration: what can differ before a rank has opened a file."""
    return {
        "Python": platform.python_version(),
        SOURCE: f"{source_hash()} (commit {commit() or 'unknown'})",
        **package_versions(),
        "the configuration": hashlib.sha256(config.dump().encode()).hexdigest()[:12],
    }


def inputs(data: Mapping[str, DatasetInfo], op: Choice) -> dict[str, str]:
    """The data, and what computes."""
    found = {f"data.{part}": describe_data(info) for part, info in data.items()}
    return {**found, "the attention op": op.name}


def compare(found: Sequence[tuple[str, Mapping[str, str]]]) -> None:
    """Raise the first of the `differences`, if there is one."""
    for difference in differences(found):
        raise difference


def differences(found: Sequence[tuple[str, Mapping[str, str]]]) -> Iterator[ConfigError]:
    """Where facts are not those of most; of each (who, facts)."""
    for fact in dict.fromkeys(fact for _, facts in found for fact in facts):
        values = [facts.get(fact, "none") for _, facts in found]
        compared = [value.split()[0] if fact == SOURCE else value for value in values]
        ((usual, _),) = Counter(compared).most_common(1)
        for (who, _), value, own in zip(found, values, compared, strict=True):
            if own != usual:
                first = compared.index(usual)
                expected = f"{fact} {values[first]}, as {found[first][0]} has"
                yield ConfigError(who, expected, value)


def source_hash() -> str:
    """Hash of the source, the same for a wheel and a working tree."""
    roots = Path(__file__).parents[1], Path(dispatch.__file__).parent
    paths = {path for r in roots for path in r.rglob("*.*") if path.suffix in SUFFIXES}
    hashes = sorted({hashlib.sha256(path.read_bytes()).digest() for path in paths})
    return hashlib.sha256(b"".join(hashes)).hexdigest()[:12]


def describe_data(info: DatasetInfo) -> str:
    """What tells a set of images from another: its hash, or its size where there is none."""
    manifest = info.manifest
    return f"{info.num_samples} images" if manifest is None else manifest.sha256[:12]
