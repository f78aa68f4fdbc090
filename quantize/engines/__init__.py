"""Executing a Caffe network: the embedded ONNX Runtime engine and real Caffe behind one interface."""

from __future__ import annotations

from collections.abc import Mapping

from quantize.arrays import Shape
from quantize.caffenet import NetParameter, Weights
from quantize.engines.base import Engine, OpenEngine
from quantize.settings import CaffeProcess


def engine_opener(name: str, process: CaffeProcess, threads: int | None) -> OpenEngine:
    """What opens nets for running.

    Args:
        name: ``auto``, ``onnx`` or ``caffe``; auto is onnx.
        process: how to start pycaffe, for ``caffe``.
        threads: threads of the engine; None: as `available_threads` says when a net is opened.
    """

    def open_onnx(net: NetParameter, weights: Weights, inputs: Mapping[str, Shape]) -> Engine:
        from quantize.engines.onnx.engine import OnnxEngine

        return OnnxEngine(net, weights, inputs, threads)

    def open_caffe(net: NetParameter, weights: Weights, inputs: Mapping[str, Shape]) -> Engine:
        from quantize.engines.caffe.engine import CaffeEngine

        return CaffeEngine(
            net,
            weights,
            inputs,
            command=process.python,
            pycaffe_path=process.pycaffe_path,
            preload=process.preload,
            threads=threads,
        )

    return open_caffe if name == "caffe" else open_onnx
