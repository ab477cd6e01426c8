"""Rounding of weights to few bits, so that products lose little and no processor adds them up wrong.

The nearest number is best for each weight alone. Which change of a row alters its products least depends on
what is multiplied with it: the numbers of a text's states move together, so that one column can answer for
another. Columns are rounded one by one, and the error of each is spread over the columns to come as the
curvature of the product's squared error says.

Processors without int8 dot products add the products of two neighboring columns in 16 bits: one of x86 with
AVX2 multiplies ``uint8`` activations by ``int8`` weights and saturates at 32767. 255 times 128 is 32640, so a
pair of weights of one sign whose sum is at most 128 cannot get there, whatever the activations are. Rows are
rounded under that condition (``round_rows``): they cost no bit, only a scale that is about a quarter coarser.

Dimensions: N outputs and K inputs of a product, S weights that share a scale.

Source:
    Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1, without reordering. The limit on pairs is ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from xadapter_export.sessions.onnx_session import open_onnx
from xadapter_export.sessions.session import Array

Float32Array = NDArray[np.float32]

MOST_OF_PAIR = 128  # what two neighboring int8 weights of one sign may add up to
_DAMPING = 0.01  # of the mean curvature, added to all: of texts that are few, some directions are unknown
_LEAST = 1e-12  # where all inputs are 0
_BLOCK = 128  # columns whose errors are spread together, over those behind the block
# Largest number of a row, of which the best is taken: a finer scale leaves more pairs to be cut.
_TOPS = (127.0, 118.0, 110.0, 102.0, 94.0, 88.0, 82.0, 76.0, 70.0, 64.0)
_USUAL_TOP = 100.0
_SMALLEST_ROW = 1e-35  # below it a row counts as zeros: its scale would be no normal number
_STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # SmoothQuant's alpha
_WORTH_IT = 0.8  # of the error without divisors: a division is a pass over all that goes in
_FLOOR = 1e-3  # of the largest column, so that one that is nearly always 0 does not blow up


Curvatures = dict[
    str, Float32Array
]  # (K, K) by the name of a product's weight: sums of outer products of rows


@dataclass(frozen=True, eq=False)
class Range:
    """What goes into a product, of all rows of all texts.

    Attributes:
        low: ``(K,) float32``. Smallest number of each column.
        high: ``(K,) float32``. Largest number of each column.
        num_rows: How many rows there were.
    """

    low: Float32Array
    high: Float32Array
    num_rows: int

    @property
    def largest(self) -> Float32Array:
        """Largest absolute number of each column."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


def measure_inputs(
    model: ir.Model,
    inputs: Mapping[str, ir.Value],
    feeds: Sequence[Mapping[str, Array]],
    curvatures: Curvatures,
) -> dict[str, Range]:
    """Return the ranges of what goes into products, by the names in ``inputs``.

    Args:
        model: A graph in fp32; it gets the inputs as outputs.
        inputs: What goes into each product, ``(..., K) float32``, as values of the graph.
        feeds: Inputs of the graph, by name.
        curvatures: Gets those of the products that it lacks. Products of one input share an array.
    """
    if not inputs:  # a small tower has no product that is quantized
        return {}
    values = list(dict.fromkeys(inputs.values()))
    model.graph.outputs.extend(value for value in values if not value.is_graph_output())
    names = [str(value.name) for value in values]
    missing = {str(value.name) for name, value in inputs.items() if name not in curvatures}
    sums: dict[str, Tensor] = {}
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    num_rows = dict.fromkeys(names, 0)
    with TemporaryDirectory() as folder:
        ir.save(model, Path(folder) / "model.onnx", external_data="model.onnx_data")
        session = open_onnx(Path(folder) / "model.onnx")
        needed = [value.name for value in session.get_inputs()]
        for feed in feeds:
            for name, array in zip(names, session.run(names, {n: feed[n] for n in needed}), strict=True):
                rows = torch.from_numpy(array).flatten(0, -2)
                low, high = torch.aminmax(rows, dim=0)
                if name in ranges:
                    low, high = torch.minimum(ranges[name][0], low), torch.maximum(ranges[name][1], high)
                ranges[name] = low, high
                num_rows[name] += len(rows)
                if name in missing:
                    zeros = rows.new_zeros(rows.shape[1], rows.shape[1])
                    sums.setdefault(name, zeros).addmm_(rows.T, rows)
    for name, value in inputs.items():
        if name not in curvatures:
            curvatures[name] = sums[str(value.name)].numpy()
    found = {n: Range(low.numpy(), high.numpy(), num_rows[n]) for n, (low, high) in ranges.items()}
    return {name: found[str(value.name)] for name, value in inputs.items()}


def round_weights(
    weights: Float32Array,
    scales: Float32Array,
    curvature: Float32Array,
    zero: int,
    *,
    limit_pairs: bool = False,
) -> Float32Array:
    """Return whole numbers ``(N, K)`` from ``-zero`` to ``zero - 1``; ``numbers * scales`` stand for weights.

    Args:
        weights: ``(N, K)``.
        scales: ``(N, K / S)``.
        curvature: ``(K, K)``, of the rows that are multiplied with the weights.
        zero: 8 for 4 bits, 128 for 8.
        limit_pairs: Whether columns 2 i and 2 i + 1 of one sign add up to ``MOST_OF_PAIR`` at most.
    """
    size = weights.shape[1] // scales.shape[1]
    spread = _spread(curvature)
    columns = weights.T.copy()  # (K, N): a column is contiguous
    wanted_columns = torch.from_numpy(columns.copy())  # moved by the errors of the columns before
    numbers = np.empty_like(columns)
    for start in range(0, len(columns), _BLOCK):
        end = min(start + _BLOCK, len(columns))
        block = wanted_columns[start:end].numpy()
        errors = np.empty_like(block)
        for k in range(start, end):
            scale = scales[:, k // size]
            wanted = block[k - start] / scale
            low, high = np.full_like(wanted, limit_pairs - zero), np.full_like(wanted, zero - 1)
            if limit_pairs and k % 2 == 0 and k + 1 < len(columns):
                wanted = wanted - _excess(wanted, block[k + 1 - start] / scale)
            elif limit_pairs and k % 2:
                before = numbers[k - 1]
                low = np.where(before < 0, np.maximum(low, -MOST_OF_PAIR - before), low)
                high = np.where(before > 0, np.minimum(high, MOST_OF_PAIR - before), high)
            numbers[k] = np.clip(np.rint(wanted), low, high)
            errors[k - start] = columns[k] - numbers[k] * scale
            block[k + 1 - start :] += np.outer(spread[k, k + 1 : end], errors[k - start])
        later = torch.from_numpy(np.ascontiguousarray(spread[start:end, end:].T))
        wanted_columns[end:].addmm_(later, torch.from_numpy(errors))
    return np.ascontiguousarray(numbers.T)


def _spread(curvature: Float32Array) -> Float32Array:
    """How the error of each column is spread over those to come, ``(K, K)``, used above the diagonal.

    With H = U U^T and U upper triangular, the error of a product is that of each column of ``errors @ U``,
    and column k of it is least where the weights before k, which are fixed, are made up for by weight k. That
    is what GPTQ gets from the inverse of H, for a quarter of the operations.

    Source:
        Frantar et al., GPTQ, arXiv 2210.17323; that the two are the same: Chen et al., arXiv 2507.18553.
    """
    damping = _DAMPING * max(float(curvature.diagonal().mean()), _LEAST)
    damped = curvature.astype(np.float64) + damping * np.eye(len(curvature))
    flipped = torch.from_numpy(np.ascontiguousarray(damped[::-1, ::-1]))
    factor = torch.linalg.cholesky(flipped).numpy()[::-1, ::-1]
    spread: Float32Array = (factor / factor.diagonal()).astype(np.float32)
    return spread


def round_rows(
    weights: Float32Array, curvature: Float32Array | None = None
) -> tuple[NDArray[np.int8], Float32Array]:
    """Return int8 rows whose products with ``uint8`` fit 16 bits in pairs, and the scale of each row.

    Args:
        weights: ``(N, K)``.
        curvature: ``(K, K)``, of the rows that are multiplied with the weights; None for the nearest numbers.

    Returns:
        ``(N, K)`` numbers from -127 to 127, and ``(N, 1)`` scales. Of columns 2 i and 2 i + 1 those of one
        sign add up to ``MOST_OF_PAIR`` at most.
    """
    importance = np.ones(weights.shape[1], np.float32) if curvature is None else curvature.diagonal()
    scales = _find_scales(weights, importance)
    if curvature is None:
        numbers = _nearest_rows(weights / scales)
    else:
        numbers = round_weights(weights, scales, curvature, 128, limit_pairs=True)
    return numbers.astype(np.int8), scales


def _find_scales(weights: Float32Array, importance: Float32Array) -> Float32Array:
    """The ``(N, 1)`` scales that lose least: a coarser one rounds more, a finer one cuts more pairs."""
    largest = np.abs(weights).max(axis=1, keepdims=True)
    largest = np.where(
        largest >= _SMALLEST_ROW, largest, np.float32(_TOPS[0])
    )  # rows of zeros, with a scale of 1
    width = weights.shape[1] // 2 * 2
    first, second = (weights[:, start:width:2] / largest for start in (0, 1))
    totals = np.where(first * second > 0, np.abs(first + second), np.float32(0))
    of_pairs = (importance[0:width:2] + importance[1:width:2]) / 4  # each of a pair loses half of the excess
    best, tops = np.full_like(largest, np.inf), np.full_like(largest, _TOPS[0])
    for top in _TOPS:
        over = np.square(np.maximum(totals - np.float32(MOST_OF_PAIR / top), 0))
        lost = (over @ of_pairs)[:, None] + importance.sum() / np.float32(12 * top**2)
        tops = np.where(lost < best, np.float32(top), tops)
        best = np.minimum(lost, best)
    return (largest / tops).astype(np.float32)


def _nearest_rows(wanted: Float32Array) -> Float32Array:
    """The nearest whole numbers whose pairs are within the limit; ``wanted`` is ``(N, K)``, up to 127."""
    numbers = np.rint(wanted)
    width = wanted.shape[1] // 2 * 2  # the last column of an odd number has no neighbor
    first, second = wanted[:, 0:width:2], wanted[:, 1:width:2]
    excess = _excess(first, second)
    if excess.any():
        numbers[:, 0:width:2] = np.rint(first - excess)
        room = MOST_OF_PAIR - np.abs(numbers[:, 0:width:2])
        same_sign = numbers[:, 0:width:2] * second > 0
        rounded = np.rint(second - excess)
        numbers[:, 1:width:2] = np.where(same_sign, np.clip(rounded, -room, room), rounded)
    return np.clip(numbers, -127, 127)


def _excess(first: Float32Array, second: Float32Array) -> Float32Array:
    """What both of a pair must lose to be within the limit; 0 where they are, or have other signs."""
    total = first + second
    over = np.maximum(np.abs(total) - MOST_OF_PAIR, 0) * np.sign(total) / 2
    return np.where(first * second > 0, over, np.float32(0))


@dataclass(frozen=True, eq=False)
class SmoothRows:
    """An int8 matrix whose columns were scaled first, so that activations and weights are both easy to round.

    Attributes:
        numbers: ``(N, K) int8``, as ``round_rows`` gives them.
        scales: ``(N, 1) float32``.
        divisors: ``(K,) float32``, by which what goes in is divided; None where it goes in as it is.
    """

    numbers: NDArray[np.int8]
    scales: Float32Array
    divisors: Float32Array | None


def smooth_rows(weights: Float32Array, ranges: Range, curvature: Float32Array) -> SmoothRows:
    """Return int8 weights of a product with ``uint8`` inputs that have one scale and one zero point for all.

    A few columns of a PLM's states are tens of times as large as the others, and one scale for all columns
    leaves the others few steps. Dividing a column by d and multiplying its weights by d moves the difficulty
    from the one to the other. The divisors are large^a / weight^(1 - a) of each column, of all a tried those
    with the least error of the product, and none if they save little.

    Args:
        weights: ``(N, K)``.
        ranges: Of what goes in.
        curvature: ``(K, K)``, likewise.

    Source:
        Xiao et al., SmoothQuant, arXiv 2211.10438, equation 4. Choosing a by the error is ours.
    """
    largest, heaviest = ranges.largest, np.abs(weights).max(axis=0)
    largest, heaviest = (np.maximum(v, max(float(v.max()), _LEAST) * _FLOOR) for v in (largest, heaviest))
    plain = np.ones_like(largest)
    divisors, lost = plain, _lost(weights, ranges, curvature, plain) * _WORTH_IT
    for strength in _STRENGTHS:
        tried = (largest**strength / heaviest ** (1 - strength)).astype(np.float32)
        tried /= np.exp(np.log(tried).mean())
        if (error := _lost(weights, ranges, curvature, tried)) < lost:
            divisors, lost = tried, error
    if divisors is plain:
        return SmoothRows(*round_rows(weights, curvature), None)
    factors = np.float32(1) / divisors
    smooth = curvature * factors * factors[:, None]
    return SmoothRows(*round_rows(weights * divisors, smooth), divisors)


def _lost(weights: Float32Array, ranges: Range, curvature: Float32Array, divisors: Float32Array) -> float:
    """Expected squared error of a product, up to a factor, with independent errors of rounding."""
    low, high = (ranges.low / divisors).min(), (ranges.high / divisors).max()
    scaled = weights * divisors
    steps = np.abs(scaled).max(axis=1) / _USUAL_TOP
    of_weights = float(np.square(steps).sum()) * float((curvature.diagonal() / divisors**2).sum())
    of_inputs = float(np.square((max(high, 0) - min(low, 0)) / 255)) * float(np.square(scaled).sum())
    return of_weights + of_inputs * ranges.num_rows
