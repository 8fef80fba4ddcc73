"""Entropy coding undone by huffman.h: the same pixels, and the same damage, as by libjpeg-turbo."""

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from irpe_ds.data.beton.format import imdecode
from tests.data.pipelines.test_jpeg import Pixels, decode, decode_by_ffcv, encode, photograph

SIZE = (93, 150)
WHOLE = (0, 0, *SIZE)


def images() -> Iterator[Image.Image]:
    """Few coefficients, many, and as large ones as there are."""
    random = np.random.default_rng(0)
    yield Image.new("RGB", SIZE[::-1], (200, 100, 50))
    yield photograph(*SIZE[::-1])
    yield Image.fromarray(random.integers(0, 256, (*SIZE, 3), np.uint8))
    yield Image.fromarray(255 * random.integers(0, 2, (*SIZE, 3)).astype(np.uint8))


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"restart_marker_blocks": 5}])
@pytest.mark.parametrize("quality", [1, 30, 85, 100])
def test_same_pixels(quality: int, options: dict[str, int]) -> None:
    random = np.random.default_rng(quality)
    for image in images():
        for mode, subsampling in (("RGB", 0), ("RGB", 1), ("RGB", 2), ("L", 0)):
            coded = encode(image.convert(mode), quality=quality, subsampling=subsampling, **options)
            expected = decode_by_ffcv(coded, *SIZE)
            for _ in range(4):
                rows, columns = random.integers(1, np.array(SIZE) + 1).tolist()
                top = int(random.integers(SIZE[0] - rows + 1))
                left = int(random.integers(SIZE[1] - columns + 1))
                box = (top, left, rows, columns)
                found = decode(coded, SIZE, box)
                assert found is not None
                assert np.array_equal(found, expected[top : top + rows, left : left + columns])
                for divisor in (2, 4, 8):
                    by_libjpeg = decode(coded, SIZE, box, divisor, to_end=True)
                    found = decode(coded, SIZE, box, divisor)
                    assert found is not None
                    assert by_libjpeg is not None
                    assert np.array_equal(found, by_libjpeg)


def damaged(coded: Pixels, random: np.random.Generator) -> Pixels:
    """A scan with some bytes overwritten, left out or doubled, or cut short."""
    scan = coded.tobytes().index(b"\xff\xda") + 14
    place, count = int(random.integers(scan, coded.size - 2)), int(random.integers(1, 5))
    new = random.integers(0, 256, count, np.uint8)
    kind = random.integers(5)
    if kind == 0:
        new = np.array([255, random.integers(256)], np.uint8)  # a marker
    after = coded[place + (0 if kind == 1 else 2 * count if kind == 2 else count) :]
    return np.concatenate([coded[:place], new, after[: 0 if kind == 3 else None]])


@pytest.mark.parametrize("seed", range(8))
def test_same_damage(seed: int) -> None:
    """What libjpeg-turbo warns of is damage; where it does not, its pixels are right."""
    random = np.random.default_rng(seed)
    num_sound = num_damaged = 0
    for image in images():
        coded = encode(image, quality=(85, 100)[seed % 2], subsampling=seed % 3)
        for _ in range(40):
            data, expected = damaged(coded, random), np.empty((*SIZE, 3), np.uint8)
            imdecode(data, expected, *SIZE, *SIZE, 0, 0, 1, 1, False, False)
            found = decode(data, SIZE, WHOLE)
            num_damaged += found is None
            if found is not None:
                assert np.array_equal(found, expected)
            if decode(data, SIZE, WHOLE, to_end=True) is not None:  # by libjpeg-turbo
                num_sound += 1
                assert found is not None
    assert num_damaged > 20
    assert num_sound > 0


def test_codes_that_do_not_exist() -> None:
    """A scan of ones: no code has ones alone."""
    coded = encode(photograph(64, 64))
    scan = coded.tobytes().index(b"\xff\xda") + 14
    ones = np.frombuffer(b"\xff\0" * 600 + b"\xff\xd9", np.uint8)
    assert decode(np.concatenate([coded[:scan], ones]), (64, 64), (0, 0, 64, 64)) is None
