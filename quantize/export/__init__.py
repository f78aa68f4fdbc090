"""What leaves the Caffe world: one module per target."""
