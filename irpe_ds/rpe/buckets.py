"""Buckets: the entry of a learned table that belongs to an offset between two patches."""

import math

import torch
from torch import Tensor, nn

from irpe_ds.errors import ConfigError
from irpe_ds.rpe.config import RATIOS, check_ratio

BUCKET_METHODS = ("euclidean", "quantization", "product", "cross_rows", "cross_cols")
TOKENS = 1 << 14
"""Most tokens of a map: it has a bucket for every pair of them, 1 GiB."""


def piecewise_index(offset: Tensor, *, alpha: float, beta: float, gamma: float) -> Tensor:
    """Index of an offset: exact near zero, logarithmic beyond (Eq. 18 of iRPE).

        g(x) = round(x)                                                        if |x| <= alpha
        g(x) = sign(x) min(beta, round(alpha + ln(|x|/alpha) / ln(gamma/alpha) (beta - alpha)))

    Rounding is half to even, and the clip at a fractional beta is truncated. Both follow the
    released implementation, so that the ids of released checkpoints are reproduced exactly.

    Args:
        offset: any shape, in patches; computed in float32.

    Returns:
        int64 of the same shape, in [-int(beta), int(beta)].
    """
    x = offset.float()
    far = alpha + (x.abs() / alpha).log() / math.log(gamma / alpha) * (beta - alpha)
    far = x.sign() * far.round().clip(max=beta)
    return torch.where(x.abs() <= alpha, x.round(), far).long()


class BucketMap(nn.Module):
    """The bucket of every (query, key) pair of one grid of tokens.

    It is a module so that it follows its model to a device. It adds no key to the state dict, and
    all layers of a model share one.

    Attributes:
        ids: (L, L) int32, L = skip + height * width; ids[i, j] is b(i, j), query i against key j.
        num_buckets: entries of a table for this map; the last one is for the prefix tokens, if any.
        grid: (height, width) in patches.
        used_ids: (U,) int64, the ids that occur on this grid, ascending; often far fewer than
            num_buckets.
        skip: number of prefix tokens, which have no place on the grid (class, distillation,
            registers); timm's num_prefix_tokens.
    """

    ids: Tensor
    used_ids: Tensor

    def __init__(self, method: str, height: int, width: int, skip: int, ratio: float) -> None:
        super().__init__()
        self.method, self.grid, self.skip, self._ratio = method, (height, width), skip, repr(ratio)
        row = torch.arange(height, device="cpu").repeat_interleave(width)
        col = torch.arange(width, device="cpu").repeat(height)
        offsets = (torch.arange(1 - n, n, device="cpu") for n in (height, width))
        rows, cols = torch.meshgrid(*offsets, indexing="ij")
        by_offset = bucket_of(method, rows, cols, ratio)
        index = by_offset[row[:, None] - row + height - 1, col[:, None] - col + width - 1]
        used = by_offset.unique()
        self.num_buckets = num_buckets(method, skip, ratio)
        if skip:
            length = skip + height * width
            patches, index = index, torch.full((length, length), self.num_buckets - 1, device="cpu")
            index[skip:, skip:] = patches
            used = torch.cat([used, index[0, :1]])
        self.register_buffer("ids", index.int(), persistent=False)
        self.register_buffer("used_ids", used, persistent=False)

    @property
    def ratio(self) -> float:
        """Kept as text, a constant to torch.compile, which takes for a variable any float of a
        module that another call had otherwise; the choice of an implementation depends on it."""
        return float(self._ratio)

    def reset_parameters(self) -> None:
        """Recompute the ids, for a model that was made on the meta device."""
        fresh = BucketMap(self.method, *self.grid, self.skip, self.ratio)
        for own, new in zip(self.buffers(), fresh.buffers(), strict=True):
            own.copy_(new)

    @classmethod
    def build(
        cls, method: str, height: int, width: int, skip: int = 0, ratio: float | None = None
    ) -> "BucketMap":
        """Bucket a grid of height x width patches after `skip` prefix tokens.

        `skip` is timm's num_prefix_tokens: class, distillation and register tokens. They all
        share one bucket, the last.

        With alpha = ratio, beta = 2 ratio, gamma = 8 ratio in `piecewise_index`:

        - euclidean: the rounded distance of the two patches
        - quantization: the squared distance, so that no two distances share a bucket near zero
        - cross_rows, cross_cols: the offset in rows, in columns
        - product: both offsets, one bucket per pair of levels

        Without a ratio it is that of the released models.

        Raises:
            ConfigError: an unknown method, or an invalid size or ratio.
        """
        if method not in BUCKET_METHODS:
            raise ConfigError("method", f"one of {', '.join(BUCKET_METHODS)}", repr(method))
        if height < 1 or width < 1 or skip < 0:
            got = f"height={height}, width={width}, skip={skip}"
            raise ConfigError("grid", "height and width >= 1 and skip >= 0", got)
        if skip + height * width > TOKENS:
            raise ConfigError("grid", f"at most {TOKENS} tokens", f"{skip} + {height} x {width}")
        if ratio is None:
            ratio = RATIOS[method.partition("_")[0]]
        check_ratio(ratio)
        return cls(method, height, width, skip, ratio)

    def extra_repr(self) -> str:
        height, width = self.grid
        used = f"buckets={self.num_buckets}, in use={len(self.used_ids)}"
        return f"{self.method}, {height}x{width}, skip={self.skip}, {used}"


def num_buckets(method: str, skip: int, ratio: float) -> int:
    """Entries of a table; the last one is for the prefix tokens, if any."""
    return (2 * int(2 * ratio) + 1) ** (2 if method == "product" else 1) + (skip > 0)


def bucket_of(method: str, rows: Tensor, cols: Tensor, ratio: float) -> Tensor:
    """The bucket of an offset between two patches, int64 >= 0; integers of any one shape."""
    largest = int(2 * ratio)

    def piecewise(offset: Tensor) -> Tensor:
        return piecewise_index(offset, alpha=ratio, beta=2 * ratio, gamma=8 * ratio) + largest

    match method:
        case "euclidean":
            return piecewise((rows**2 + cols**2).float().sqrt().round())
        case "quantization":
            return piecewise(rows**2 + cols**2)
        case "cross_rows":
            return piecewise(rows)
        case "cross_cols":
            return piecewise(cols)
        case _:
            return piecewise(rows) * (2 * largest + 1) + piecewise(cols)
