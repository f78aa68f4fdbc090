"""Executing a Caffe network: the embedded ONNX Runtime engine and real Caffe behind one interface."""
