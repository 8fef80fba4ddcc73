"""Images decoded by FFCV's decoder in threads, crops resized by area."""

from contextlib import closing

from numba import config

from irpe_ds.config import AugmentConfig
from irpe_ds.data.beton.reader import Beton
from irpe_ds.data.crops import Views, centre_views, random_views
from irpe_ds.data.order import Samples
from irpe_ds.data.parallel import local_share
from irpe_ds.data.pipelines.batches import Batches, BatchIterator
from irpe_ds.data.rng import Keys
from irpe_ds.errors import DataError


class FastDecoder:
    """The images of a .beton file, cropped and flipped; what else there is to do the device does.

    Args:
        workers: decoding threads; None takes this rank's share of the cores.
    """

    def __init__(self, beton: Beton, augment: AugmentConfig, workers: int | None) -> None:
        self._beton, self._augment = beton, augment
        self.num_samples = len(beton.entries)
        self.workers = _threads(workers)

    def train(
        self, samples: Samples, keys: Keys, *, batch_size: int, size: tuple[int, int]
    ) -> Batches:
        """Random resized crops, some flipped."""
        entries, augment = self._beton.entries, self._augment
        views = random_views(
            samples,
            entries["height"][samples],
            entries["width"][samples],
            keys,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
        )
        return self._decode(views, batch_size, size)

    def evaluate(
        self, samples: Samples, *, batch_size: int, size: tuple[int, int], crop: float
    ) -> Batches:
        """The largest centred box of this shape, its sides times `crop`."""
        entries = self._beton.entries
        views = centre_views(
            samples,
            entries["height"][samples],
            entries["width"][samples],
            aspect=size[1] / size[0],
            share=crop,
        )
        return self._decode(views, batch_size, size)

    def _decode(self, views: Views, batch_size: int, size: tuple[int, int]) -> Batches:
        batches = BatchIterator(
            self._beton, views, batch_size=batch_size, size=size, workers=self.workers
        )
        with closing(batches):
            yield from batches


def _threads(workers: int | None) -> int:
    """The number asked for, or the cores divided by this machine's ranks."""
    most: int = config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # cores, or fewer
    if workers is None:
        return local_share(most)
    if workers > most:
        raise DataError("data.workers", f"at most {most}, the cores of this machine", workers)
    return workers
