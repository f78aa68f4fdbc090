"""Small nets with the structure of public ones, for what differs between them: where activations stand."""

from quantize.caffenet import NetParameter
from tests.nets import parse

INPUT = {"data": (3, 17, 17)}
HEAD = 'layer { name: "data" type: "Input" top: "data" input_param { shape { dim: [1, 3, 17, 17] } } }\n'


def layer(name: str, type_name: str, bottoms: str, top: str = "", fields: str = "") -> str:
    """A layer; ``bottoms`` and ``top`` are names with spaces between."""
    blobs = "".join(f' bottom: "{bottom}"' for bottom in bottoms.split())
    tops = "".join(f' top: "{each}"' for each in (top or name).split())
    return f'layer {{ name: "{name}" type: "{type_name}"{blobs}{tops} {fields} }}\n'


def conv(name: str, bottom: str, outputs: int, kernel: int = 3, fields: str = "", norm: bool = True) -> str:
    """A convolution that keeps the size, and its BatchNorm and Scale in place."""
    param = f"num_output: {outputs} kernel_size: {kernel} pad: {kernel // 2} {fields}"
    text = layer(name, "Convolution", bottom, name, f"convolution_param {{ {param} }}")
    if norm:
        text += layer(f"{name}/bn", "BatchNorm", name, name)
        text += layer(f"{name}/scale", "Scale", name, name, "scale_param { bias_term: true }")
    return text


def act(blob: str, type_name: str = "ReLU", fields: str = "") -> str:
    """An activation in place."""
    return layer(f"{blob}/{type_name.lower()}", type_name, blob, blob, fields)


def dense(name: str, bottom: str, outputs: int) -> str:
    return layer(name, "InnerProduct", bottom, name, f"inner_product_param {{ num_output: {outputs} }}")


def pool(name: str, bottom: str, kind: str, fields: str = "kernel_size: 3 stride: 2") -> str:
    return layer(name, "Pooling", bottom, name, f"pooling_param {{ pool: {kind} {fields} }}")


def add(name: str, bottoms: str) -> str:
    return layer(name, "Eltwise", bottoms)


GLOBAL = "global_pooling: true"


def relu6(blob: str) -> str:
    return act(blob) + act(blob, "Clip", "clip_param { min: 0 max: 2 }")


FAMILIES: dict[str, str] = {
    # ResNet: a convolutional shortcut, then an identity one
    "resnet": conv("stem", "data", 8)
    + act("stem")
    + pool("pool", "stem", "MAX")
    + conv("left", "pool", 8, 1)
    + conv("right_a", "pool", 8)
    + act("right_a")
    + conv("right_b", "right_a", 8)
    + add("sum1", "left right_b")
    + act("sum1")
    + conv("c2", "sum1", 8)
    + act("c2")
    + conv("c3", "c2", 8)
    + add("sum2", "sum1 c3")
    + act("sum2")
    + pool("gap", "sum2", "AVE", GLOBAL)
    + dense("fc", "gap", 7),
    # MobileNet-v2: ReLU6, depthwise convolutions, linear bottlenecks
    "mobilenet_v2": conv("stem", "data", 8, fields="stride: 2")
    + relu6("stem")
    + conv("dw1", "stem", 8, fields="group: 8")
    + relu6("dw1")
    + conv("project1", "dw1", 4, 1)
    + conv("expand2", "project1", 12, 1)
    + relu6("expand2")
    + conv("dw2", "expand2", 12, fields="group: 12")
    + relu6("dw2")
    + conv("project2", "dw2", 4, 1)
    + add("sum2", "project1 project2")
    + conv("last", "sum2", 16, 1)
    + relu6("last")
    + pool("gap", "last", "AVE", GLOBAL)
    + dense("fc", "gap", 7),
    # EfficientNet-lite: Clip alone
    "lite": conv("stem", "data", 8, fields="stride: 2")
    + act("stem", "Clip", "clip_param { min: 0 max: 2 }")
    + conv("dw1", "stem", 8, fields="group: 8")
    + act("dw1", "Clip", "clip_param { min: 0 max: 2 }")
    + conv("project1", "dw1", 4, 1)
    + conv("expand2", "project1", 12, 1)
    + act("expand2", "Clip", "clip_param { min: 0 max: 2 }")
    + act("expand2")
    + pool("gap", "expand2", "AVE", GLOBAL)
    + layer("drop", "Dropout", "gap", "gap")
    + dense("fc", "gap", 7),
    # MTCNN: PReLU, maximum pooling, several heads
    "mtcnn": conv("conv1", "data", 10, norm=False)
    + layer("prelu1", "PReLU", "conv1", "conv1")
    + pool("pool1", "conv1", "MAX", "kernel_size: 2 stride: 2")
    + conv("conv2", "pool1", 16, norm=False)
    + layer("prelu2", "PReLU", "conv2", "conv2")
    + dense("conv4-1", "conv2", 2)
    + dense("conv4-2", "conv2", 4)
    + layer("prob1", "Softmax", "conv4-1"),
    # YOLO: leaky ReLU, a route back over a Concat, an upsampling Deconvolution
    "yolo": conv("conv1", "data", 8)
    + act("conv1", "ReLU", "relu_param { negative_slope: 0.1 }")
    + pool("pool1", "conv1", "MAX", "kernel_size: 2 stride: 2")
    + conv("conv2", "pool1", 8)
    + act("conv2", "ReLU", "relu_param { negative_slope: 0.1 }")
    + pool("pool2", "conv2", "MAX", "kernel_size: 2 stride: 2")
    + conv("conv3", "pool2", 8)
    + act("conv3", "ReLU", "relu_param { negative_slope: 0.1 }")
    + layer(
        "up",
        "Deconvolution",
        "conv3",
        "up",
        "convolution_param { num_output: 8 kernel_size: 2 stride: 2 group: 2 pad: 0 bias_term: false }",
    )
    + layer("crop", "Crop", "up conv2", "crop", "crop_param { axis: 2 offset: 0 }")
    + layer("route", "Concat", "crop conv2")
    + conv("out", "route", 6, 1, norm=False),
    # SE net: sigmoid gates
    "se": conv("conv1", "data", 8)
    + act("conv1")
    + conv("conv2", "conv1", 8)
    + pool("squeeze", "conv2", "AVE", GLOBAL)
    + conv("down", "squeeze", 4, 1, norm=False)
    + act("down")
    + conv("up", "down", 8, 1, norm=False)
    + act("up", "Sigmoid")
    + layer("flat", "Flatten", "up")
    + layer("gated", "Scale", "conv2 flat", "gated", "scale_param { axis: 0 }")
    + add("sum", "gated conv1")
    + act("sum")
    + pool("gap", "sum", "AVE", GLOBAL)
    + dense("fc", "gap", 7),
    # DenseNet: BatchNorm in front, everything concatenated
    "densenet": conv("conv1", "data", 6, norm=False)
    + layer("bn1", "BatchNorm", "conv1", "bn1")
    + layer("scale1", "Scale", "bn1", "bn1", "scale_param { bias_term: true }")
    + act("bn1")
    + conv("grow1", "bn1", 4, norm=False)
    + layer("concat1", "Concat", "conv1 grow1")
    + layer("bn2", "BatchNorm", "concat1", "bn2")
    + layer("scale2", "Scale", "bn2", "bn2", "scale_param { bias_term: true }")
    + act("bn2")
    + conv("grow2", "bn2", 4, norm=False)
    + layer("concat2", "Concat", "concat1 grow2")
    + conv("transition", "concat2", 8, 1, norm=False)
    + pool("pool", "transition", "AVE", "kernel_size: 2 stride: 2")
    + dense("fc", "pool", 7),
    # Inception and ShuffleNet: branches into a Concat, Slice and Concat of one blob
    "inception": conv("conv1", "data", 8)
    + act("conv1")
    + conv("a", "conv1", 4, 1)
    + act("a")
    + pool("pool_b", "conv1", "MAX", "kernel_size: 3 stride: 1 pad: 1")
    + conv("b", "pool_b", 4, 1)
    + act("b")
    + layer("both", "Concat", "a b")
    + layer("halves", "Slice", "both", "half1 half2")
    + layer("swapped", "Concat", "half2 half1")
    + conv("c", "swapped", 8)
    + act("c", "TanH")
    + act("c", "ELU")
    + layer("mfm", "Slice", "c", "mfm1 mfm2")
    + layer("max", "Eltwise", "mfm1 mfm2", "max", "eltwise_param { operation: MAX }")
    + dense("fc", "max", 7),
}
"""The layers behind the input, by family."""


def family(name: str) -> NetParameter:
    """The net of a family."""
    return parse(f'name: "{name}"\n' + HEAD + FAMILIES[name])
