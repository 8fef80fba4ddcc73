"""Buckets: which entry of a learned table an offset between two patches reads."""

import math

import torch
from torch import Tensor, nn

from irpe_ds.errors import ConfigError
from irpe_ds.rpe.config import check_ratio

METHODS = ("euclidean", "quantization", "product", "cross_rows", "cross_cols")


def piecewise_index(offset: Tensor, *, alpha: float, beta: float, gamma: float) -> Tensor:
    """Index of an offset: exact near zero, logarithmic beyond (Eq. 18 of iRPE).

        g(x) = round(x)                                                        if |x| <= alpha
        g(x) = sign(x) min(beta, round(alpha + ln(|x|/alpha) / ln(gamma/alpha) (beta - alpha)))

    Rounding is half to even and the clip at a fractional beta is truncated, as in the released
    implementation, so the ids of released checkpoints are reproduced bit for bit.

    Args:
        offset: any shape, patches; computed in float32.

    Returns:
        int64 of the same shape, in [-int(beta), int(beta)].
    """
    x = offset.float()
    far = alpha + (x.abs() / alpha).log() / math.log(gamma / alpha) * (beta - alpha)
    far = x.sign() * far.round().clip(max=beta)
    return torch.where(x.abs() <= alpha, x.round(), far).long()


class BucketMap(nn.Module):
    """The bucket of every (query, key) pair of one grid of tokens.

    A module, so that it follows its model to a device; it adds no key to the state dict, and all
    layers of a model share one.

    Attributes:
        ids: (L, L) int32, L = skip + height * width; ids[i, j] is b(i, j), query i against key j.
        num_buckets: rows that a table for this map has; with skip tokens the last is theirs.
        grid: (height, width) of the patches.
        used: (U,) int64, the ids that occur on this grid, ascending; often far fewer than
            num_buckets.
        tiles: (2, ...) uint8, the places of `ids` in `used`, and of their transpose, in the order
            of `tiled`; None when U is above 256.
        skip: leading tokens without a place on the grid (class, distillation, registers).
    """

    ids: Tensor
    used: Tensor
    tiles: Tensor | None

    def __init__(self, method: str, height: int, width: int, skip: int, ratio: float) -> None:
        super().__init__()
        self.method, self.grid, self.skip, self.ratio = method, (height, width), skip, ratio
        index = _index(method, height, width, ratio)
        self.num_buckets = (2 * int(2 * ratio) + 1) ** (2 if method == "product" else 1)
        if skip:
            length = skip + height * width
            patches, index = index, torch.full((length, length), self.num_buckets, device="cpu")
            index[skip:, skip:] = patches
            self.num_buckets += 1
        self.register_buffer("ids", index.int(), persistent=False)
        used, place = index.unique(return_inverse=True)
        tiles = torch.stack([tiled(place), tiled(place.T)]) if len(used) <= 256 else None
        self.register_buffer("used", used, persistent=False)
        self.register_buffer("tiles", tiles, persistent=False)

    def reset_parameters(self) -> None:
        """Fill `ids` again, for a model that was made on the meta device."""
        again = BucketMap(self.method, *self.grid, self.skip, self.ratio)
        for own, new in zip(self.buffers(), again.buffers(), strict=True):
            own.copy_(new)

    @classmethod
    def build(
        cls, method: str, height: int, width: int, skip: int = 0, ratio: float = 1.9
    ) -> "BucketMap":
        """Bucket a grid of height x width patches after `skip` tokens.

        With alpha = ratio, beta = 2 ratio, gamma = 8 ratio in `piecewise_index`:

        - euclidean: the rounded distance of the two patches
        - quantization: the squared distance, so that no two distances share a bucket near zero
        - cross_rows, cross_cols: the offset in rows, in columns
        - product: both offsets, one bucket per pair of levels

        Raises:
            ConfigError: an unknown method, or a size or ratio that has no meaning.
        """
        if method not in METHODS:
            raise ConfigError("method", f"one of {', '.join(METHODS)}", repr(method))
        if height < 1 or width < 1 or skip < 0:
            got = f"height={height}, width={width}, skip={skip}"
            raise ConfigError("grid", "height and width >= 1 and skip >= 0", got)
        check_ratio(ratio)
        return cls(method, height, width, skip, ratio)

    def extra_repr(self) -> str:
        height, width = self.grid
        return f"{self.method}, {height}x{width}, skip={self.skip}, buckets={self.num_buckets}"


def tiled(ids: Tensor) -> Tensor:
    """Ids in the order in which a warp of 32 threads keeps a tile of pairs in its registers.

    Tiles have 16 rows and 32 columns. Lane 4 g + t has 16 ids, number 4 n + 2 half + parity that
    of row 8 half + g and column 8 n + 2 t + parity: one load of 16 bytes, as mma.m16n8k16 of CUDA
    lays out its sums.

    Args:
        ids: (L, L) integers below 256.

    Returns:
        uint8 (ceil(L / 16), ceil(L / 32), 32 lanes, 16); what is beyond L is zero.
    """
    length = ids.shape[0]
    rows, columns = -(-length // 16), -(-length // 32)
    padded = ids.new_zeros(rows * 16, columns * 32, dtype=torch.uint8)
    padded[:length, :length] = ids
    split = padded.view(rows, 2, 8, columns, 4, 4, 2)  # row, half, g, column, n, t, parity
    return split.permute(0, 3, 2, 5, 4, 1, 6).reshape(rows, columns, 32, 16)


def _index(method: str, height: int, width: int, ratio: float) -> Tensor:
    """Non-negative ids of the patches alone, (height * width, height * width) int64."""
    largest = int(2 * ratio)

    def piecewise(offset: Tensor) -> Tensor:
        return piecewise_index(offset, alpha=ratio, beta=2 * ratio, gamma=8 * ratio) + largest

    row = torch.arange(height, device="cpu").repeat_interleave(width)
    col = torch.arange(width, device="cpu").repeat(height)
    rows, cols = row[:, None] - row, col[:, None] - col
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
