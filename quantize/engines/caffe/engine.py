"""Runs a net in real Caffe: pycaffe in a child process, so that any interpreter that has it will do.

``Worker`` owns the child process and the frames to and from it (``pycaffe_worker`` describes them);
``CaffeEngine`` is the engine on top.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from itertools import repeat
from typing import IO, Any

import numpy as np

from quantize.arrays import FloatArray, Shape
from quantize.caffenet import LayerShapes, NetParameter, Weights, format_prototxt
from quantize.engines.base import Engine, Range, RangeResult
from quantize.engines.caffe.worker import READY
from quantize.errors import InputError, LabelfreeError
from quantize.host import available_threads
from quantize.numerics.moments import moments_of

TIMEOUT = 600.0
"""Seconds that one answer of the worker may take: far more than a micro-batch needs."""

LOG_BYTES = 64 * 1024
"""How much of the end of the worker's log is kept."""

NOISE_BYTES = 64 * 1024
"""How much a wrapper around the interpreter may print before the worker is there."""

PIPE_BYTES = 1024 * 1024
HEADER_BYTES = 64 * 1024 * 1024
MESSAGE_CHARS = 500
EXIT_SECONDS = 5.0
POLL_SECONDS = 0.5

OLD_LAYER = "threshold_param.threshold, must be a whole number from 1 to 255, or 0 for 127, not -"
"""What an ActQuantize says to a negative threshold that is older than codes of both signs."""

_GLOG_FATAL = re.compile(r"^F\d{4,8} \S+\s+\d+ (?P<place>[^\]]+)\] (?P<text>.*)")


class Worker:
    """A child process that runs ``pycaffe_worker`` and answers one request at a time.

    The child has a session of its own: an interrupt from the terminal reaches this process only, which then
    ends the child. It ends, too, when this process dies, for its input ends then.

    Args:
        command: the interpreter that has pycaffe, e.g. ``["chroot", "/path", "python3"]``. Nothing but its
            standard input, output and error need to be shared with it.
        pycaffe_path: prepended to that interpreter's ``sys.path``.
        preload: a shared library with extra layers, as the interpreter sees its path.
        threads: threads for Caffe's matrix products; default: as `available_threads` says.
        timeout: seconds that one answer may take.

    Raises:
        InputError: there is no such command, or it cannot import numpy and caffe or load the library.
    """

    def __init__(
        self,
        command: Sequence[str],
        pycaffe_path: str | None = None,
        preload: str | None = None,
        threads: int | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self._command = " ".join(command)
        self._timeout = timeout
        self._opened = 0
        source = resources.files("quantize.engines.caffe").joinpath("worker.py").read_text("utf-8")
        try:
            self._process = subprocess.Popen(
                [*command, "-c", source],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"caffe.python: cannot start {self._command!r}: {error}; name an interpreter that has pycaffe"
            ) from error
        self._requests, self._replies = _pipe(self._process.stdin), _pipe(self._process.stdout)
        os.set_blocking(self._requests.fileno(), False)
        for pipe in (self._requests, self._replies):
            with suppress(OSError):  # it works, at half the speed, with the system's small pipes as well
                fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._end = weakref.finalize(self, _kill, self._process)
        self._log = _Log(self._process)
        self.versions = self._start(pycaffe_path, preload, threads or available_threads())

    def _start(self, pycaffe_path: str | None, preload: str | None, threads: int) -> dict[str, str]:
        start = {"op": "start", "path": pycaffe_path, "preload": preload, "threads": threads}
        try:
            with self._deadline("starting pycaffe"):
                self._skip_noise()
            answer, _ = self.call("starting pycaffe", start)
        except LabelfreeError as error:
            self.close()
            raise InputError(
                f"caffe.python: {error}; check caffe.python, caffe.pycaffe_path and caffe.preload"
            ) from error
        return {name: str(answer.get(name)) for name in ("python", "numpy", "caffe")}

    def open(self, net: NetParameter, inputs: Mapping[str, Shape]) -> tuple[int, dict[str, LayerShapes]]:
        """Open a net in the TEST phase.

        Returns:
            Its number for later requests, and the shapes of every layer's tops and blobs.

        Args:
            net: no data layers; include and exclude rules have been applied.
            inputs: shape of each input blob, batch first.

        Raises:
            InputError: Caffe refuses the net.
        """
        asked = NetParameter()
        asked.CopyFrom(net)
        for field in ("input", "input_shape", "input_dim", "state"):
            asked.ClearField(field)
        for name, shape in inputs.items():
            asked.input.append(name)
            asked.input_shape.add().dim.extend(shape)
        for layer in asked.layer:
            for field in ("include", "exclude", "blobs"):
                layer.ClearField(field)
        self._opened += 1
        header = {
            "op": "open",
            "net": self._opened,
            "prototxt": format_prototxt(asked),
            "layers": [[layer.name, layer.type] for layer in asked.layer],
            "inputs": list(inputs),
        }
        try:
            answer, _ = self.call(f"opening the net {net.name!r}", header)
        except LabelfreeError as error:
            raise InputError(str(error)) from None
        told = {
            name: LayerShapes([tuple(top) for top in tops], [tuple(blob) for blob in blobs])
            for name, tops, blobs in answer["shapes"]
        }
        return self._opened, told

    def call(
        self,
        doing: str,
        header: Mapping[str, Any],
        arrays: Sequence[FloatArray] = (),
        into: Sequence[FloatArray | None] = (),
    ) -> tuple[dict[str, Any], list[FloatArray]]:
        """Send a request and wait for its answer.

        Args:
            doing: what is being done, for messages.
            header: the request.
            arrays: sent with it.
            into: per array of the answer, the array to read it into (or None, or fewer: a fresh one).

        Raises:
            LabelfreeError: the worker answered with an error, died, hung or spoke nonsense.
        """
        with self._deadline(doing):
            self._write_frame(header, arrays)
            answer = self._read_header()
            targets = [*into, *repeat(None, len(answer["arrays"]))]
            received = [self._read_array(*pair) for pair in zip(answer["arrays"], targets, strict=False)]
        if "error" in answer:
            raise LabelfreeError(f"{doing}: {_one_line(str(answer['error']))}")
        return answer, received

    @property
    def alive(self) -> bool:
        """Whether requests can be made."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the child process."""
        with suppress(OSError):
            self._requests.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_SECONDS)
        self._end()

    @contextmanager
    def _deadline(self, doing: str) -> Iterator[None]:
        """Bound an exchange in time; whatever ends it early, an interrupt included, ends the child."""
        self._expires = time.monotonic() + self._timeout
        try:
            if not self._end.alive:
                raise _LostError("it has ended")
            yield
        except _LostError as lost:
            code = self._end_now()
            reason = lost.reason if code is None else f"it ended ({code})"
            raise LabelfreeError(
                f"{self._command} failed while {doing}: {reason}{self._log.tail()}"
            ) from None
        except BaseException:
            self._end_now()
            raise

    def _end_now(self) -> str | None:
        """End the child; return how it had ended by itself, if it had."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(POLL_SECONDS)
        code = self._process.poll()
        self._end()
        if code is None:
            return None
        if code < 0:
            return signal.Signals(-code).name
        return f"exit code {code}"

    def _skip_noise(self) -> None:
        seen = b""
        while not seen.endswith(READY):
            if len(seen) > NOISE_BYTES:
                raise _LostError("it printed text instead of starting the worker")
            byte = bytearray(1)
            self._receive(memoryview(byte))
            seen += byte

    def _write_frame(self, header: Mapping[str, Any], arrays: Sequence[FloatArray]) -> None:
        sent = [np.ascontiguousarray(array, "<f4") for array in arrays]
        text = json.dumps({**header, "arrays": [array.shape for array in sent]}).encode()
        self._send(memoryview(struct.pack("<I", len(text)) + text))
        for array in sent:
            self._send(array.reshape(-1).view(np.uint8).data)

    def _read_header(self) -> dict[str, Any]:
        prefix = bytearray(4)
        self._receive(memoryview(prefix))
        size: int = struct.unpack("<I", prefix)[0]
        if size > HEADER_BYTES:
            raise _LostError("its answer is not a frame")
        text = bytearray(size)
        self._receive(memoryview(text))
        try:
            header = json.loads(text)
        except ValueError:
            header = None
        if not isinstance(header, dict) or "arrays" not in header:
            raise _LostError("its answer is not a frame")
        return header

    def _read_array(self, shape: Sequence[int], into: FloatArray | None) -> FloatArray:
        if into is not None and into.shape != tuple(shape):
            raise _LostError(f"it answered with a blob of shape {tuple(shape)} instead of {into.shape}")
        array = np.empty(shape, "<f4") if into is None else into
        self._receive(array.reshape(-1).view(np.uint8).data)
        return array

    def _send(self, data: memoryview) -> None:
        descriptor = self._requests.fileno()
        while data:
            self._wait(descriptor, select.POLLOUT)
            try:
                data = data[os.write(descriptor, data) :]
            except BlockingIOError:
                continue
            except OSError:
                raise _LostError("it closed its input") from None

    def _receive(self, data: memoryview) -> None:
        descriptor = self._replies.fileno()
        while data:
            self._wait(descriptor, select.POLLIN)
            count = os.readv(descriptor, [data])
            if not count:
                raise _LostError("it closed its output")
            data = data[count:]

    def _wait(self, descriptor: int, event: int) -> None:
        """Wait until the pipe is ready, but not for a child that is dead or late."""
        poll = select.poll()
        poll.register(descriptor, event)
        while not poll.poll(POLL_SECONDS * 1000):
            if self._process.poll() is not None:
                raise _LostError("it ended")
            if time.monotonic() > self._expires:
                raise _LostError(f"no answer within {self._timeout:g} s")


class _LostError(Exception):
    """The child cannot be spoken to any more; says why in a few words."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class _Log:
    """Collects what the child writes to its standard error; keeps the end."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._stream = _pipe(process.stderr)
        self._bytes = b""
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        with self._stream:
            while part := self._stream.read(4096):
                self._bytes = (self._bytes + part)[-LOG_BYTES:]

    def tail(self) -> str:
        """What the log says about a failure, for the end of a message: Caffe's words, or the last lines."""
        self._thread.join(POLL_SECONDS)
        lines = [line.strip() for line in self._bytes.decode(errors="replace").splitlines() if line.strip()]
        said = [line for line in lines if "libprotobuf ERROR" in line or "libprotobuf FATAL" in line]
        said += [
            f"{fatal['text']} ({fatal['place']})" for line in lines if (fatal := _GLOG_FATAL.match(line))
        ]
        words = _one_line(" | ".join(said or lines[-5:]))
        if "Unknown layer type" in words:
            words += "; build that layer (`labelfree layers DIR`) and name its library in caffe.preload"
        elif OLD_LAYER in words:
            words += "; its ActQuantize is older than codes of both signs: install ours again (docs/caffe.md)"
        return f": {words}" if words else ""


def _one_line(text: str) -> str:
    """The text in one line of bounded length."""
    text = " ".join(text.split())
    return text if len(text) <= MESSAGE_CHARS else text[: MESSAGE_CHARS - 3] + "..."


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a child, its own children included, and close the pipes to it."""
    if process.poll() is None:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(EXIT_SECONDS)
    for pipe in (process.stdin, process.stdout):
        _pipe(pipe).close()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    """One of a child's streams, of which we know that it is a pipe."""
    assert stream is not None
    return stream


class CaffeEngine(Engine):
    """A net opened in pycaffe.

    Args:
        net, weights, inputs: see ``Engine``.
        command, pycaffe_path, preload, threads, timeout: how to start a ``Worker`` of its own.
        worker: the one to run in instead; it is shared and stays when this engine closes.

    Raises:
        InputError: there is no pycaffe, Caffe refuses the net, or a blob has the wrong shape.
    """

    def __init__(
        self,
        net: NetParameter,
        weights: Weights,
        inputs: Mapping[str, Shape],
        command: Sequence[str] = ("python3",),
        pycaffe_path: str | None = None,
        preload: str | None = None,
        threads: int | None = None,
        timeout: float = TIMEOUT,
        *,
        worker: Worker | None = None,
    ) -> None:
        self._shares = worker is not None
        self.number = 0  # until the net is open
        self.worker = worker or Worker(command, pycaffe_path, preload, threads, timeout)
        try:
            batch = {name: (1, *shape) for name, shape in inputs.items()}
            self.number, told = self.worker.open(_for_inference(net), batch)
            super().__init__(net, weights, inputs, told)
            for layer in self.shapes.params:
                self._send_blobs(layer)
        except BaseException:
            self.close()
            raise

    def set_blobs(self, layer: str, blobs: Sequence[FloatArray]) -> None:
        """Replace a layer's blobs for the ranges run from now on; the net may lack the layer."""
        super().set_blobs(layer, blobs)
        self._send_blobs(layer)

    def _send_blobs(self, layer: str) -> None:
        if self.shapes.params.get(layer):
            header = {"op": "set_blobs", "net": self.number, "layer": layer}
            self.worker.call(f"setting the blobs of layer {layer!r}", header, self.weights[layer])

    def compile(
        self,
        start: int,
        stop: int,
        outputs: Sequence[str],
        moments: Sequence[str] = (),
    ) -> Range:
        """Prepare the layers ``start <= i < stop``; see ``Engine``."""
        return _CaffeRange(self, start, stop, outputs, moments)

    def close(self) -> None:
        """Close the net, and the worker if it is this engine's own."""
        if not self._shares:
            self.worker.close()
        elif self.number and self.worker.alive:
            self.worker.call("closing a net", {"op": "close", "net": self.number})


def _for_inference(net: NetParameter) -> NetParameter:
    """The net with BatchNorms that use their stored statistics whatever use_global_stats says."""
    changed = NetParameter()
    changed.CopyFrom(net)
    for layer in changed.layer:
        if layer.type == "BatchNorm":
            layer.batch_norm_param.use_global_stats = True
    return changed


class _CaffeRange(Range):
    """Layers ``start <= i < stop`` of a ``CaffeEngine``'s net."""

    def __init__(
        self, engine: CaffeEngine, start: int, stop: int, outputs: Sequence[str], moments: Sequence[str]
    ) -> None:
        self._engine = engine
        self._outputs = tuple(outputs)
        self._moments = tuple(moments)
        results = list(dict.fromkeys([*outputs, *moments]))
        layers = engine.net.layer[start:stop]
        read: list[str] = []
        written: set[str] = set()
        for layer in layers:
            read += [name for name in layer.bottom if name not in written and name not in read]
            written.update(layer.top)
        self._read = read
        self._computed = [name for name in results if name in written]
        self._passed = [name for name in results if name not in written]
        self.inputs = tuple(dict.fromkeys([*read, *self._passed]))
        self._header = {
            "op": "run",
            "net": engine.number,
            "start": start,
            "stop": stop,
            "feeds": read,
            "outputs": self._computed,
        }
        self._doing = f"running layers {layers[0].name!r} to {layers[-1].name!r}" if layers else ""

    def run(
        self, feeds: Mapping[str, FloatArray], into: Mapping[str, FloatArray] | None = None
    ) -> RangeResult:
        """Run on one micro-batch; see ``Range``. The moments are taken here."""
        into = into or {}
        values = {name: feeds[name] for name in self._passed}
        if self._computed:
            sent = [feeds[name] for name in self._read]
            targets = [into.get(name) for name in self._computed]
            _, arrays = self._engine.worker.call(self._doing, self._header, sent, targets)
            values.update(zip(self._computed, arrays, strict=True))
        blobs = {}
        for name in self._outputs:
            blobs[name] = values[name]
            if name in self._passed:
                blobs[name] = into[name] if name in into else np.empty_like(values[name])
                np.copyto(blobs[name], values[name])
        return RangeResult(blobs, {name: moments_of(values[name]) for name in self._moments})
