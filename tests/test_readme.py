"""What the README shows is true."""

import re
from pathlib import Path

import torch

from irpe_ds import BucketMap, irpe_attention

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_op_is_the_lines_that_define_it() -> None:
    (lines,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "einsum" in b)
    length, dim = 13, 8
    buckets = BucketMap.build("product", height=3, width=4, skip=1)
    q, k, v = (torch.randn(length, dim, dtype=torch.float64) for _ in "qkv")
    shape = (dim, buckets.num_buckets)
    t_k, t_q, t_v = (torch.randn(shape, dtype=torch.float64) for _ in "kqv")
    names = {"torch": torch, "q": q, "k": k, "v": v, "D": dim, "ids": buckets.ids.long()}
    names |= {"T_K": t_k, "T_Q": t_q, "T_V": t_v.T}
    exec(lines, names)
    out = irpe_attention(
        *(x[None, None] for x in (q, k, v)),
        rpe_q=[(t_q[None], buckets)],
        rpe_k=[(t_k[None], buckets)],
        rpe_v=[(t_v.T[None], buckets)],
    )
    torch.testing.assert_close(names["out"], out[0, 0])


def test_every_file_it_names_is_there() -> None:
    root = Path(__file__).parents[1]
    named = set(
        re.findall(
            r"(?<!tests/)(?:launch|data_prep|ds_configs)/[\w/.-]+\.(?:py|yaml|json|png)", README
        )
    )
    assert len(named) > 6
    assert not [name for name in named if not (root / name).exists()]
