"""What runs a graph, whatever library it is: the part of onnxruntime's session that is used here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from xadapter_export.errors import ConfigError

Array = NDArray[np.int64] | NDArray[np.float32]
Provider = str | tuple[str, dict[str, str]]


@dataclass(frozen=True)
class Opening:
    """How a graph is opened; an opener leaves aside what its library has nothing for.

    Attributes:
        providers: Execution providers of onnxruntime in order of preference; the CPU if None.
        num_threads: Threads inside one operator; the library's choice if None.
        appended: Bytes to put after the model's, which protobuf merges into it; see ``extra_outputs``.
        weights: Arrays to put in the place of weights of these names, whatever their shape.
        cache_dir: A folder for what the library compiled from this graph; None for nowhere.
        weight_files: Where the graph may have its weights, relative to its folder; None for anywhere.

    Raises:
        ConfigError: If ``num_threads`` is below 1.
    """

    providers: Sequence[Provider] | None = None
    num_threads: int | None = None
    appended: bytes = b""
    weights: Mapping[str, Array] | None = None
    cache_dir: Path | None = None
    weight_files: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError("num_threads must be at least 1", got=self.num_threads)


AS_IT_IS: Final = Opening()


class Value(Protocol):
    """An input or output of a graph."""

    name: str
    shape: list[int | str | None]
    type: str


@dataclass
class KnownValue:
    """Name, shape and type of an input or output, as onnxruntime writes them; None is an axis that varies."""

    name: str
    shape: list[int | str | None]
    type: str


class OnnxSession(Protocol):
    """The part of ``onnxruntime.InferenceSession`` that is used here."""

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Array]) -> list[Array]:
        """Compute the named outputs."""
        ...

    def get_providers(self) -> list[str]:
        """Return the active execution providers."""
        ...

    def get_inputs(self) -> Sequence[Value]:
        """Return the graph's inputs."""
        ...

    def get_outputs(self) -> Sequence[Value]:
        """Return the graph's outputs."""
        ...
