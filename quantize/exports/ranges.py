"""Tables of activation ranges, for clients that take the plain pair and quantize its weights themselves.

Names are those of the folded plain pair (`caffe`): of blobs, in the record of AMCT of layers. What each
client does with weights stands in NAME_ranges.txt, and in the head of files whose formats have comments. Most
take the largest weight of a kernel as 127: of a power-of-two grid that is 64, 127 / 64 is no whole number,
and so smaller levels come out up to 0.8 % away.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping

import numpy as np
from google.protobuf.text_encoding import CEscape

from quantize.caffenet import NetParameter
from quantize.caffenet.quantized import Quantizer
from quantize.caffenet.strings import to_bytes
from quantize.errors import InputError
from quantize.exports.caffe import plain_net
from quantize.exports.integers import IntegerLayer, IntegerNet, whole_codes
from quantize.exports.target import Exported

SIGNED_CODES, BYTE_CODES = 127, 255
"""The highest code of a signed byte, as these clients use it, and of an unsigned one."""
_LARGEST_IS_127 = "the largest of each output channel becomes 127, so others move by up to 0.8 %."
TPU_MLIR = f"tpu-mlir: model_deploy.py --calibration_table. Weights: {_LARGEST_IS_127}"
TENSORRT = (
    "TensorRT: what readCalibrationCache of an IInt8EntropyCalibrator2 gives, or trtexec --calib. The first "
    "line names TensorRT's version: change it to yours. Codes are -127 to 127, so a range of 0 to 255 steps "
    f"gets steps twice as wide. Weights: {_LARGEST_IS_127}"
)
AMCT = (
    "AMCT (Ascend, Caffe): record_file of convert_model. Weights: of Convolution and Deconvolution ours "
    "exactly, by a scale for each output channel (-128 may become 127, with the other sign); of InnerProduct "
    "one scale for all, the largest over 127."
)
QNN = (
    "QNN and SNPE: --quantization_overrides of the converter. Weights: the converter's own, from the least "
    "to the largest (of each output channel with --use_per_channel_quantization)."
)


def export_ranges(net: IntegerNet, name: str) -> Exported:
    """Make NAME_tpu_mlir.table, NAME_tensorrt.cache, NAME_amct.txt, NAME_qnn.json and NAME_ranges.txt.

    Raises:
        InputError: a blob has a name that the tables cannot hold.
    """
    plain, quantizers = plain_net(net)
    for blob in quantizers:
        if re.search(r"[\s:]", blob):
            raise InputError(
                f"blob {blob!r}: names with blanks or colons cannot stand in tables of ranges; rename it in "
                "the prototxt"
            )
    about = f"Ranges for the plain pair {name}_plain of `labelfree export --to caffe`.\n"
    files = {
        f"{name}_tpu_mlir.table": _tpu_mlir(quantizers),
        f"{name}_tensorrt.cache": _tensorrt(quantizers),
        f"{name}_amct.txt": _amct(plain, net.layers, quantizers),
        f"{name}_qnn.json": _qnn(quantizers),
    }
    heads = (TPU_MLIR, TENSORRT, AMCT, QNN)
    lines = [about, *(f"{file}\n{head}\n" for file, head in zip(files, heads, strict=True))]
    files[f"{name}_ranges.txt"] = "\n".join(lines)
    content = {file: to_bytes(text) for file, text in files.items()}
    return Exported(content, net.floats, ("names are those of the plain pair: labelfree export --to caffe",))


def _range(quantizer: Quantizer) -> tuple[float, float]:
    return quantizer.lowest * quantizer.step, quantizer.highest * quantizer.step


def _tpu_mlir(quantizers: Mapping[str, Quantizer]) -> str:
    """Lines of name, threshold (for symmetric codes), least and largest value."""
    lines = [f"# {TPU_MLIR}", "# op_name    threshold    min    max"]
    for blob, quantizer in quantizers.items():
        low, high = _range(quantizer)
        lines.append(f"{blob} {high:.7f} {low:.7f} {high:.7f}")
    return "\n".join(lines) + "\n"


def _tensorrt(quantizers: Mapping[str, Quantizer]) -> str:
    """Lines of name and step, a float32 as big-endian hexadecimal digits; codes are -127 to 127."""
    lines = ["TRT-8601-EntropyCalibration2"]
    for blob, quantizer in quantizers.items():
        step = _range(quantizer)[1] / SIGNED_CODES
        lines.append(f"{blob}: {struct.pack('>f', step).hex()}")
    return "\n".join(lines) + "\n"


def _amct(
    plain: NetParameter, layers: Mapping[str, IntegerLayer], quantizers: Mapping[str, Quantizer]
) -> str:
    """A ScaleOffsetRecord in protobuf's text format: x = scale_d * (q - offset_d), q a signed byte."""
    lines = [f"# {AMCT}"]
    for layer in plain.layer:
        if layer.name not in layers or layer.bottom[0] not in quantizers:
            continue
        quantizer, found = quantizers[layer.bottom[0]], whole_codes(layers[layer.name])
        if abs(found.codes).max() > SIGNED_CODES + 1:
            continue
        offset = -SIGNED_CODES - 1 if quantizer.highest > SIGNED_CODES else 0
        scales = np.where(found.scale == 0, 1, abs(found.scale))
        if layer.type == "InnerProduct":
            largest = abs(found.codes * found.scale[:, None]).max()
            scales = np.array([largest / SIGNED_CODES or 1.0])
        lines += ["record {", f'  key: "{CEscape(to_bytes(layer.name), as_utf8=False)}"', "  value {"]
        lines += [f"    scale_d: {quantizer.step:.9g}", f"    offset_d: {offset}"]
        lines += [f"    scale_w: {scale:.9g}" for scale in scales]
        lines += ["    offset_w: 0"] * len(scales) + ["  }", "}"]
    return "\n".join(lines) + "\n"


def _qnn(quantizers: Mapping[str, Quantizer]) -> str:
    """Encodings: x = scale * (q + offset), q from 0 to 255; min and max are those of 0 and of 255."""
    encodings = {}
    for blob, quantizer in quantizers.items():
        is_signed = quantizer.lowest < 0
        offset = -SIGNED_CODES - 1 if is_signed else 0
        encodings[blob] = [
            {
                "bitwidth": 8,
                "dtype": "int",
                "is_symmetric": str(is_signed),
                "min": quantizer.step * offset,
                "max": quantizer.step * (BYTE_CODES + offset),
                "offset": offset,
                "scale": quantizer.step,
            }
        ]
    return json.dumps({"activation_encodings": encodings, "param_encodings": {}}, indent=1) + "\n"
