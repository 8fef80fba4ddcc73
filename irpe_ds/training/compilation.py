"""torch.compile of an engine's model."""

from typing import Any

import torch


def compile_engine(engine: Any) -> None:
    """Compile the model of DeepSpeed's engine, in place; under ZeRO-3 between its layers' hooks.

    DeepSpeed 0.19.8 leaves two of stage 3's hooks to torch.compile (zero/parameter_offload.py,
    _post_forward_module_hook and _pre_backward_module_hook), which then compiles them anew for
    every layer. Without the loop an update of a model of one block still takes minutes, and its
    second as long as its first; it can go when tests/launch/test_compile.py is as fast without.
    """
    if engine.zero_optimization_partition_weights():
        for module in engine.module.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in hooks.items():
                    hooks[key] = torch.compiler.disable(hook)
    engine.compile()
