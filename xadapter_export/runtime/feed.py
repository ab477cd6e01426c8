"""Check arrays against a bundle's IO contract before they go into the graph."""

from collections.abc import Mapping

from xadapter_export.bundle.manifest import ExpertSetSpec, Manifest
from xadapter_export.errors import ShapeError
from xadapter_export.sessions.session import Array


def check_feed(inputs: Mapping[str, Array], spec: ExpertSetSpec, manifest: Manifest) -> dict[str, Array]:
    """Return what the graph takes of the inputs, each checked against the contract.

    Raises:
        ShapeError: If an input is missing, or has another dtype or shape than the contract says.
    """
    limits = {"seq": manifest.plm.max_seq}
    if manifest.clip is not None:
        limits["clip_seq"] = manifest.clip.context_length
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
