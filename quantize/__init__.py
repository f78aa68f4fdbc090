"""labelfree: compresses trained Caffe networks from unlabeled images (He & Cheng, ECCV 2018)."""

__version__ = "0.1.0"
