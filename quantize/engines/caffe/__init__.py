"""Real Caffe: pycaffe in a process of its own."""
