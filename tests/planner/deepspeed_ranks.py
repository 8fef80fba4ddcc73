"""What DeepSpeed really sends and keeps on two CPU ranks; run as a script by the tests.

Every rank trains a small ViT under each case; rank 0 prints a line of JSON for each, of one update:
`sent`, bytes of whole vectors by collective, as PyTorch got them; `logged`, bytes by collective as
DeepSpeed's communication logger has them; `wire`, bytes that the interface WIRE sent, in that of
four updates with the fewest packets sent again; and `live`, bytes of all live tensors after it.
"""

import collections
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from irpe_ds.config import load_config

ARGUMENT = {
    "all_reduce": 0,
    "reduce": 0,
    "broadcast": 0,
    "all_gather_into_tensor": 0,
    "all_gather": 0,
    "reduce_scatter_tensor": 1,
    "all_to_all_single": 1,
}
"""Collectives, and which argument is the whole vector."""


def size(x: Any) -> int:
    return sum(map(size, x)) if isinstance(x, list | tuple) else x.numel() * x.element_size()


class Counter:
    """Counts the bytes of collectives between `clear` and `read`; wrap before DeepSpeed starts."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = collections.Counter()
        for name, argument in ARGUMENT.items():
            setattr(torch.distributed, name, self.counting(name, argument))

    def counting(self, name: str, argument: int) -> Any:
        real = getattr(torch.distributed, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            vector = args[argument] if len(args) > argument else list(kwargs.values())[argument]
            self.bytes[name.removesuffix("_into_tensor").removesuffix("_tensor")] += size(vector)
            return real(*args, **kwargs)

        return counted


def live_bytes() -> int:
    """Bytes of all tensors that anything still refers to."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


HEADERS = 66
"""Bytes of Ethernet, IP and TCP in a packet; acknowledgements, whose number varies, are no more."""


def wire_bytes() -> int:
    """Bytes within TCP that the interface has sent until now; 0 without one."""
    if "WIRE" not in os.environ:
        return 0
    time.sleep(0.2)  # what is on its way
    counters = Path(f"/sys/class/net/{os.environ['WIRE']}/statistics")
    sent, packets = (int((counters / f"tx_{what}").read_text()) for what in ("bytes", "packets"))
    return sent - HEADERS * packets


def measure(case: dict[str, Any], folder: Path, counter: Counter) -> dict[str, Any]:
    import deepspeed

    from irpe_ds.models.build import build_deferred
    from irpe_ds.training.deepspeed_config import deepspeed_config
    from irpe_ds.training.engine import FirstValues, build_engine
    from irpe_ds.training.engine_state import EngineState

    path = folder / "zero.json"
    path.write_text(json.dumps({"zero_optimization": case["zero"]}))
    config = load_config(
        "launch/configs/quickstart.yaml", [f"train.deepspeed={path}", *case["overrides"]]
    )
    before = live_bytes()
    model, initial = build_deferred(config.model, seed=0)
    ds_config = deepspeed_config(config, world_size=torch.distributed.get_world_size())
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    device = torch.device("cpu")
    first_values = FirstValues(model, initial, device)
    engine, sums = build_engine(model, config, ds_config, device)
    EngineState(engine, ema=config.train.ema_decay is not None).load(first_values)
    del initial, first_values
    logger = deepspeed.comm.comm.comms_logger
    wires = []
    # Stage 3 needs two updates to know the order of its parameters.
    for update in range(6 if "WIRE" in os.environ else 3):
        if update >= 2:
            torch.distributed.barrier()
            wire = wire_bytes()
            counter.bytes.clear()
            logger.reset_data()
            deepspeed.comm.configure(enabled=True, prof_all=True)
        for micro_step in range(config.train.accumulation):
            if sums is not None:
                sums.is_last = micro_step + 1 == config.train.accumulation
            images = torch.randn(2, 3, 24, 24, dtype=dtype)
            engine.backward(engine(images).float().square().mean())
            engine.step()
        if update >= 2:
            wires.append(wire_bytes() - wire)
    deepspeed.comm.configure(enabled=False, prof_all=False)
    sent = dict(counter.bytes)
    logged = {
        name: sum(size * found[0] for size, found in sizes.items())
        for name, sizes in logger.comms_dict.items()
    }
    logger.reset_data()
    del images
    kept = live_bytes() - before
    engine.destroy()
    return {"sent": sent, "live": kept, "logged": logged, "wire": min(wires)}


def main() -> None:
    rank, world_size, address, port, folder, cases = sys.argv[1:7]
    for key, value in {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }.items():
        os.environ[key] = value
    counter = Counter()
    import deepspeed

    deepspeed.init_distributed(verbose=False)
    for case in json.loads(cases):
        own = Path(folder) / rank
        own.mkdir(exist_ok=True)
        measured = measure(case, own, counter)
        if rank == "0":
            print("MEASURED", json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
