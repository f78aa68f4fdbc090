"""What leaves the world of Caffe: files that are small and run in integers, one module per target."""
