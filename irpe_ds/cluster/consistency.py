"""Do all ranks run the same software on the same data? The first one that differs is named."""

import hashlib
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from irpe_ds.cluster.process_group import Ranks
from irpe_ds.config import RunConfig
from irpe_ds.errors import ClusterError
from irpe_ds.provenance import commit, package_versions, source_hash

SOURCE = "the source of irpe_ds"
"""Compared by its hash; the git commit is shown too when available."""


def check_consistency(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Compare the facts of all ranks.

    Raises:
        ClusterError: on every rank; names the first rank, and its host, that differs from most.
    """
    gathered = zip(ranks.hostnames, ranks.all_gather(facts), strict=True)
    compare([(f"rank {rank} on {host}", theirs) for rank, (host, theirs) in enumerate(gathered)])


def software_facts(config: RunConfig) -> dict[str, str]:
    """Versions, source and configuration: all that can be compared before any file is opened."""
    return {
        "Python": platform.python_version(),
        SOURCE: f"{source_hash()} (commit {commit() or 'unknown'})",
        **package_versions(),
        "the configuration": hashlib.sha256(config.dump().encode()).hexdigest()[:12],
    }


def compare(facts_by_name: Sequence[tuple[str, Mapping[str, str]]]) -> None:
    """Raise the first of the `differences`, if there is one."""
    for difference in differences(facts_by_name):
        raise difference


def differences(
    facts_by_name: Sequence[tuple[str, Mapping[str, str]]],
) -> Iterator[ClusterError]:
    """An error for each (name, facts) and fact that differs from the most common value."""
    for fact in dict.fromkeys(fact for _, facts in facts_by_name for fact in facts):
        values = [facts.get(fact, "none") for _, facts in facts_by_name]
        compared = [value.split()[0] if fact == SOURCE else value for value in values]
        ((usual, _),) = Counter(compared).most_common(1)
        for (name, _), value, own in zip(facts_by_name, values, compared, strict=True):
            if own != usual:
                first = compared.index(usual)
                expected = f"{fact} {values[first]}, as {facts_by_name[first][0]} has"
                yield ClusterError(name, expected, value)
