"""A net for each family of forks: our own, small, with the structure of the family's public nets."""

from dataclasses import dataclass

from tests.families import GLOBAL, HEAD, act, add, conv, dense, layer, pool

IMAGE = (3, 17, 17)
EVEN = HEAD.replace("17, 17", "16, 16")
FLOOR = "pool: AVE kernel_size: 4 stride: 4 ceil_mode: false"
PADDED = "scale: 2 pad_out_h: 1 pad_out_w: 1"
SIZED = "scale: 2 upsample_h: 17 upsample_w: 17"
NV_NORM = "batch_norm_param { eps: 0.0001 scale_bias: true %s } forward_type: FLOAT16"


@dataclass(frozen=True)
class Family:
    """A net and what is odd about it.

    Attributes:
        text: its prototxt.
        outputs: the blobs that `evaluate` scores.
        trailing: the layers that are carried over and not run.
        kept: what the prototxts that are written must still have.
        image: the shape of its images.
        raw: the type of the numbers in its caffemodel's raw_data; empty: as Caffe writes them.
        annotated: whether its images are AnnotatedDatums.
    """

    text: str
    outputs: tuple[str, ...]
    trailing: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    image: tuple[int, int, int] = IMAGE
    raw: str = ""
    annotated: bool = False


def norm(name: str, bottom: str, type_name: str, fields: str) -> str:
    """A layer that normalizes, in place."""
    return layer(name, type_name, bottom, bottom, fields)


def bare(name: str, bottom: str, outputs: int, kernel: int = 3, fields: str = "", more: str = "") -> str:
    """A convolution that keeps the size, without a bias."""
    param = f"num_output: {outputs} kernel_size: {kernel} pad: {kernel // 2} bias_term: false {fields}"
    return layer(name, "Convolution", bottom, name, f"convolution_param {{ {param} }} {more}")


def nv(name: str, bottom: str, outputs: int, more: str = "", fields: str = "") -> str:
    """NVCaffe: a convolution, BatchNorm with scale and bias, ReLU."""
    fields = f'conv_algos_override: "0,-1,-1" {fields}'
    text = bare(name, bottom, outputs, fields=fields, more="forward_type: FLOAT16")
    return text + norm(f"{name}_bn", name, "BatchNorm", NV_NORM % more) + act(name)


def bn(name: str, bottom: str, outputs: int, kernel: int = 3, fields: str = "") -> str:
    """yjxiong's Caffe: a convolution, BN, ReLU."""
    param = "slope_filler { type: 'constant' value: 1 } bias_filler { value: 0 } frozen: true momentum: 0.95"
    text = bare(name, bottom, outputs, kernel, fields)
    return text + norm(f"{name}_bn", name, "BN", f"bn_param {{ {param} }}") + act(name)


def segnet(name: str, bottom: str, outputs: int) -> str:
    """SegNet: a convolution, BN for inference, ReLU."""
    text = conv(name, bottom, outputs, norm=False)
    return text + norm(f"{name}_bn", name, "BN", "bn_param { bn_mode: INFERENCE }") + act(name)


def head(name: str, bottom: str, outputs: int) -> str:
    """SSD: a convolution whose channels come last and are strung together."""
    order = "permute_param { order: 0 order: 2 order: 3 order: 1 }"
    text = conv(name, bottom, outputs, norm=False) + layer(f"{name}_perm", "Permute", name, "", order)
    return text + layer(f"{name}_flat", "Flatten", f"{name}_perm", "", "flatten_param { axis: 1 }")


def prior(name: str, bottom: str) -> str:
    fields = "min_size: 6.0 max_size: 9.0 aspect_ratio: 2 flip: true clip: false variance: 0.1 offset: 0.5"
    return layer(name, "PriorBox", f"{bottom} data", name, f"prior_box_param {{ {fields} }}")


def masked(name: str, bottom: str) -> str:
    """MAX pooling with the mask of its maxima."""
    fields = "pooling_param { pool: MAX kernel_size: 2 stride: 2 }"
    return layer(name, "Pooling", bottom, f"{name} {name}_mask", fields)


def concat(name: str, bottoms: str, axis: int = 1) -> str:
    return layer(name, "Concat", bottoms, name, f"concat_param {{ axis: {axis} }}")


SSD = (
    conv("conv1", "data", 8)
    + act("conv1")
    + layer(
        "conv1_norm",
        "Normalize",
        "conv1",
        "conv1_norm",
        "norm_param { across_spatial: false scale_filler { value: 20 } channel_shared: false }",
    )
    + pool("pool1", "conv1", "MAX")
    + conv("conv2", "pool1", 12)
    + act("conv2")
    + head("loc1", "conv1_norm", 8)
    + head("conf1", "conv1_norm", 6)
    + prior("prior1", "conv1_norm")
    + head("loc2", "conv2", 8)
    + head("conf2", "conv2", 6)
    + prior("prior2", "conv2")
    + layer("mbox_loc", "Concat", "loc1_flat loc2_flat", "mbox_loc", "concat_param { axis: 1 }")
    + layer("mbox_conf", "Concat", "conf1_flat conf2_flat", "mbox_conf", "concat_param { axis: 1 }")
    + layer("mbox_prior", "Concat", "prior1 prior2", "mbox_prior", "concat_param { axis: 2 }")
    + layer(
        "conf_reshape",
        "Reshape",
        "mbox_conf",
        "conf_reshape",
        "reshape_param { shape { dim: 0 dim: -1 dim: 3 } }",
    )
    + layer("conf_softmax", "Softmax", "conf_reshape", "conf_softmax", "softmax_param { axis: 2 }")
    + layer("conf_flatten", "Flatten", "conf_softmax", "conf_flatten", "flatten_param { axis: 1 }")
    + layer(
        "detection_out",
        "DetectionOutput",
        "mbox_loc conf_flatten mbox_prior",
        "detection_out",
        "include { phase: TEST } detection_output_param { num_classes: 3 share_location: true "
        "nms_param { nms_threshold: 0.45 top_k: 400 } code_type: CENTER_SIZE keep_top_k: 200 "
        "save_output_param { output_format: 'VOC' } }",
    )
    + layer(
        "detection_eval",
        "DetectionEvaluate",
        "detection_out label",
        "detection_eval",
        "include { phase: TEST } detection_evaluate_param { num_classes: 3 }",
    )
)

LABELS = layer("labels", "Input", "", "label", "input_param { shape { dim: [1, 1, 8] } }")


def annotated(phase: str) -> str:
    """SSD: the layer that feeds it in training, and in its tests."""
    fields = (
        f"include {{ phase: {phase} }} transform_param {{ mean_value: 104 mean_value: 117 mean_value: 123 "
        "resize_param { prob: 1 resize_mode: WARP height: 17 width: 17 interp_mode: [LINEAR, AREA] } } "
        'data_param { source: "images" batch_size: 2 backend: LMDB } '
        "annotated_data_param { batch_sampler { sampler { min_scale: 0.3 } } batch_sampler { } }"
    )
    return layer("data", "AnnotatedData", "", "data label", fields)


SSD_TRAINED = (
    annotated("TRAIN")
    + annotated("TEST")
    + SSD
    + layer(
        "mbox_loss",
        "MultiBoxLoss",
        "mbox_loc mbox_conf mbox_prior label",
        "mbox_loss",
        "include { phase: TRAIN } propagate_down: true loss_param { normalization: VALID } "
        "multibox_loss_param { num_classes: 3 code_type: CENTER_SIZE }",
    )
)
"""As it is trained and tested."""

FAMILIES: dict[str, Family] = {
    "ssd": Family(
        HEAD + LABELS + SSD,
        ("mbox_loc", "conf_flatten"),
        ("prior1", "prior2", "mbox_prior", "detection_out"),
        ("code_type: CENTER_SIZE", "aspect_ratio: 2", "across_spatial: false", "order: 3"),
        annotated=True,
    ),
    "nvcaffe": Family(
        "default_forward_type: FLOAT16\n"
        + HEAD
        + nv("conv1", "data", 8, "scale_filler { type: 'constant' value: 1 }", "engine: CUDNN")
        + pool("pool1", "conv1", "MAX")
        + nv("conv2", "pool1", 8, "bias_filler { value: 0 }", "cudnn_convolution_algo_seeker: FINDEX")
        + pool("gap", "conv2", "AVE", GLOBAL)
        + dense("fc", "gap", 7)
        + layer("prob", "Softmax", "fc"),
        ("fc",),
        kept=("scale_bias: true", "forward_type: FLOAT16", 'conv_algos_override: "0,-1,-1"'),
        raw="float16",
    ),
    "segnet": Family(
        HEAD
        + segnet("enc1", "data", 6)
        + masked("pool1", "enc1")
        + segnet("enc2", "pool1", 8)
        + masked("pool2", "enc2")
        + layer("up2", "Upsample", "pool2 pool2_mask", "", f"upsample_param {{ {PADDED} }}")
        + segnet("dec2", "up2", 6)
        + layer("up1", "Upsample", "dec2 pool1_mask", "", f"upsample_param {{ {SIZED} }}")
        + conv("scores", "up1", 4, norm=False)
        + layer("prob", "Softmax", "scores"),
        ("scores",),
        kept=("bn_mode: INFERENCE", "upsample_h: 17"),
    ),
    "pspnet": Family(
        HEAD
        + bn("conv1", "data", 8, fields="stride: 2")
        + bn("conv2", "conv1", 8, fields="dilation: 2")
        + layer("pyramid", "Pooling", "conv2", "pyramid", f"pooling_param {{ {FLOOR} }}")
        + bn("conv3", "pyramid", 4, 1)
        + layer("conv3_interp", "Interp", "conv3", "conv3_interp", "interp_param { height: 7 width: 7 }")
        + layer("joined", "Concat", "conv2 conv3_interp")
        + conv("conv6", "joined", 5, 1, norm=False)
        + layer("conv6_interp", "Interp", "conv6", "conv6_interp", "interp_param { zoom_factor: 2 }"),
        ("conv6_interp",),
        kept=("slope_filler", "momentum: 0.95", "zoom_factor: 2", "ceil_mode: false"),
    ),
    "yolo_v2": Family(
        EVEN
        + conv("conv1", "data", 8)
        + act("conv1", "ReLU", "relu_param { negative_slope: 0.1 }")
        + pool("pool1", "conv1", "MAX", "kernel_size: 2 stride: 2")
        + conv("conv2", "pool1", 8)
        + act("conv2", "ReLU", "relu_param { negative_slope: 0.1 }")
        + layer("reorg", "Reorg", "conv1", "reorg", "reorg_param { stride: 2 }")
        + layer("route", "Concat", "reorg conv2")
        + conv("region", "route", 10, 1, norm=False)
        + layer(
            "out",
            "YoloDetectionOutput",
            "region",
            "out",
            "yolo_detection_output_param { num_classes: 5 coords: 4 biases: 1.08 biases: 1.19 }",
        ),
        ("region",),
        ("out",),
        ("biases: 1.19", "stride: 2"),
        (3, 16, 16),
    ),
    "yolo_v4": Family(
        EVEN
        + conv("conv1", "data", 8, fields="stride: 2")
        + act("conv1", "Mish")
        + conv("conv2", "conv1", 8, fields="stride: 2")
        + act("conv2", "Mish")
        + layer("up", "Upsample", "conv2", "up", "upsample_param { scale: 2 }")
        + layer("route", "Concat", "up conv1")
        + conv("yolo1", "route", 6, 1, norm=False)
        + conv("yolo2", "conv2", 6, 1, norm=False)
        + layer(
            "out",
            "Yolov3DetectionOutput",
            "yolo2 yolo1",
            "out",
            "yolov3_detection_output_param { mask_group_num: 2 mask: 3 mask: 0 biases: 10 biases: 13.5 }",
        ),
        ("yolo1", "yolo2"),
        ("out",),
        ("mask_group_num: 2", "biases: 13.5"),
        (3, 16, 16),
    ),
    "shufflenet": Family(
        HEAD
        + conv("conv1", "data", 8, fields="stride: 2")
        + act("conv1")
        + bare("a", "conv1", 8, 1, "group: 2")
        + norm("a_bn", "a", "BatchNorm", "")
        + layer("shuffle", "ShuffleChannel", "a", "shuffle", "shuffle_channel_param { group: 2 }")
        + layer(
            "dw",
            "ConvolutionDepthwise",
            "shuffle",
            "dw",
            "convolution_param { num_output: 8 kernel_size: 3 pad: 1 bias_term: false engine: CAFFE }",
        )
        + norm("dw_bn", "dw", "BatchNorm", "")
        + bare("b", "dw", 8, 1, "group: 2")
        + norm("b_bn", "b", "BatchNorm", "")
        + add("sum", "conv1 b")
        + act("sum")
        + pool("gap", "sum", "AVE", GLOBAL)
        + dense("fc", "gap", 7),
        ("fc",),
        kept=("shuffle_channel_param",),
    ),
    "senet": Family(
        HEAD
        + bare("conv1", "data", 8)
        + norm("conv1_bn", "conv1", "CuDNNBatchNorm", "batch_norm_param { eps: 0.001 frozen: true }")
        + act("conv1")
        + bare("conv2", "conv1", 8)
        + norm("conv2_bn", "conv2", "CuDNNBatchNorm", "cudnn_batch_norm_param { eps: 0.002 }")
        + pool("squeeze", "conv2", "AVE", GLOBAL)
        + conv("down", "squeeze", 4, 1, norm=False)
        + act("down")
        + conv("up", "down", 8, 1, norm=False)
        + act("up", "Sigmoid")
        + layer("axpy", "Axpy", "up conv2 conv1")
        + act("axpy")
        + pool("gap", "axpy", "AVE", GLOBAL)
        + dense("fc", "gap", 7)
        + layer("prob", "Softmax", "fc"),
        ("fc",),
        kept=('type: "Axpy"', "cudnn_batch_norm_param"),
    ),
    "mobilenet_v3": Family(
        HEAD
        + conv("conv1", "data", 8, fields="stride: 2")
        + act("conv1", "HardSwish")
        + conv("dw", "conv1", 8, fields="group: 8")
        + act("dw", "ReLU6", "relu6_param { }")
        + pool("squeeze", "dw", "AVE", GLOBAL)
        + dense("gate", "squeeze", 8)
        + act("gate", "HardSigmoid", "hard_sigmoid_param { alpha: 0.1666667 beta: 0.5 }")
        + layer("gated", "Scale", "dw gate", "gated", "scale_param { axis: 0 }")
        + conv("project", "gated", 8, 1)
        + add("sum", "project conv1")
        + act("sum", "Swish", "swish_param { beta: 1.5 }")
        + pool("gap", "sum", "AVE", GLOBAL)
        + dense("fc", "gap", 7),
        ("fc",),
        kept=('type: "HardSwish"', "beta: 1.5", "hard_sigmoid_param"),
    ),
    "intel": Family(
        HEAD
        + conv("conv1", "data", 8, fields="engine: MKL2017")
        + layer("relu1", "ReLU", "conv1", "conv1", "relu_param { engine: MKLDNN }")
        + layer(
            "pool1",
            "Pooling",
            "conv1",
            "pool1",
            'engine: "MKLDNN:CPU" pooling_param { pool: MAX kernel_size: 3 stride: 2 ceil_mode: true }',
        )
        + conv("conv2", "pool1", 8)
        + act("conv2")
        + pool("gap", "conv2", "AVE", GLOBAL)
        + dense("fc", "gap", 7),
        ("fc",),
        kept=("engine: MKL2017", 'engine: "MKLDNN:CPU"', "ceil_mode: true"),
    ),
    "faster_rcnn": Family(
        HEAD
        + conv("conv1", "data", 8, fields="stride: 2")
        + act("conv1")
        + conv("rpn", "conv1", 8)
        + act("rpn")
        + conv("rpn_score", "rpn", 6, 1, norm=False)
        + conv("rpn_box", "rpn", 12, 1, norm=False)
        + layer(
            "rpn_reshape",
            "Reshape",
            "rpn_score",
            "rpn_reshape",
            "reshape_param { shape { dim: 0 dim: 2 dim: -1 dim: 0 } }",
        )
        + layer("rpn_prob", "Softmax", "rpn_reshape")
        + layer(
            "proposal",
            "Python",
            "rpn_prob rpn_box",
            "rois",
            "python_param { module: 'rpn.proposal' layer: 'ProposalLayer' param_str: 'stride: 2' }",
        ),
        ("rpn_box", "rpn_reshape"),
        ("proposal",),
        ("param_str: ", "ProposalLayer"),
    ),
}
"""By name of the family."""

RECURRENT = (
    HEAD
    + conv("conv1", "data", 8)
    + act("conv1")
    + layer("lstm", "LSTM", "conv1", "lstm", "recurrent_param { num_output: 6 }")
    + layer("pooled", "PSROIPooling", "lstm", "pooled", "psroi_pooling_param { output_dim: 3 group_size: 7 }")
    + dense("fc", "pooled", 7)
)
"""Nobody here runs its middle."""
