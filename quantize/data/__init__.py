"""Images for a net: sources of them, Caffe's data transformation, and batches read ahead by threads."""

from quantize.data.loader import Images
from quantize.data.make_lmdb import LmdbReport, Unreadable, make_datum, make_lmdb, write_lmdb
from quantize.data.sources import Image, Source, open_source
from quantize.data.transform import Transform

__all__ = [
    "Image",
    "Images",
    "LmdbReport",
    "Source",
    "Transform",
    "Unreadable",
    "make_datum",
    "make_lmdb",
    "open_source",
    "write_lmdb",
]
