"""What a layer is called in the network that is running it, for errors alone: it costs nothing until one is raised."""

import inspect

from torch import nn


def name_of(layer: nn.Module) -> str:
    """The layer's name in the outermost module now running it, and its kind: `inception3a.branch1.bn (BatchNorm2d)`.

    A module does not know what it is called; its callers, up the stack, do. A layer called by itself is its kind alone.
    """
    name, frame = "", inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module):
            name = next((known for known, module in caller.named_modules() if module is layer), name)
        frame = frame.f_back
    kind = type(layer).__name__
    return f"{name} ({kind})" if name else kind
