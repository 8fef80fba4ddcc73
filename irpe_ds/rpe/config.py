"""The choice of an image relative position encoding."""

import math
from dataclasses import dataclass

from irpe_ds.errors import ConfigError

METHODS = ("euclidean", "quantization", "cross", "product")
MODES = ("bias", "contextual")


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
    ratio: float = 1.9
    """Scale of the piecewise index: alpha = ratio, beta = 2 ratio, gamma = 8 ratio (Eq. 18)."""
    shared_heads: bool = True
    """One table for all heads of a layer, or one per head."""

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
        check_ratio(self.ratio)


def check_ratio(ratio: float) -> None:
    """Raise ConfigError unless Eq. 18 is defined: alpha = ratio must exceed half a patch."""
    if not isinstance(ratio, int | float) or not 0.5 < ratio < math.inf:
        raise ConfigError("ratio", "a number of patches above 0.5", repr(ratio))
