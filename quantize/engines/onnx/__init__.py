"""The embedded engine: ONNX Runtime."""

import os

# Else onnxruntime, when imported, keeps an identifier of the device in the home folder and reports its use to
# its makers. Whoever has set this variable decides.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
