"""Do all ranks run the same thing? A node with other software or other data is named at once."""

import hashlib
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from irpe_ds.cluster.process_group import Ranks
from irpe_ds.config import RunConfig
from irpe_ds.errors import ClusterError
from irpe_ds.provenance import commit, package_versions, source_hash

SOURCE = "the source of irpe_ds"
"""Compared by its hash; the commit is told too, where git knows it."""


def check_consistency(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Compare what all ranks have found.

    Raises:
        ClusterError: on every rank; names the first rank, and its host, that is not as most are.
    """
    found = zip(ranks.hostnames, ranks.all_gather(facts), strict=True)
    compare([(f"rank {rank} on {host}", theirs) for rank, (host, theirs) in enumerate(found)])


def software(config: RunConfig) -> dict[str, str]:
    """Versions, source and configuration: what can differ before a rank has opened a file."""
    return {
        "Python": platform.python_version(),
        SOURCE: f"{source_hash()} (commit {commit() or 'unknown'})",
        **package_versions(),
        "the configuration": hashlib.sha256(config.dump().encode()).hexdigest()[:12],
    }


def compare(found: Sequence[tuple[str, Mapping[str, str]]]) -> None:
    """Raise the first of the `differences`, if there is one."""
    for difference in differences(found):
        raise difference


def differences(found: Sequence[tuple[str, Mapping[str, str]]]) -> Iterator[ClusterError]:
    """Where facts are not those of most; of each (who, facts)."""
    for fact in dict.fromkeys(fact for _, facts in found for fact in facts):
        values = [facts.get(fact, "none") for _, facts in found]
        compared = [value.split()[0] if fact == SOURCE else value for value in values]
        ((usual, _),) = Counter(compared).most_common(1)
        for (who, _), value, own in zip(found, values, compared, strict=True):
            if own != usual:
                first = compared.index(usual)
                expected = f"{fact} {values[first]}, as {found[first][0]} has"
                yield ClusterError(who, expected, value)
