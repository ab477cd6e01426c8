"""Check arrays against a bundle's IO contract: before they go into the graph, and what comes out."""

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np

from xadapter_export.bundle.manifest import ExpertSetSpec, Manifest, TensorSpec
from xadapter_export.errors import BundleError, ShapeError
from xadapter_export.experts import KINDS, keep_name
from xadapter_export.sessions.session import Array

_KEEPS: Final = tuple(map(keep_name, KINDS))


def keep_everything(arrays: Mapping[str, Array], inputs: Iterable[TensorSpec]) -> dict[str, Array]:
    """Return inputs of a graph and ones for those that say which memory items are kept.

    Args:
        arrays: Inputs by name.
        inputs: What the graph takes.
    """
    complete, sizes = dict(arrays), dict[str | int, int]()
    for tensor in inputs:
        if tensor.name in arrays:
            sizes |= dict(zip(tensor.axes, arrays[tensor.name].shape, strict=False))
        elif tensor.name in _KEEPS:
            shape = [axis if isinstance(axis, int) else sizes.get(axis, 1) for axis in tensor.axes]
            complete[tensor.name] = np.ones(shape, np.int64)
    return complete


def check_feed(inputs: Mapping[str, Array], spec: ExpertSetSpec, manifest: Manifest) -> dict[str, Array]:
    """Return what the graph takes of the inputs, each checked against the contract.

    Inputs that say which memory items are kept may be missing: then all items are kept.

    Raises:
        ShapeError: If an input is missing, or has another dtype or shape than the contract says.
    """
    inputs = keep_everything(inputs, spec.inputs)
    limits = manifest.longest
    sizes: dict[str, int] = {}
    feed: dict[str, Array] = {}
    for tensor in spec.inputs:
        if tensor.name not in inputs:
            raise ShapeError("an input is missing", where=tensor.name, got=", ".join(inputs) or "no input")
        array = inputs[tensor.name]
        fits = array.dtype == tensor.dtype and array.ndim == len(tensor.axes)
        for axis, size in zip(tensor.axes, array.shape, strict=False):
            wanted = axis if isinstance(axis, int) else sizes.setdefault(axis, size)
            fits = fits and size == wanted and 0 < size <= limits.get(str(axis), size)
        if not fits:
            axes = ", ".join(f"{a} <= {limits[a]}" if a in limits else str(a) for a in map(str, tensor.axes))
            raise ShapeError(
                "an input has the wrong shape or dtype",
                where=tensor.name,
                expected=f"({axes}) {tensor.dtype}" + (f" with {sizes}" if sizes else ""),
                got=f"{array.shape} {array.dtype}",
            )
        feed[tensor.name] = array
    return feed


def check_outputs(
    outputs: Mapping[str, Array],
    feed: Mapping[str, Array],
    spec: ExpertSetSpec,
    manifest: Manifest,
    name: str,
) -> None:
    """Refuse outputs that are no answer to what was asked.

    Args:
        outputs: What the graph gave, by name.
        feed: What it was given.
        spec: The contract of its set.
        manifest: The bundle's.
        name: Of the variant.

    Raises:
        BundleError: If an output has another dtype or shape than the contract says, holds NaN or infinity, or
            names a picture that the bank does not have.
    """
    sizes: dict[str | int, int] = {}
    for tensor in spec.inputs:
        sizes |= dict(zip(tensor.axes, feed[tensor.name].shape, strict=True))
    for tensor in spec.outputs:
        if tensor.name not in outputs:
            continue
        value = outputs[tensor.name]
        wanted = tuple(axis if isinstance(axis, int) else sizes.get(axis, axis) for axis in tensor.axes)
        fits = value.dtype == tensor.dtype and value.ndim == len(wanted) and _fits(value.shape, wanted)
        expected = got = None
        if not fits:
            problem = "a graph's output has the wrong shape or dtype"
            expected, got = f"({', '.join(map(str, wanted))}) {tensor.dtype}", f"{value.shape} {value.dtype}"
        # A sum is finite where every number is: float32 sums of logits are far from its limits.
        elif value.dtype.kind == "f" and not np.isfinite(value.sum()):
            problem = "the graph's outputs contain NaN or infinity"
        elif (
            tensor.name == "retrieved" and manifest.bank and not _are_rows(value, manifest.bank.num_pictures)
        ):
            problem = "the graph retrieves a picture that the bank does not have"
        else:
            continue
        raise BundleError(
            problem,
            where=f"{tensor.name} of {name}",
            expected=expected,
            got=got,
            hint="copy or export the bundle again; xad-parity shows which graphs are right",
        )


def _are_rows(value: Array, num_pictures: int) -> bool:
    return not value.size or (value.min() >= 0 and value.max() < num_pictures)


def _fits(shape: tuple[int, ...], wanted: tuple[int | str, ...]) -> bool:
    return all(isinstance(axis, str) or axis == size for axis, size in zip(wanted, shape, strict=True))
