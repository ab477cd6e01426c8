"""A proof that cannot fail proves nothing: every adapter matrix of a bundle, one at a time, 5 % off."""

from pathlib import Path

import numpy as np
import onnx

from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.parity import prove_bundle


def prove_with_each_matrix_off(
    folder: Path, expert_set: ExpertSet = "vt", *, only: str = ""
) -> dict[str, bool]:
    """Scales each matrix of the experts by 1.05 in the bundle's weights, proves, and puts it back.

    Args:
        folder: The bundle.
        expert_set: The expert set whose graph is proven.
        only: What the name of a matrix must have in it.

    Returns:
        Whether the proof passed, by the name of the matrix that was off.
    """
    variant = read_bundle(folder).manifest.variant(expert_set)
    graph = onnx.load(folder / variant.file, load_external_data=False).graph
    outcomes: dict[str, bool] = {}
    with (folder / variant.weight_files[0]).open("r+b") as weights:
        for tensor in graph.initializer:
            if not tensor.name.startswith("adapters.") or len(tensor.dims) != 2 or only not in tensor.name:
                continue
            entry = {item.key: item.value for item in tensor.external_data}
            offset, length = int(entry["offset"]), int(entry["length"])
            weights.seek(offset)
            original = weights.read(length)
            for data in ((np.frombuffer(original, np.float32) * np.float32(1.05)).tobytes(), original):
                weights.seek(offset)
                weights.write(data)
                weights.flush()
                if data is not original:
                    outcomes[tensor.name] = prove_bundle(folder, [expert_set], verify=False).passed
    return outcomes
