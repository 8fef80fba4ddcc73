"""What torch.compile must not trace into."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def traced_as_constant(function: F) -> F:
    """`torch.compiler.assume_constant_result`: called while tracing, with constants alone.

    In torch 2.6 to 2.14 that decorator imports torch._dynamo and sympy, half of the CPU time of
    `import irpe_ds.ops`, and then only sets this attribute. Use it again once it imports nothing;
    the tests that compile as one graph fail if the attribute is renamed.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
