"""labelfree: compresses trained Caffe networks from unlabeled images (He & Cheng, ECCV 2018).

    import quantize
    model = quantize.Model.load("net.prototxt", "net.caffemodel")
    images = quantize.Images("photos/", model, count=1000)
    small = quantize.quantize(model, images, bits=4)
    small.save("out/")

What is named here is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantize.api import (
        Comparison,
        Images,
        Runtime,
        evaluate,
        export,
        quantize,
        quantize_activations,
        quantize_weights,
        renorm,
    )
    from quantize.caffenet.model import Layer, Model
    from quantize.data.feed import Input
    from quantize.errors import InputError, LabelfreeError
    from quantize.progress import Progress

__version__ = "0.1.0"
__all__ = [
    "Comparison",
    "Images",
    "Input",
    "InputError",
    "LabelfreeError",
    "Layer",
    "Model",
    "Progress",
    "Runtime",
    "evaluate",
    "export",
    "quantize",
    "quantize_activations",
    "quantize_weights",
    "renorm",
]
_HOMES = {
    "Input": "data.feed",
    "InputError": "errors",
    "LabelfreeError": "errors",
    "Layer": "caffenet.model",
    "Model": "caffenet.model",
    "Progress": "progress",
}
"""The modules of what is not in `api`."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*globals(), *__all__]
