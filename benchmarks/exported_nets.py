"""The nets of benchmarks.export: those of configs/models, and MobileNet-v2 and GoogLeNet with BatchNorm."""

from __future__ import annotations

from google.protobuf import text_format

from benchmarks.models import read_net
from quantize.caffenet import NetParameter

HEAD = 'layer { name: "data" type: "Input" top: "data" input_param { shape { dim: [1, 3, 224, 224] } } }\n'
BOTTLENECKS = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2)),
    (6, 320, 1, 1),
)
"""Expansion, outputs, repeats and stride (Sandler et al. 2018, table 2)."""
INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
"""Outputs of the branches (Szegedy et al. 2015, table 1)."""


def _conv(name: str, bottom: str, outputs: int, fields: str, relu: str = "relu") -> str:
    """A convolution with BatchNorm, Scale, and ReLU or ReLU6."""
    text = (
        f'layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}"\n'
        f"  convolution_param {{ num_output: {outputs} bias_term: false {fields} }} }}\n"
        f'layer {{ name: "{name}/bn" type: "BatchNorm" bottom: "{name}" top: "{name}" }}\n'
        f'layer {{ name: "{name}/scale" type: "Scale" bottom: "{name}" top: "{name}"\n'
        "  scale_param { bias_term: true } }\n"
    )
    if relu:
        text += f'layer {{ name: "{name}/relu" type: "ReLU" bottom: "{name}" top: "{name}" }}\n'
    if relu == "relu6":
        clip = "clip_param { min: 0 max: 6 }"
        text += f'layer {{ name: "{name}/clip" type: "Clip" bottom: "{name}" top: "{name}" {clip} }}\n'
    return text


def _pool(name: str, bottom: str, kind: str, fields: str) -> str:
    param = f"pooling_param {{ pool: {kind} {fields} }}"
    return f'layer {{ name: "{name}" type: "Pooling" bottom: "{bottom}" top: "{name}" {param} }}\n'


def _end(bottom: str) -> str:
    return _pool("pool", bottom, "AVE", "global_pooling: true") + (
        'layer { name: "fc" type: "InnerProduct" bottom: "pool" top: "fc"\n'
        "  inner_product_param { num_output: 1000 } }\n"
    )


def _mobilenet_v2() -> str:
    text, blob, channels = _conv("stem", "data", 32, "kernel_size: 3 pad: 1 stride: 2", "relu6"), "stem", 32
    for block, (expansion, outputs, repeats, first_stride) in enumerate(BOTTLENECKS):
        for repeat in range(repeats):
            name, stride, wide = f"b{block}_{repeat}", 1 if repeat else first_stride, channels * expansion
            top = blob
            if expansion > 1:
                text += _conv(f"{name}/expand", blob, wide, "kernel_size: 1", "relu6")
                top = f"{name}/expand"
            fields = f"kernel_size: 3 pad: 1 stride: {stride} group: {wide}"
            text += _conv(f"{name}/depthwise", top, wide, fields, "relu6")
            text += _conv(f"{name}/project", f"{name}/depthwise", outputs, "kernel_size: 1", "")
            last = f"{name}/project"
            if repeat:
                bottoms = f'bottom: "{blob}" bottom: "{last}"'
                text += f'layer {{ name: "{name}" type: "Eltwise" {bottoms} top: "{name}" }}\n'
                last = name
            blob, channels = last, outputs
    return text + _conv("last", blob, 1280, "kernel_size: 1", "relu6") + _end("last")


def _inception(name: str, bottom: str, outputs: tuple[int, ...]) -> str:
    one, reduce3, three, reduce5, five, pooled = outputs
    text = _conv(f"{name}/1x1", bottom, one, "kernel_size: 1")
    text += _conv(f"{name}/3x3_reduce", bottom, reduce3, "kernel_size: 1")
    text += _conv(f"{name}/3x3", f"{name}/3x3_reduce", three, "kernel_size: 3 pad: 1")
    text += _conv(f"{name}/5x5_reduce", bottom, reduce5, "kernel_size: 1")
    text += _conv(f"{name}/5x5", f"{name}/5x5_reduce", five, "kernel_size: 5 pad: 2")
    text += _pool(f"{name}/pool", bottom, "MAX", "kernel_size: 3 stride: 1 pad: 1")
    text += _conv(f"{name}/pool_proj", f"{name}/pool", pooled, "kernel_size: 1")
    bottoms = " ".join(f'bottom: "{name}/{part}"' for part in ("1x1", "3x3", "5x5", "pool_proj"))
    return text + f'layer {{ name: "{name}" type: "Concat" {bottoms} top: "{name}" }}\n'


def _googlenet_bn() -> str:
    half = "kernel_size: 3 stride: 2"
    text = _conv("conv1", "data", 64, "kernel_size: 7 pad: 3 stride: 2") + _pool(
        "pool1", "conv1", "MAX", half
    )
    text += _conv("conv2_reduce", "pool1", 64, "kernel_size: 1")
    text += _conv("conv2", "conv2_reduce", 192, "kernel_size: 3 pad: 1") + _pool(
        "pool2", "conv2", "MAX", half
    )
    blob = "pool2"
    for name, outputs in INCEPTIONS.items():
        text += _inception(f"inception_{name}", blob, outputs)
        blob = f"inception_{name}"
        if name in ("3b", "4e"):
            text += _pool(f"pool{name[0]}", blob, "MAX", half)
            blob = f"pool{name[0]}"
    return text + _end(blob)


_WRITTEN = {"mobilenet_v2": _mobilenet_v2, "googlenet_bn": _googlenet_bn}
NETS = ("resnet18", "resnet50", "vgg16_bn", "alexnet_bn", *_WRITTEN)


def net_of(name: str) -> NetParameter:
    """A net by name, with an input of (3, 224, 224) or told so."""
    if name not in _WRITTEN:
        return read_net(name)
    net = NetParameter()
    text_format.Parse(f'name: "{name}"\n{HEAD}{_WRITTEN[name]()}', net)
    return net
