"""irpe_gather and bucket_sum: their definition, gradients, what PyTorch asks of an op, mistakes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from irpe_ds.errors import ConfigError
from irpe_ds.ops import bucket_sum, irpe_gather
from irpe_ds.ops.build import library
from irpe_ds.rpe.buckets import BucketMap

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIZES = [  # B, H, Q, K, N
    (2, 3, 7, 5, 4),
    (1, 2, 33, 50, 50),
    (1, 1, 1, 129, 9),
    (2, 1, 65, 1, 3),
    (0, 2, 4, 4, 3),
    (1, 1, 4, 4, 300),
]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(scope="module", autouse=True)
def _operators() -> None:
    assert library.load().cpu is None


def random_ids(rows: int, others: int, n: int, device: str) -> Tensor:
    return torch.randint(n, (rows, others), dtype=torch.int32).to(device)


def gather_by_definition(lookup: Tensor, ids: Tensor, columns: bool) -> Tensor:
    """out(t, o) = lookup[t, ids[t, o]], turned around for columns."""
    pairs = lookup.gather(-1, ids.long().expand(*lookup.shape[:2], -1, -1))
    return pairs.mT if columns else pairs


def sum_by_definition(x: Tensor, ids: Tensor, n: int, columns: bool) -> Tensor:
    pairs = (x.mT if columns else x).double()
    one_hot = torch.nn.functional.one_hot(ids.long(), n).double()
    return torch.einsum("bhto,ton->bhtn", pairs, one_hot)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
class TestDefinition:
    def test_gather_is_exact(
        self, device: str, sizes: tuple[int, ...], dtype: torch.dtype, columns: bool
    ) -> None:
        b, h, q, k, n = sizes
        tokens, others = (k, q) if columns else (q, k)
        lookup = torch.randn(b, h, tokens, n).to(device, dtype)
        ids = random_ids(tokens, others, n, device)
        out = irpe_gather(lookup, ids, columns=columns)
        assert torch.equal(out, gather_by_definition(lookup, ids, columns))
        assert out.shape == (b, h, q, k)

    def test_sums_are_kept_in_float(
        self, device: str, sizes: tuple[int, ...], dtype: torch.dtype, columns: bool
    ) -> None:
        b, h, q, k, n = sizes
        tokens, others = (k, q) if columns else (q, k)
        x = torch.randn(b, h, q, k).to(device, dtype)
        ids = random_ids(tokens, others, n, device)
        out = bucket_sum(x, ids, n, columns=columns)
        expected = sum_by_definition(x, ids, n, columns)
        wide = torch.promote_types(dtype, torch.float32)
        close = {"atol": others * torch.finfo(wide).eps, "rtol": torch.finfo(dtype).eps}
        torch.testing.assert_close(out.double(), expected, **close)
        assert torch.equal(bucket_sum(x, ids, n, columns=columns), out)


@pytest.mark.parametrize("columns", [False, True])
class TestGradients:
    def test_once_and_twice(self, device: str, columns: bool) -> None:
        tokens, others = (5, 3) if columns else (3, 5)
        ids = random_ids(tokens, others, 4, device)
        lookup = torch.randn(2, 2, tokens, 4, dtype=torch.float64, device=device)
        x = torch.randn(2, 2, 3, 5, dtype=torch.float64, device=device)

        def of_lookup(lookup: Tensor) -> Tensor:
            return irpe_gather(lookup, ids, columns=columns) ** 2

        def of_pairs(x: Tensor) -> Tensor:
            return bucket_sum(x, ids, 4, columns=columns) ** 2

        for function, argument in ((of_lookup, lookup), (of_pairs, x)):
            assert torch.autograd.gradcheck(function, argument.requires_grad_())
            assert torch.autograd.gradgradcheck(function, argument)

    def test_opcheck(self, device: str, columns: bool) -> None:
        tokens, others = (5, 3) if columns else (3, 5)
        ids = random_ids(tokens, others, 4, device)
        lookup = torch.randn(2, 2, tokens, 4, device=device, requires_grad=True)
        x = torch.randn(2, 2, 3, 5, device=device, requires_grad=True)
        torch.library.opcheck(torch.ops.irpe_ds.gather.default, (lookup, ids, columns))
        torch.library.opcheck(torch.ops.irpe_ds.bucket_sum.default, (x, ids, 4, columns))

    def test_strides(self, device: str, columns: bool) -> None:
        tokens, others = (5, 3) if columns else (3, 5)
        ids = random_ids(others, tokens, 4, device).T
        dense = torch.randn(2, 3, tokens, 4, device=device)
        expected = irpe_gather(dense, ids.contiguous(), columns=columns)
        sums = bucket_sum(expected, ids.contiguous(), 4, columns=columns)
        for order in ((0, 2, 1, 3), (3, 1, 2, 0), (1, 0, 3, 2)):
            back = [order.index(d) for d in range(4)]
            strided = dense.permute(order).contiguous().permute(back)
            assert torch.equal(irpe_gather(strided, ids, columns=columns), expected)
            pairs = expected.permute(order).contiguous().permute(back)
            assert torch.equal(bucket_sum(pairs, ids, 4, columns=columns), sums)
        repeated = dense[:1, :1].expand(2, 3, -1, -1)
        out = irpe_gather(repeated, ids, columns=columns)
        assert torch.equal(out, irpe_gather(repeated.contiguous(), ids, columns=columns))


def test_opcheck_of_the_softmax(device: str) -> None:
    if device == "cuda":
        pytest.skip("an op of the CPU")
    ids = random_ids(3, 3, 4, device)
    scores, lookup = torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 4)
    ops = torch.ops.irpe_ds
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for num_rows in (0, 1, 2):
        arguments = (scores, [lookup, lookup], [ids, ids], num_rows)
        torch.library.opcheck(ops.softmax_.default, arguments, test_utils=checks)
        backward = (scores, scores.softmax(-1), [ids, ids], [4, 4], num_rows)
        torch.library.opcheck(ops.softmax_backward.default, backward, test_utils=checks)


def used_twice(lookup: Tensor, ids: Tensor) -> Tensor:
    rows, columns = irpe_gather(lookup, ids), irpe_gather(lookup, ids, columns=True)
    return bucket_sum((rows + columns).softmax(-1), ids, lookup.shape[-1])


def test_compile_takes_it_twice_in_one_graph(device: str) -> None:
    ids = BucketMap.build("product", 2, 3, 1).ids.to(device)
    compiled = torch.compile(used_twice, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        lookup = torch.randn(batch, 2, 7, 50, device=device, requires_grad=True)
        expected, out = used_twice(lookup, ids), compiled(lookup, ids)
        torch.testing.assert_close(out, expected)
        weights = torch.randn_like(out)
        grads = [torch.autograd.grad((x * weights).sum(), lookup) for x in (out, expected)]
        torch.testing.assert_close(*grads)


def test_export(device: str) -> None:
    class Model(torch.nn.Module):
        def forward(self, lookup: Tensor, ids: Tensor) -> Tensor:
            return used_twice(lookup, ids)

    inputs = (torch.randn(2, 2, 7, 50, device=device), random_ids(7, 7, 50, device))
    program = torch.export.export(Model(), inputs)
    assert "irpe_ds.bucket_sum" in str(program.graph)
    torch.testing.assert_close(program.module()(*inputs), used_twice(*inputs))


def test_autocast_changes_nothing(device: str) -> None:
    ids = random_ids(3, 5, 4, device)
    lookup = torch.randn(2, 2, 3, 4, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        out = irpe_gather(lookup, ids)
        assert out.dtype == bucket_sum(out, ids, 4).dtype == torch.float32
    out.sum().backward()
    assert lookup.grad.dtype == torch.float32


def test_ids_of_any_integer_type(device: str) -> None:
    ids = random_ids(3, 5, 4, device)
    lookup = torch.randn(2, 2, 3, 4, device=device)
    for dtype in (torch.int64, torch.uint8, torch.int16):
        assert torch.equal(irpe_gather(lookup, ids.to(dtype)), irpe_gather(lookup, ids))


LOOKUP = torch.zeros(2, 2, 3, 4)
IDS = torch.zeros(3, 5, dtype=torch.int32)
Call = Callable[[str], Tensor]
MISTAKES: dict[str, tuple[Call, type[Exception], str]] = {
    "lookup of three dimensions": (
        lambda d: irpe_gather(LOOKUP[0].to(d), IDS.to(d)),
        ValueError,
        r"lookup: expected 4 dimensions .*, got Float \[2, 3, 4\]",
    ),
    "integer lookup": (
        lambda d: irpe_gather(LOOKUP.int().to(d), IDS.to(d)),
        ValueError,
        r"lookup: expected 4 dimensions of float64, .*, got Int",
    ),
    "floating ids": (
        lambda d: irpe_gather(LOOKUP.to(d), IDS.to(d).float()),
        ConfigError,
        r"ids: expected integers on .*, got torch.float32 on",
    ),
    "ids of three dimensions": (
        lambda d: irpe_gather(LOOKUP.to(d), IDS[None].to(d)),
        ValueError,
        r"ids: expected int32 of 2 dimensions on .*, got Int \[1, 3, 5\]",
    ),
    "ids of another number of tokens": (
        lambda d: irpe_gather(LOOKUP.to(d), IDS.T.to(d)),
        ValueError,
        r"lookup: expected 5 tokens as in ids, got 3",
    ),
    "ids of another number of tokens, columns": (
        lambda d: irpe_gather(LOOKUP.to(d), IDS.T.to(d), columns=True),
        ValueError,
        r"lookup: expected 5 tokens as in ids, got 3",
    ),
    "pairs of other tokens": (
        lambda d: bucket_sum(LOOKUP.to(d), IDS.to(d), 4),
        ValueError,
        r"x: expected \(B, H, 3, 5\) as ids say, got \[2, 2, 3, 4\]",
    ),
    "ids elsewhere": (
        lambda d: irpe_gather(LOOKUP.to(d), IDS.to("meta")),
        ValueError,
        r"ids: expected integers on .*, got torch.int32 on meta",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(device: str, mistake: str) -> None:
    call, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        call(device)


@pytest.mark.parametrize("id_", [4, -1, 2**31 - 1])
def test_an_id_out_of_range_reads_nothing(device: str, id_: int) -> None:
    if device == "cuda":
        pytest.skip("the kernel stops and leaves no usable CUDA context behind")
    ids = IDS.clone()
    ids[1, 2] = id_
    with pytest.raises(IndexError, match=rf"ids: expected ids in \[0, 4\), got {id_}"):
        irpe_gather(LOOKUP, ids)
    with pytest.raises(IndexError, match=r"ids: expected ids in \[0, 4\)"):
        bucket_sum(torch.zeros(2, 2, 5, 3), ids.T.contiguous().T, 4, columns=True)


def test_an_id_that_32_bits_do_not_hold(device: str) -> None:
    if device == "cuda":
        pytest.skip("the kernel stops and leaves no usable CUDA context behind")
    for id_ in (2**32 + 1, -(2**32)):
        with pytest.raises(IndexError, match=r"ids: expected ids in \[0, 4\)"):
            irpe_gather(LOOKUP, torch.full((3, 5), id_))


def test_meta_tensors_have_shapes(device: str) -> None:
    out = torch.ops.irpe_ds.gather(LOOKUP.to("meta"), IDS.to("meta"))
    assert out.shape == (2, 2, 3, 5)
    with pytest.raises(ConfigError, match="there are kernels for cpu and cuda"):
        irpe_gather(LOOKUP.to("meta"), IDS.to("meta"))
