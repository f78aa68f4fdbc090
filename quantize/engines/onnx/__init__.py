"""The embedded engine: ONNX Runtime."""
