"""Rounding that makes up for itself: what one weight of a row loses, those still to be rounded take over.

The nearest number is best for each weight alone. Which change of a row alters its products least depends on
what is multiplied with it: the numbers of a text's states move together, so that one column can answer for
another. Columns are rounded one by one, and the error of each is spread over the columns to come as the
curvature of the product's squared error says.

Dimensions: N outputs and K inputs of a product, S weights that share a scale.

Source:
    Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1, without reordering.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from xadapter_export.bundle.onnx_session import Array, create_session

Curvatures = dict[str, NDArray[np.float32]]  # (K, K) by the name of a product's weight

_DAMPING = 0.01  # of the mean curvature, added to all: of texts that are few, some directions are unknown
_LEAST = 1e-12  # where all inputs are 0
_BLOCK = 128  # columns whose errors are spread together, over those behind the block


def measure_curvatures(
    model: ir.Model, inputs: Mapping[str, ir.Value], feeds: Sequence[Mapping[str, Array]]
) -> Curvatures:
    """Return the curvature of products by the names in ``inputs``.

    Args:
        model: A graph in fp32; it gets the inputs as outputs.
        inputs: What goes into each product, ``(..., K) float32``, as values of the graph.
        feeds: Inputs of the graph, by name.

    Returns:
        Sums of the outer products of all rows. Products of one input share an array.
    """
    values = list(dict.fromkeys(inputs.values()))
    model.graph.outputs.extend(value for value in values if not value.is_graph_output())
    sums: dict[str, Tensor] = {}
    with TemporaryDirectory() as folder:
        ir.save(model, Path(folder) / "model.onnx", external_data="model.onnx_data")
        session = create_session(Path(folder) / "model.onnx")
        names = [str(value.name) for value in values]
        needed = [value.name for value in session.get_inputs()]
        for feed in feeds:
            for name, array in zip(names, session.run(names, {n: feed[n] for n in needed}), strict=True):
                rows = torch.from_numpy(array).flatten(0, -2)
                if name not in sums:
                    sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
                sums[name].addmm_(rows.T, rows)
    return {name: sums[str(value.name)].numpy() for name, value in inputs.items()}


def round_weights(
    weights: NDArray[np.float32], scales: NDArray[np.float32], curvature: NDArray[np.float32], zero: int
) -> NDArray[np.float32]:
    """Return whole numbers ``(N, K)`` from ``-zero`` to ``zero - 1``; ``numbers * scales`` stand for weights.

    Args:
        weights: ``(N, K)``.
        scales: ``(N, K / S)``.
        curvature: ``(K, K)``, of the rows that are multiplied with the weights.
        zero: 8 for 4 bits, 128 for 8.
    """
    size = weights.shape[1] // scales.shape[1]
    damping = _DAMPING * max(float(curvature.diagonal().mean()), _LEAST)
    damped = curvature.astype(np.float64) + damping * np.eye(len(curvature))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(torch.from_numpy(damped)))
    spread = torch.linalg.cholesky(inverse, upper=True).numpy().astype(np.float32)
    left = weights.copy()
    numbers = np.empty_like(weights)
    for start in range(0, weights.shape[1], _BLOCK):
        end = min(start + _BLOCK, weights.shape[1])
        errors = np.empty((len(weights), end - start), np.float32)
        for k in range(start, end):
            scale = scales[:, k // size]
            numbers[:, k] = np.clip(np.rint(left[:, k] / scale), -zero, zero - 1)
            errors[:, k - start] = (left[:, k] - numbers[:, k] * scale) / spread[k, k]
            left[:, k:end] -= np.outer(errors[:, k - start], spread[k, k:end])
        left[:, end:] -= errors @ spread[start:end, end:]
    return numbers
