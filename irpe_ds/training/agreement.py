"""Do all ranks run the same thing? A node with other software or other data is named at once."""

import hashlib
import platform
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from irpe_ds.config import RunConfig
from irpe_ds.data.dataset import DatasetInfo
from irpe_ds.errors import ConfigError
from irpe_ds.ops import dispatch
from irpe_ds.ops.dispatch import Choice
from irpe_ds.training.distributed import Ranks
from irpe_ds.training.record import package_versions


def check_agreement(
    ranks: Ranks, config: RunConfig, data: Mapping[str, DatasetInfo], op: Choice
) -> None:
    """Compare versions, source, configuration, data and op of all ranks.

    Raises:
        ConfigError: on every rank; names the first rank, and its host, that is not as most are.
    """
    facts = {
        "Python": platform.python_version(),
        "the source of irpe_ds": source_hash(),
        **package_versions(),
        "the configuration": hashlib.sha256(config.dump().encode()).hexdigest()[:12],
        **{f"data.{part}": describe_data(info) for part, info in data.items()},
        "the attention op": op.name,
    }
    compare(ranks.gather((socket.gethostname(), facts)))


def compare(found: Sequence[tuple[str, Mapping[str, str]]]) -> None:
    """Raise a ConfigError where a rank's facts are not those of most; (host, facts) by rank."""
    for fact in dict.fromkeys(fact for _, facts in found for fact in facts):
        values = [facts.get(fact, "none") for _, facts in found]
        ((usual, _),) = Counter(values).most_common(1)
        for rank, value in enumerate(values):
            if value != usual:
                where = f"rank {rank} on {found[rank][0]}"
                host = found[values.index(usual)][0]
                raise ConfigError(where, f"{fact} {usual}, as on {host}", value)


def source_hash() -> str:
    """Hash of the package's Python files, the same for a wheel and a working tree."""
    roots = Path(__file__).parents[1], Path(dispatch.__file__).parent
    files = {hashlib.sha256(path.read_bytes()).digest() for r in roots for path in r.rglob("*.py")}
    return hashlib.sha256(b"".join(sorted(files))).hexdigest()[:12]


def describe_data(info: DatasetInfo) -> str:
    """What tells a set of images from another: its hash, or its size where there is none."""
    manifest = info.manifest
    return f"{info.num_samples} images" if manifest is None else manifest.sha256[:12]
