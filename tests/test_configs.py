"""The shipped configurations: published weights must load into their nets, layer by layer."""

import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantize import caffenet
from quantize.commands import config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
NETS = ("alexnet_bn", "resnet18", "resnet50", "vgg16_bn")

# The layers that carry weights, in order: name, then the shape of blob 0; "+" means a bias. [bc] stands for
# one layer per letter, all of that block's before the next block's.
WEIGHTS = {
    "alexnet_bn": """
        conv1 96x3x11x11+  conv2 256x96x5x5+  conv3 384x256x3x3+  conv4 384x384x3x3+  conv5 256x384x3x3+
        fc6 4096x9216+  fc7 4096x4096+  fc8 1000x4096+
    """,
    "vgg16_bn": """
        conv1_1 64x3x3x3+  conv1_2 64x64x3x3+  conv2_1 128x64x3x3+  conv2_2 128x128x3x3+
        conv3_1 256x128x3x3+  conv3_2 256x256x3x3+  conv3_3 256x256x3x3+
        conv4_1 512x256x3x3+  conv4_2 512x512x3x3+  conv4_3 512x512x3x3+
        conv5_1 512x512x3x3+  conv5_2 512x512x3x3+  conv5_3 512x512x3x3+
        fc6 4096x25088+  fc7 4096x4096+  fc8 1000x4096+
    """,
    "resnet18": """
        conv1 64x3x7x7
        res2a_branch1 64x64x1x1    res2a_branch2a 64x64x3x3     res2a_branch2b 64x64x3x3
        res2b_branch2a 64x64x3x3   res2b_branch2b 64x64x3x3
        res3a_branch1 128x64x1x1   res3a_branch2a 128x64x3x3    res3a_branch2b 128x128x3x3
        res3b_branch2a 128x128x3x3 res3b_branch2b 128x128x3x3
        res4a_branch1 256x128x1x1  res4a_branch2a 256x128x3x3   res4a_branch2b 256x256x3x3
        res4b_branch2a 256x256x3x3 res4b_branch2b 256x256x3x3
        res5a_branch1 512x256x1x1  res5a_branch2a 512x256x3x3   res5a_branch2b 512x512x3x3
        res5b_branch2a 512x512x3x3 res5b_branch2b 512x512x3x3
        fc1000 1000x512+
    """,
    "resnet50": """
        conv1 64x3x7x7+
        res2a_branch1 256x64x1x1
        res2a_branch2a 64x64x1x1        res2a_branch2b 64x64x3x3        res2a_branch2c 256x64x1x1
        res2[bc]_branch2a 64x256x1x1    res2[bc]_branch2b 64x64x3x3     res2[bc]_branch2c 256x64x1x1
        res3a_branch1 512x256x1x1
        res3a_branch2a 128x256x1x1      res3a_branch2b 128x128x3x3      res3a_branch2c 512x128x1x1
        res3[bcd]_branch2a 128x512x1x1  res3[bcd]_branch2b 128x128x3x3  res3[bcd]_branch2c 512x128x1x1
        res4a_branch1 1024x512x1x1
        res4a_branch2a 256x512x1x1      res4a_branch2b 256x256x3x3      res4a_branch2c 1024x256x1x1
        res4[bcdef]_branch2a 256x1024x1x1  res4[bcdef]_branch2b 256x256x3x3  res4[bcdef]_branch2c 1024x256x1x1
        res5a_branch1 2048x1024x1x1
        res5a_branch2a 512x1024x1x1     res5a_branch2b 512x512x3x3      res5a_branch2c 2048x512x1x1
        res5[bc]_branch2a 512x2048x1x1  res5[bc]_branch2b 512x512x3x3   res5[bc]_branch2c 2048x512x1x1
        fc1000 1000x2048+
    """,
}

BLOBS = {  # channels, height, width for 224 x 224 images
    "alexnet_bn": "conv1 96x55x55 pool1 96x27x27 pool2 256x13x13 conv5 256x13x13 pool5 256x6x6 fc8 1000",
    "vgg16_bn": "conv1_2 64x224x224 pool1 64x112x112 pool3 256x28x28 conv5_3 512x14x14 pool5 512x7x7 "
    "fc8 1000",
    "resnet18": "conv1 64x112x112 pool1 64x56x56 res2b 64x56x56 res3b 128x28x28 res4b 256x14x14 "
    "res5b 512x7x7 pool5 512x1x1 fc1000 1000",
    "resnet50": "conv1 64x112x112 pool1 64x56x56 res2c 256x56x56 res3d 512x28x28 res3a_branch2a 128x28x28 "
    "res4f 1024x14x14 res5c 2048x7x7 pool5 2048x1x1 fc1000 1000",
}

# Learned parameters (BatchNorm's statistics are none) and multiply-accumulates of the layers with weights.
# For comparison: torchvision's ResNet-18 has 11,689,512 and no convolution in its first shortcut.
LEARNED = {"alexnet_bn": 62_397_480, "resnet18": 11_693_736, "resnet50": 25_557_096, "vgg16_bn": 138_382_376}
MACS = {
    "alexnet_bn": 1_135_256_096,
    "resnet18": 1_826_918_400,
    "resnet50": 3_857_973_248,
    "vgg16_bn": 15_470_264_320,
}

SCORES = {"alexnet_bn": "fc8", "resnet18": "fc1000", "resnet50": "fc1000", "vgg16_bn": "fc8"}
MEAN_BGR = {
    "alexnet_bn": (103.939, 116.779, 123.68),
    "resnet18": (104, 117, 123),
    "vgg16_bn": (104, 117, 123),
}

# SHA-256 of `describe(net)`: pins every name, type, bottom, top and parameter in order, also where the tables
# above are silent. A change here means that the published weights or their meaning no longer fit.
DIGESTS = {
    "alexnet_bn": "2f5741d3cd11437cc315bd491a3fb0f8f7cb015e37794c321789611c36a83eb9",
    "resnet18": "3dc61b12d096706cc72553c99b8655c9c0fc04620547aa7787119470a0fbba77",
    "resnet50": "1b27f116cb8798488b4397a4bb112ef6e81dc9fa3484a177c48fbb41e2377281",
    "vgg16_bn": "75d8124568f5fca08935aae19030fa9b0a08986ea76f17bb94687d02df213496",
}

PUBLISHED = {  # top-1 / top-5 of the paper's implementation, full precision and quantized
    "alexnet_bn": ("60.43 / 82.47", "60.12 / 82.22"),
    "resnet18": ("69.08 / 89.03", "67.48 / 88.02"),
    "resnet50": ("75.30 / 92.11", "73.82 / 91.33"),
    "vgg16_bn": ("70.44 / 89.94", "69.15 / 89.52"),
}


def read(name):
    return caffenet.read_prototxt(CONFIGS / "models" / f"{name}.prototxt")


def inference(name):
    return caffenet.inference_net(caffenet.filter_net(read(name), caffenet.TEST), ["data"])


def shapes(name):
    return caffenet.infer_shapes(inference(name), {"data": (1, 3, 224, 224)})


def dims(text):
    return tuple(int(n) for n in text.split("x"))


def table(text):
    """Pairs of name and shape text, with [..] expanded block by block."""
    rows = []
    pairs = re.findall(r"(\S+)\s+(\S+)", text)
    for stage, group in itertools.groupby(pairs, key=lambda pair: pair[0].partition("]")[0]):
        rows_of_stage = list(group)
        for letter in stage.split("[")[1] if "[" in stage else [""]:
            rows += [(re.sub(r"\[\w+\]", letter, name), shape) for name, shape in rows_of_stage]
    return rows


def norms(name, layer):
    """What the BatchNorm and the Scale behind a layer are called."""
    if name == "alexnet_bn":
        return f"bn{layer[-1]}", f"scale{layer[-1]}"
    if name == "vgg16_bn":
        return f"{layer}_bn", f"{layer}_scale"
    unit = "_conv1" if layer == "conv1" else layer.removeprefix("res")
    return f"bn{unit}", f"scale{unit}"


def plain(field, value):
    """A field's value as JSON has it: enums by name, floats as they were written."""
    repeated = not isinstance(value, bool | int | float | str)
    values = list(value) if repeated else [value]
    if field.enum_type:
        values = [field.enum_type.values_by_number[v].name for v in values]
    values = [float(f"{v:.6g}") if isinstance(v, float) else v for v in values]
    return values if repeated else values[0]


def describe(net):
    """One line per layer: name | type | bottoms -> tops | parameters | phase; no paths, no batch sizes."""
    lines = []
    for layer in net.layer:
        if layer.type == "Input":
            continue
        parameters = {}
        for field, message in layer.ListFields():
            if field.name.endswith("_param") and field.name != "data_param":
                parameters |= {part.name: plain(part, value) for part, value in message.ListFields()}
        line = [layer.name, layer.type, f"{' '.join(layer.bottom)} -> {' '.join(layer.top)}"]
        line.append(json.dumps(parameters, sort_keys=True))
        line += [f"phase {'TEST' if rule.phase == caffenet.TEST else 'TRAIN'}" for rule in layer.include]
        lines.append(" | ".join(line))
    return "\n".join(lines)


@pytest.mark.parametrize("name", NETS)
def test_every_layer_is_as_the_weights_were_published(name):
    text = describe(read(name))
    assert hashlib.sha256(text.encode()).hexdigest() == DIGESTS[name], text


@pytest.mark.parametrize("name", NETS)
def test_blobs_of_every_layer_with_weights(name):
    expected = {}
    for layer, shape in table(WEIGHTS[name]):
        weights = dims(shape.rstrip("+"))
        width = weights[0]
        expected[layer] = [weights, (width,)] if shape.endswith("+") else [weights]
        if width != 1000:  # the classifier has no BatchNorm
            batch_norm, scale = norms(name, layer)
            expected[batch_norm] = [(width,), (width,), (1,)]
            expected[scale] = [(width,), (width,)]
    params = {layer: [tuple(s) for s in blobs] for layer, blobs in shapes(name).params.items() if blobs}
    assert list(params) == list(expected)
    assert params == expected


@pytest.mark.parametrize("name", NETS)
def test_blob_sizes_for_224_images(name):
    blobs = shapes(name).blobs
    for blob, shape in re.findall(r"(\S+) (\S+)", BLOBS[name]):
        assert tuple(blobs[blob]) == (1, *dims(shape)), blob


@pytest.mark.parametrize("name", NETS)
def test_learned_parameters_and_multiply_accumulates(name):
    net, found = inference(name), shapes(name)
    types = {layer.name: layer.type for layer in net.layer}
    learned = sum(
        math.prod(shape)
        for layer, blobs in found.params.items()
        for shape in blobs
        if types[layer] != "BatchNorm"
    )
    assert learned == LEARNED[name]
    assert (
        sum(n for layer, n in found.macs.items() if types[layer] in ("Convolution", "InnerProduct"))
        == MACS[name]
    )


@pytest.mark.parametrize("name", NETS)
def test_images_and_scores_are_found(name):
    net = caffenet.filter_net(read(name), caffenet.TEST)
    assert caffenet.input_blobs(net) == ("data",)
    assert caffenet.scores_blob(net) == SCORES[name]


@pytest.mark.parametrize("name", sorted(MEAN_BGR))
@pytest.mark.parametrize("phase", ["TRAIN", "TEST"])
def test_data_layers_prepare_images_as_in_training(name, phase):
    net = caffenet.filter_net(read(name), getattr(caffenet, phase))
    (data,) = [layer for layer in net.layer if layer.type == "Data"]
    assert list(data.transform_param.mean_value) == pytest.approx(MEAN_BGR[name])
    assert data.transform_param.crop_size == 224
    assert data.transform_param.mirror == (phase == "TRAIN")
    assert data.data_param.source == f"/data/ilsvrc12_{'train' if phase == 'TRAIN' else 'val'}_lmdb"
    assert data.data_param.batch_size > 0


def test_the_committed_prototxts_are_what_the_generator_writes(tmp_path):
    subprocess.run([sys.executable, ROOT / "scripts" / "make_configs", tmp_path], check=True)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(written) == [f"{name}.prototxt" for name in NETS]
    for file, text in written.items():
        assert (CONFIGS / "models" / file).read_text() == text, file


@pytest.mark.parametrize("name", NETS)
def test_yaml_names_its_net_and_the_published_results(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    settings = config.load(CONFIGS / f"{name}.yaml")
    assert settings.name == name
    assert settings.model.prototxt.samefile(CONFIGS / "models" / f"{name}.prototxt")
    for published in PUBLISHED[name]:
        assert published in text
        assert published in (CONFIGS / "README.md").read_text()


def test_resnet50_has_its_transform_in_the_yaml_as_its_prototxt_has_no_data_layer():
    assert not any(layer.type == "Data" for layer in read("resnet50").layer)
    transform = config.load(CONFIGS / "resnet50.yaml").data.transform
    assert transform.crop_size == 224
    assert transform.mean_value == [103.063, 115.903, 123.152]
