# ruff: noqa: B905, SIM115, UP004, UP006, UP010, UP020, UP024, UP031, UP035
"""Runs nets in pycaffe for ``quantize.engines.caffe``, which starts this file's text with ``python -c``.

It needs numpy and caffe only and runs under Python 2.7 and 3 alike (hence the type comments and the old
idioms); it must stay one file, in ASCII.

Requests come in on file descriptor 0 and replies go out on what was descriptor 1 at the start, as frames:

    uint32, little endian   size of the header
    header                  a JSON object; "arrays" lists the shapes of the arrays that follow
    arrays                  float32, little endian, C order, one after the other

The first bytes out are the line ``READY``, so that the other side can skip what a wrapper script printed. A
request names its operation in "op"; a reply with "error" says in one line why it failed. Descriptor 1 is then
pointed at descriptor 2 and descriptor 0 at the null device: what Caffe or a library prints cannot get between
the frames. The process ends when its input ends.
"""

from __future__ import absolute_import, division, print_function

import ctypes
import io
import json
import os
import struct
import subprocess
import sys
import tempfile

MYPY = False
if MYPY:
    from typing import Any, BinaryIO, Dict, List, Optional, Tuple  # noqa: F401 - type comments use them

    Header = Dict[str, Any]

READY = b"labelfree pycaffe worker 1\n"


class OpenNet(object):
    """A ``caffe.Net`` and where the layers of the net it was asked for are in it.

    Caffe puts a Split layer behind each blob that several layers read, and may add an Input layer, so layer i
    of the asked net is layer ``positions[i]`` of Caffe's. A Split's tops share the memory of its bottom from
    the moment it runs; feeding a blob therefore means running its Split, too.
    """

    def __init__(self, net, layers, inputs):
        # type: (Any, List[List[str]], List[str]) -> None
        self.net = net
        self.inputs = inputs
        self.positions = []  # type: List[int]
        self.splits = []  # type: List[Tuple[int, str]]
        names = list(self.net._layer_names)
        for index, name in enumerate(names):
            kind = self.net.layers[index].type
            wanted = layers[len(self.positions)] if len(self.positions) < len(layers) else ["", ""]
            if name == wanted[0] and (kind == wanted[1] or kind not in ("Input", "Split")):
                self.positions.append(index)
            elif kind == "Split":
                self.splits.append((index, self.net.bottom_names[name][0]))
        if len(self.positions) < len(layers):
            raise ValueError("Caffe left out layer %s" % layers[len(self.positions)][0])

    def shapes(self):
        # type: () -> List[Any]
        """Per asked layer its name, the shapes of its tops and those of its parameters."""
        found = []
        for position in self.positions:
            name = self.net._layer_names[position]
            tops = [list(self.net.blobs[top].shape) for top in self.net.top_names[name]]
            found.append([name, tops, [list(blob.shape) for blob in self.net.params.get(name, [])]])
        return found

    def set_blobs(self, layer, arrays):
        # type: (str, List[Any]) -> None
        """Replace a layer's parameters; an array may have another shape of the same size."""
        blobs = self.net.params.get(layer, [])
        sizes = [blob.count for blob in blobs]
        given = [array.size for array in arrays]
        if sizes != given:
            raise ValueError("layer %s has blobs of %s values in Caffe, not %s" % (layer, sizes, given))
        for blob, array in zip(blobs, arrays):
            blob.data[...] = array.reshape(blob.data.shape)

    def run(self, start, stop, feeds, outputs):
        # type: (int, int, Dict[str, Any], List[str]) -> List[Any]
        """Run layers ``start <= i < stop`` of the asked net and return views of the named blobs."""
        for array in list(feeds.values())[:1]:
            self._resize(len(array))
        for name, array in feeds.items():
            data = self.net.blobs[name].data
            if data.shape != array.shape:
                raise ValueError("blob %s is %s in Caffe, not %s" % (name, data.shape, array.shape))
            data[...] = array
        first = self.positions[start]
        for index, bottom in self.splits:
            if index < first and bottom in feeds:
                self.net._forward(index, index)
        self.net._forward(first, self.positions[stop - 1])
        return [self.net.blobs[name].data for name in outputs]

    def _resize(self, batch):
        # type: (int) -> None
        """Make every blob hold ``batch`` images, by way of the net's inputs."""
        shapes = [list(self.net.blobs[name].shape) for name in self.inputs]
        if all(shape[0] == batch for shape in shapes):
            return
        for name, shape in zip(self.inputs, shapes):
            self.net.blobs[name].reshape(batch, *shape[1:])
        self.net.reshape()


class Worker(object):
    """Answers requests one after the other."""

    def __init__(self, requests, replies):
        # type: (BinaryIO, BinaryIO) -> None
        self.requests = requests
        self.replies = replies
        self.nets = {}  # type: Dict[int, OpenNet]
        self.caffe = None  # type: Any
        self.numpy = None  # type: Any
        self.folder = ""
        self.cleaner = None  # type: Any

    def serve(self):
        # type: () -> None
        """Answer until the input ends."""
        while True:
            request = self._read()
            if request is None:
                return
            try:
                reply, arrays = self._answer(*request)
            except Exception as error:
                reply, arrays = {"error": "%s: %s" % (type(error).__name__, error)}, []
            self._write(reply, arrays)

    def _answer(self, header, arrays):
        # type: (Header, List[Any]) -> Tuple[Header, List[Any]]
        op = header["op"]
        if op == "start":
            return self._start(header), []
        if op == "open":
            caffe_net = self._load(header["prototxt"])
            opened = OpenNet(caffe_net, header["layers"], header["inputs"])
            self.nets[header["net"]] = opened
            return {"shapes": opened.shapes()}, []
        if op == "close":
            self.nets.pop(header["net"], None)
            return {}, []
        net = self.nets[header["net"]]
        if op == "set_blobs":
            net.set_blobs(header["layer"], arrays)
            return {}, []
        if op == "run":
            feeds = dict(zip(header["feeds"], arrays))
            return {}, net.run(header["start"], header["stop"], feeds, header["outputs"])
        raise ValueError("unknown operation %r" % op)

    def _start(self, header):
        # type: (Header) -> Header
        """Import caffe, then load the library with extra layers.

        Symbols are made global so that a library that was not linked against libcaffe finds them, too. It is
        loaded here rather than named in LD_PRELOAD, which would reach the programs around this one (chroot)
        and whose faults are no more than a warning.
        """
        for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[variable] = str(header["threads"])
        os.environ.setdefault("GLOG_minloglevel", "1")
        if header["path"]:
            sys.path.insert(0, header["path"])
        import numpy

        self.numpy = numpy
        flags = sys.getdlopenflags()
        sys.setdlopenflags(flags | ctypes.RTLD_GLOBAL)
        import caffe

        sys.setdlopenflags(flags)
        caffe.set_mode_cpu()
        if header["preload"]:
            ctypes.CDLL(header["preload"], ctypes.RTLD_GLOBAL)
        self.caffe = caffe
        self.folder, self.cleaner = _temporary_folder()
        return {
            "python": sys.version.split()[0],
            "numpy": numpy.__version__,
            "caffe": getattr(caffe, "__version__", "unknown"),
        }

    def _load(self, prototxt):
        # type: (str) -> Any
        """Open a net from its text: ``caffe.Net`` reads files only."""
        path = os.path.join(self.folder, "net.prototxt")
        with io.open(path, "wb") as file:
            file.write(prototxt.encode("utf-8"))
        return self.caffe.Net(path, self.caffe.TEST)

    def _read(self):
        # type: () -> Optional[Tuple[Header, List[Any]]]
        size = self.requests.read(4)
        if len(size) < 4:
            return None
        header = json.loads(self.requests.read(struct.unpack("<I", size)[0]).decode("utf-8"))
        arrays = []
        for shape in header["arrays"]:
            array = self.numpy.empty(shape, "<f4")
            flat = array.reshape(-1).view("u1")
            while flat.size:
                count = self.requests.readinto(flat)  # type: ignore[attr-defined]
                if not count:
                    return None
                flat = flat[count:]
            arrays.append(array)
        return header, arrays

    def _write(self, header, arrays):
        # type: (Header, List[Any]) -> None
        header["arrays"] = [list(array.shape) for array in arrays]
        text = json.dumps(header).encode("utf-8")
        self.replies.write(struct.pack("<I", len(text)) + text)
        for array in arrays:
            self.replies.write(self.numpy.ascontiguousarray(array, "<f4").reshape(-1).view("u1"))
        self.replies.flush()


def _temporary_folder():
    # type: () -> Tuple[str, Any]
    """A folder, and a shell that removes it when this process is gone, even if Caffe aborts it.

    The shell waits for its input to end; keep the reference to it, or that is at once.
    """
    folder = tempfile.mkdtemp(prefix="labelfree-")
    with io.open(os.devnull, "wb") as null:
        cleaner = subprocess.Popen(
            ["sh", "-c", 'cat; rm -rf "$0"', folder],
            stdin=subprocess.PIPE,
            stdout=null,
            stderr=null,
            close_fds=True,
            preexec_fn=os.setsid,
        )
    return folder, cleaner


def main():
    # type: () -> None
    """Keep the pipes for frames, point descriptors 0 and 1 elsewhere, and serve."""
    requests = io.open(os.dup(0), "rb")
    replies = io.open(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    replies.write(READY)
    replies.flush()
    try:
        Worker(requests, replies).serve()
    except (IOError, OSError, KeyboardInterrupt):
        os._exit(1)  # the other side is gone
    os._exit(0)  # without the destructors of Caffe and its libraries, which have nothing left to save


if __name__ == "__main__":
    main()
