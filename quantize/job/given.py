"""What a job starts from: its settings, and what they name, each file opened or read once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from copy import copy
from pathlib import Path
from typing import TypeVar

from quantize.caffenet import InferenceNet, NetParameter, read_net
from quantize.caffenet.model import Model
from quantize.data.sources import Source, open_source
from quantize.files import sha256
from quantize.settings import Config

Made = TypeVar("Made")


class Given:
    """The settings of a job, its net and its model, and the images that they name.

    Args:
        config: the settings.
        net: the net with all its phases; None: it is read from ``model.prototxt``.

    Attributes:
        config: the settings.
        net: the net with all its phases.

    Raises:
        InputError: the prototxt cannot be read or is no net.
    """

    def __init__(self, config: Config, net: NetParameter | None = None) -> None:
        files = config.model
        self.config = config
        if net is None:
            net = read_net(files.prototxt, files.caffe_proto, files.stages, files.level, files.write)
        self.net = net
        self._made: dict[Hashable, object] = {}

    def with_config(self, config: Config) -> Given:
        """The same with other settings; what has been opened and read is one for both."""
        other = copy(self)
        other.config = config
        return other

    def once(self, what: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make`` gave when it was first asked for ``what``."""
        if what not in self._made:
            self._made[what] = make()
        made: Made = self._made[what]  # type: ignore[assignment]
        return made

    @property
    def inference(self) -> InferenceNet:
        """The net as it runs in the TEST phase.

        Raises:
            InputError: nothing feeds the net.
        """
        return self.once("inference", lambda: InferenceNet.of(self.net))

    @property
    def model(self) -> Model:
        """The model in full precision.

        Raises:
            InputError: its caffemodel cannot be read, is damaged, or has been quantized.
        """
        return self._model_and_hash[0]

    @property
    def hashes(self) -> dict[str, str]:
        """The sha256 of every file of the section ``model``, by its key there.

        Raises:
            InputError: a file cannot be read.
        """
        files = self.config.model
        found = {"prototxt": self.once(files.prototxt, lambda: sha256(files.prototxt))}
        found["weights"] = self._model_and_hash[1]
        schema = files.caffe_proto
        if schema is not None:
            found["caffe_proto"] = self.once(schema, lambda: sha256(schema))
        return found

    @property
    def _model_and_hash(self) -> tuple[Model, str]:
        def read() -> tuple[Model, str]:
            files, digest = self.config.model, hashlib.sha256()
            model = Model.of(self.net, files.weights, files.prototxt, digest)
            return model, digest.hexdigest()

        return self.once("model", read)

    def source(self, path: Path) -> Source:
        """The images that a path names; open until `close`."""
        return self.once(("source", path), lambda: open_source(path))

    def close(self) -> None:
        """Close the images; whatever is asked for again is opened and read anew."""
        for made in self._made.values():
            if isinstance(made, Source):
                made.close()
        self._made.clear()
