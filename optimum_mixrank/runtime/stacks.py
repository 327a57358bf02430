"""Stacks of blocks, the containers that encoders are built of."""

from __future__ import annotations

from torch import nn


def is_container(module: nn.Module) -> bool:
    """Return whether a module only holds others, and is not called itself."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def is_stack(module: nn.Module) -> bool:
    """Return whether a module is a stack of blocks: a `nn.ModuleList`, or a `nn.Sequential` of blocks.

    A `nn.Sequential` of linear layers and activations alone is a part of a block, or a head. One with a block in it, a
    module with linear layers inside, is a stack.
    """
    if isinstance(module, nn.ModuleList):
        return True
    return type(module) is nn.Sequential and any(map(_is_block, module))


def _is_block(module: nn.Module) -> bool:
    is_layer = isinstance(module, nn.Linear) or getattr(module, "is_linear_view", False)
    return not is_layer and any(isinstance(each, nn.Linear) for each in module.modules())


def blocks_around(model: nn.Module, name: str) -> list[str]:
    """Return the names of the blocks that a module is in, from the outermost: elements of stacks that are called."""
    parts = name.split(".")
    found = []
    for length in range(1, len(parts)):
        stack, block = model.get_submodule(".".join(parts[:length])), ".".join(parts[: length + 1])
        if is_stack(stack) and not is_container(model.get_submodule(block)):
            found.append(block)
    return found
