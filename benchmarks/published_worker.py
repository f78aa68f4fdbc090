"""The published method the published way, inside a Python that has pycaffe; needs only numpy and caffe.

Written from the method's description: weights by full passes over a layer's array (quasi-Lloyd-Max), renorm
as one training-mode batch of all images, activations by full passes over every ReLU's output.

    python3 published_worker.py FOLDER

FOLDER holds train.prototxt, test.prototxt, model.caffemodel, renorm.npy and activations.npy. Prints one JSON
object.
"""

import json
import os
import resource
import sys
import time

os.environ["GLOG_minloglevel"] = "2"  # noqa: SIM112 - that is its name
import caffe
import numpy as np


def to_power_grid(x, m):
    """Round to 0 and +-2^m .. +-2^(m + 6)."""
    size = np.abs(x)
    low = np.exp2(np.floor(np.log2(np.maximum(size, 1e-30))))
    q = np.where(size > 1.5 * low, 2 * low, low)
    q[size <= 2.0**m / 2] = 0
    q = np.where(q > 0, np.clip(q, 2.0**m, 2.0 ** (m + 6)), 0)
    return np.sign(x) * q


def to_fixed_grid(x, i):
    """Round to 8-bit fixed point with i integer bits."""
    step = 2.0 ** -(8 - i)
    clamped = np.clip(x, -(2.0 ** (i - 1)), 2.0 ** (i - 1) - step)
    return np.ceil(clamped / step - 0.5) * step


def lloyd_max(w, project, variant):
    """Alternate Q = P(w / alpha) and alpha = <w,Q> / <Q,Q> for all kernels until alpha stands still."""
    alpha = np.mean(w**2, axis=1)
    for _ in range(1000):
        before = alpha
        q = project(w / np.maximum(alpha[:, None], 1e-30), variant)
        alpha = np.sum(w * q, axis=1) / (np.sum(q * q, axis=1) + 1e-7)
        if np.linalg.norm(alpha - before) <= 1e-7 * np.linalg.norm(alpha):
            break
    return alpha, q, np.sum((w - alpha[:, None] * q) ** 2)


def quantize_weights(net):
    """All convolutions and inner products; the first and the last in fixed point."""
    names = [n for n, layer in net.layer_dict.items() if layer.type in ("Convolution", "InnerProduct")]
    for name in names:
        blob = net.params[name][0].data
        w = blob.reshape(len(blob), -1).astype(np.float64)
        ends = name in (names[0], names[-1])
        project, variants = (to_fixed_grid, range(1, 9)) if ends else (to_power_grid, range(4))
        found = [lloyd_max(w, project, variant) for variant in variants]
        alpha, q, _ = min(found, key=lambda fit: fit[2])
        blob[...] = (alpha[:, None] * q).reshape(blob.shape)


def renorm(net, images):
    """One training-mode batch leaves mean, unbiased variance and factor 1 in every BatchNorm."""
    norms = [n for n, layer in net.layer_dict.items() if layer.type == "BatchNorm"]
    for name in norms:
        for blob in net.params[name]:
            blob.data[...] = 0
    net.blobs[net.inputs[0]].data[...] = images
    net.forward()


def quantize_activations(net, images):
    """One step per ReLU."""
    net.blobs[net.inputs[0]].data[...] = images
    net.forward()
    steps = []
    for name, layer in net.layer_dict.items():
        if layer.type != "ReLU":
            continue
        x = net.blobs[net.top_names[name][0]].data
        a = x.max() / 127
        loss = np.inf
        while a > 0:
            q = np.clip(np.floor(x / a + 0.5), 0, 127)
            new_loss = np.sum((x - a * q) ** 2)
            new = np.sum(x * q) / np.sum(q * q)
            if new_loss > loss or abs(new - a) <= 1e-3 * a:
                break
            a, loss = new, new_loss
        steps.append(float(a))
    return steps


def main():
    """Run the stages and time each."""
    folder = sys.argv[1]
    caffe.set_mode_cpu()
    times = {}

    def timed(stage, work, *arguments):
        cpu, start = time.process_time(), time.time()
        work(*arguments)
        times[stage] = [time.time() - start, time.process_time() - cpu]

    model = os.path.join(folder, "model.caffemodel")
    net = caffe.Net(os.path.join(folder, "test.prototxt"), caffe.TEST, weights=model)
    timed("weights", quantize_weights, net)
    quantized = os.path.join(folder, "quantized.caffemodel")
    net.save(quantized)
    del net
    net = caffe.Net(os.path.join(folder, "train.prototxt"), caffe.TEST, weights=quantized)
    timed("renorm", renorm, net, np.load(os.path.join(folder, "renorm.npy")))
    net.save(quantized)
    del net
    net = caffe.Net(os.path.join(folder, "test.prototxt"), caffe.TEST, weights=quantized)
    timed("activations", quantize_activations, net, np.load(os.path.join(folder, "activations.npy")))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"times": times, "peak": peak}))


if __name__ == "__main__":
    main()
