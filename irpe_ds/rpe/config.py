"""The choice of an image relative position encoding."""

import math
from dataclasses import dataclass, fields

from irpe_ds.errors import ConfigError

METHODS = ("euclidean", "quantization", "cross", "product")
MODES = ("bias", "contextual")
RATIOS = {"product": 1.9, "euclidean": 20, "quantization": 33, "cross": 20}
"""Those of the released models."""


@dataclass(frozen=True, kw_only=True)
class RPEConfig:
    """One relative position encoding, as in Sec. 4 of iRPE (Wu et al., ICCV 2021).

    Raises:
        ConfigError: an invalid value; the message names the field.
    """

    method: str = "product"
    """How an offset is mapped to a bucket; `cross` is one term on rows plus one on columns."""
    mode: str = "contextual"
    """`contextual`: the term depends on the query, key or value; `bias`: a learned scalar."""
    on: str = "k"
    """Where the encoding is added, queries, keys or values: a non-empty subset of `qkv`."""
    ratio: float | None = None
    """Scale of the piecewise index: alpha = ratio, beta = 2 ratio, gamma = 8 ratio (Eq. 18). None:
    as released, product 1.9, euclidean 20, quantization 33, cross 20."""
    shared_heads: bool = True
    """One table for all heads of a layer, or one per head."""
    last_block: bool = True
    """Tables in the last block too, as released. Where only the class token is read there, they
    are inert: those on keys change nothing, of those on queries and values one bucket is used."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError("method", f"one of {', '.join(METHODS)}", repr(self.method))
        if self.mode not in MODES:
            raise ConfigError("mode", f"one of {', '.join(MODES)}", repr(self.mode))
        letters = set(self.on) if isinstance(self.on, str) else set()
        if not letters or not letters <= set("qkv") or len(letters) != len(self.on):
            raise ConfigError("on", "a non-empty subset of 'qkv'", repr(self.on))
        if self.mode == "bias" and "v" in letters:
            raise ConfigError("on", "a subset of 'qk' in bias mode", repr(self.on))
        if self.ratio is None:
            object.__setattr__(self, "ratio", RATIOS[self.method])
        check_ratio(self.ratio)

    def __repr__(self) -> str:
        """The fields, and how many buckets a grid can use, were it ever so large."""
        values = [f"{field.name}={getattr(self, field.name)!r}" for field in fields(self)]
        return f"RPEConfig({', '.join(values)}, buckets<={self._most_buckets()})"

    def _most_buckets(self) -> int:
        """Without that of prefix tokens. Distances are not negative: half of a table is unused."""
        assert self.ratio is not None
        largest = int(2 * self.ratio)
        by_method = {"product": (2 * largest + 1) ** 2, "cross": 2 * (2 * largest + 1)}
        return by_method.get(self.method, largest + 1)


def check_ratio(ratio: float | None) -> None:
    """Raise ConfigError unless Eq. 18 is defined: alpha = ratio must exceed half a patch."""
    if not isinstance(ratio, int | float) or not 0.5 < ratio < math.inf:
        raise ConfigError("ratio", "a number of patches above 0.5", repr(ratio))
