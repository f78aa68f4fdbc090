"""Caffe's messages as Python classes, built from ``caffe.desc`` in a pool of their own.

The pool is private because pycaffe registers its own ``caffe.proto`` in protobuf's default pool, and two
files of one name with different contents cannot share a pool. ``schema.pyi`` tells type checkers what is in
here; both it and ``caffe.desc`` come from ``caffe.proto`` by ``scripts/compile_proto``.
"""

from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_files = descriptor_pb2.FileDescriptorSet.FromString((Path(__file__).parent / "caffe.desc").read_bytes())
_pool = descriptor_pool.DescriptorPool()
for _file in _files.file:
    _pool.Add(_file)

DESCRIPTOR = _pool.FindFileByName("caffe.proto")
for _name, _message in DESCRIPTOR.message_types_by_name.items():
    globals()[_name] = message_factory.GetMessageClass(_message)
for _enum in DESCRIPTOR.enum_types_by_name.values():
    globals().update({_value.name: _value.number for _value in _enum.values})
