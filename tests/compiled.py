"""What every rank would import and compile by itself, some 7 CPU-seconds; once, before the fork.

- DeepSpeed's engine imports its Muon, whose decorators import torch._inductor.
- numba compiles the decoder. That starts its thread pool, which a fork survives under workqueue,
  not under omp.
"""

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import numba
import numpy as np

from irpe_ds.data.beton.reader import ENTRY
from irpe_ds.data.crops import CROP
from irpe_ds.data.pipelines.decoding import decode_crops

numba.config.THREADING_LAYER = "workqueue"
_arguments = np.empty(0, np.uint8), np.empty(0, ENTRY), np.empty(0, CROP)
_images = np.empty((0,) * 4, np.uint8)
decode_crops.compile(tuple(map(numba.typeof, (*_arguments, _images, False, False))))
