"""The target ``openvino``: the portable graph in its own form, as it is or with weights of few bits."""

import contextlib
import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from xadapter_export.bundle.manifest import Optimization
from xadapter_export.errors import ConfigError, ParityError, UnsupportedError
from xadapter_export.exporters.makers.maker import GraphJob, GraphMaker, MadeGraph
from xadapter_export.exporters.passes.quantize import (
    KEPT,
    RECIPES,
    Recipe,
    Rounding,
    round_blocks,
    round_products,
    rowwise_int8,
)
from xadapter_export.exporters.passes.rounding import Curvatures, SmoothRows
from xadapter_export.sessions.openvino_session import import_openvino
from xadapter_export.sessions.session import Array
from xadapter_export.targets import Precision

_log = logging.getLogger(__name__)

_WEIGHTS_ONLY: Final = "int8_weights_only"
# From the fastest to the most exact; the exporter takes the first that passes its gate.
_RECIPES: Final[dict[Precision, tuple[str | Recipe, ...]]] = {
    "fp32": ("openvino-fp32",),
    "int8": ("int8_calibrated", _WEIGHTS_ONLY, *RECIPES["int8"][-2:]),
    "int4": ("int4_weights",),
}
_BANK: Final = "bank"  # its weights stay as they are: what is retrieved must not depend on the precision
_HEADS: Final = ("adapters.", "head.", "candidate_decoder.")  # small, and the answer hangs on each of them
_CLIP: Final = "clip"
_SCALE: Final = ".scale"  # a compressed weight's scales have its name and this
_DIVIDE: Final = ".divide"  # what divides the columns that go into a product has its weight's name and this
_SMALL: Final = 4096  # elements; a weight below this stays fp32
_LOWEST_MASK: Final = -1e30  # what is added to scores at padding lies below this
_GROUP_SIZE: Final = 64  # weights that share a scale in int4


class OpenVinoMaker(GraphMaker):
    """Makes OpenVINO's own form of the portable graph, each recipe in turn."""

    def tries(self, job: GraphJob) -> Iterator[MadeGraph]:
        """Yield a graph for each recipe."""
        material, precision = job.material, job.precision
        if precision == "int8":
            round_products(material.graphs["whole"], material.ranges["whole"], material.rounding)
        feeds = material.calibrate() if precision == "int8" else []
        portable = material.variant
        for recipe in _RECIPES[precision]:
            name = recipe.name if isinstance(recipe, Recipe) else recipe
            job.say(name)
            file = job.empty_scratch() / f"{job.stems['whole']}_{precision}.xml"
            convert_to_ir(
                material.folder / portable.file,
                file,
                precision,
                feeds,
                weights_only=name == _WEIGHTS_ONLY,
                blocks=recipe if isinstance(recipe, Recipe) else None,
                rounding=material.rounding,
            )
            size, before = sum(each.stat().st_size for each in file.parent.iterdir()), portable.size_bytes
            step = Optimization(name=name, lossless=False, unit="bytes", before=before, after=size)
            yield MadeGraph([step] if precision != "fp32" else [], files={"whole": file})


def convert_to_ir(
    model_file: Path,
    output: Path,
    precision: Precision,
    calibration: Sequence[Mapping[str, Array]],
    *,
    weights_only: bool = False,
    blocks: Recipe | None = None,
    rounding: Rounding | None = None,
) -> None:
    """Write a graph as ``.xml`` and ``.bin``.

    Below fp32 the search of the bank stays exact, and every other large matrix and table is of few bits:
    int8 with a scale for each row, or int4 with one for each 64 numbers. In int8 the activations are int8
    too: those of experts, heads and a decoder that shares the word table are rounded at each run, in groups
    of 64. Where a bank is searched these stay float32, as do CLIP's, whose rounding would change what is
    found. In int4 the word table, experts, heads and, where a bank is searched, CLIP are int8. A table is
    read row by row; only those rows become float32.

    Args:
        model_file: The portable graph.
        output: Path of the ``.xml`` file; the ``.bin`` file comes beside it.
        precision: ``fp32``, ``int8`` for weights and activations, or ``int4`` for weights.
        calibration: Inputs to measure the ranges of activations with, arrays by name; for ``int8``.
        weights_only: Whether ``int8`` measures no ranges: activations are rounded at each run instead, in
            groups of 64, which is more exact and slower.
        blocks: A recipe of ``quantize`` for ``int8``, with a scale for each few weights, whose activations
            stay float32: the most exact, and the slowest. Its ``tables`` and ``clip`` may be 32.
        rounding: As ``quantize.quantize``: curvatures for ``blocks``, and otherwise the int8 weights that
            ``quantize.round_products`` found. A weight that is in neither is rounded to the nearest number.

    Raises:
        MissingExtraError: If OpenVINO or, below fp32, NNCF is not installed.
        ConfigError: If ``int8`` is asked for without calibration.
        UnsupportedError: If the precision is another one.
    """
    if precision not in _RECIPES:
        known = " or ".join(_RECIPES)
        raise UnsupportedError("OpenVINO does not support this precision", expected=known, got=precision)
    is_calibrated = precision == "int8" and not weights_only and blocks is None
    if is_calibrated and not calibration:
        raise ConfigError("int8 needs texts for calibration", got="none")
    rounding = rounding or Rounding()
    ov = import_openvino()
    model = ov.Core().read_model(str(model_file))
    _fold_transposes(model)
    _gather_whole_rows(model)
    _select_masks(model)
    _copy_axes(model)
    if blocks is not None:
        _compress_blocks(model, blocks, rounding.curvatures)
    elif precision != "fp32":
        model = _compress(model, precision, calibration if is_calibrated else (), rounding)
    # Whether activations whose ranges were not measured are rounded on the fly, which is faster.
    is_exact = precision == "fp32" or blocks is not None or (is_calibrated and _searches_bank(model))
    group = "0" if is_exact else str(_GROUP_SIZE)
    model.set_rt_info(group, ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    for old in (output, output.with_suffix(".bin")):  # writing over a file that is mapped can crash
        old.unlink(missing_ok=True)
    ov.save_model(model, str(output), compress_to_fp16=False)


def _compress(
    model: Any, precision: Precision, calibration: Sequence[Mapping[str, Array]], rounding: Rounding
) -> Any:
    """Returns the model in int8 or int4; in int8 without calibration only the weights are of few bits."""
    clip = (_CLIP,) if _searches_bank(model) else ()
    _compress_tables(model, skip=() if precision == "int8" or clip else (_CLIP,))
    _compress_matrices(model, ("",) if precision == "int8" and not calibration else (*_HEADS, *clip))
    if precision == "int4":
        return _compress_int4(model)
    if calibration:
        weights = _round_products(model, rounding.rows)
        model = _quantize(model, calibration)
        _restore_weights(model, weights)
    return model


def _fold_transposes(model: Any) -> None:
    """Turns the product with a transposed constant into one that reads it as it is."""
    ops = _ops()
    for node in _nodes(model, "MatMul"):
        transpose = node.input_value(1).get_node()
        if transpose.get_type_name() == "Transpose" and _is_float(transpose.input_value(0).get_node()):
            flags = node.get_attributes()
            factors = node.input_value(0), transpose.input_value(0)
            _replace(node, ops.matmul(*factors, flags["transpose_a"], not flags["transpose_b"]))


def _gather_whole_rows(model: Any) -> None:
    """Takes tokens by one index each, where the graph repeats the index for each number of a token.

    OpenVINO drops a slice before ``GatherElements`` though the slice is of another axis, and then refuses the
    graph (2026.4): the shapes no longer agree.
    """
    ops = _ops()
    for node in _nodes(model, "GatherElements"):
        index = node.input_value(1).get_node()
        if index.get_type_name() == "Broadcast" and node.get_attributes()["axis"] == 1:
            positions = ops.squeeze(index.input_value(0), ops.constant(np.array([2])))  # (B, P, 1)
            axis = ops.constant(np.int64(1))
            _replace(node, ops.gather(node.input_value(0), positions, axis, batch_dims=1))


def _select_masks(model: Any) -> None:
    """Writes ``masked * lowest`` as a choice between ``lowest`` and 0, the same numbers.

    OpenVINO takes an integer mask that is converted, subtracted and multiplied for a dequantization, and
    moves its factor of -3.4e38 to the far side of the sum with the attention scores, which are then lost.
    """
    ops = _ops()
    for node in _nodes(model, "Multiply"):
        lowest = node.input_value(1).get_node()
        if _is_float(lowest) and lowest.data.size == 1 and lowest.data.item() < _LOWEST_MASK:
            is_masked = ops.greater(node.input_value(0), ops.constant(np.float32(0.5)))
            _replace(node, ops.select(is_masked, lowest, ops.constant(np.float32(0))))


def _round_products(model: Any, rows: Mapping[str, SmoothRows]) -> dict[str, tuple[Any, Any]]:
    """Gives products the weights that ``quantize`` rounded, and returns these by the name of the product.

    NNCF would round them anew, and on a processor without int8 dot products sums of such products overflow.
    """
    ops = _ops()
    weights: dict[str, tuple[Any, Any]] = {}
    for node, name in _products(model):
        weight = node.input_value(1).get_node()
        if name not in rows or not _is_float(weight):
            continue
        numbers, scales, value = rows[name].numbers, rows[name].scales, node.input_value(0)
        if (divisors := rows[name].divisors) is not None:
            divide = ops.multiply(value, ops.constant(1 / divisors))
            divide.set_friendly_name(name + _DIVIDE)
            value = divide.output(0)
        for product, part in _unpack(node, value, numbers.astype(np.float32) * scales):
            weights[product.get_friendly_name()] = numbers[part], scales[part]
    return weights


def _unpack(node: Any, value: Any, rows: NDArray[np.float32]) -> Iterator[tuple[Any, slice]]:
    """Puts ``value @ rows.T`` in a product's place, and yields it, or one for each slice of its columns.

    Behind a packed int8 product, of query, key and value, OpenVINO slices float32 and rounds each slice in a
    pass of its own; a product that is apart writes the int8 numbers that attention reads.
    """
    ops = _ops()

    def multiply(part: slice) -> Any:
        weight = ops.constant(np.ascontiguousarray(rows[part]))
        return ops.matmul(value, weight, node.get_attributes()["transpose_a"], True)

    slices = _sliced_columns(node)
    for number, (part, old, bias) in enumerate(slices):
        product = multiply(part)
        product.set_friendly_name(f"{node.get_friendly_name()}.{number}")
        _replace(old, ops.add(product, ops.constant(bias)))
        yield product, part
    if not slices:
        product = multiply(slice(None))
        _replace(node, product)
        yield product, slice(None)


def _sliced_columns(node: Any) -> list[tuple[slice, Any, NDArray[np.float32]]]:
    """Returns, of a product and its bias that are read in slices alone, columns, slice and bias of each."""
    (add, *others) = [port.get_node() for port in node.output(0).get_target_inputs()]
    bias = add.input_value(1).get_node() if add.get_type_name() == "Add" else None
    if others or bias is None or not _is_float(bias):
        return []
    found = []
    for old in (port.get_node() for port in add.output(0).get_target_inputs()):
        bounds = [port.get_node() for port in old.input_values()[1:]]
        if old.get_type_name() != "Slice" or not all(map(_is_constant, bounds)):
            return []
        start, stop, step, axis = (bound.data.item() for bound in bounds)
        if (step, axis) != (1, 2):
            return []
        found.append((slice(start, stop), old, bias.data[..., start:stop].copy()))
    return found


def _restore_weights(model: Any, weights: Mapping[str, tuple[Any, Any]]) -> None:
    """Has products read the int8 numbers and scales of their weights in place of what NNCF made of them."""
    ops = _ops()
    left = dict(weights)
    for node in _nodes(model, "MatMul"):
        if (name := node.get_friendly_name()) in left:
            numbers, scales = left.pop(name)
            back = ops.multiply(ops.convert(ops.constant(numbers), "f32"), ops.constant(scales))
            node.input(1).replace_source_output(back.output(0))
    if left:
        raise ParityError(
            "products were lost while activations were measured",
            got=", ".join(left),
            hint="please report this",
        )


def _copy_axes(model: Any) -> None:
    """Has a reshape of the axes behind batch and tokens, to heads and back, copy these two by position.

    Whatever waits for a shape that is computed at each run costs a short text as much as a small product.
    """
    ops = _ops()
    for node in _nodes(model, "Reshape"):
        before = list(node.get_input_partial_shape(0))[2:]
        after = list(node.get_output_partial_shape(0))[2:]
        if not before or not after or any(axis.is_dynamic for axis in before + after):
            continue
        sizes = [axis.get_length() for axis in after]
        if math.prod(axis.get_length() for axis in before) == math.prod(sizes):
            target = ops.constant(np.array([0, 0, *sizes]))
            _replace(node, ops.reshape(node.input_value(0), target, special_zero=True))


def _compress_tables(model: Any, skip: tuple[str, ...]) -> None:
    """Makes embedding tables int8 by rows, and a decoder that shares one.

    Rows are looked up in int8 and their scales beside them. A plain dequantized table would be the same, but
    OpenVINO makes all of it float32 at load where activations are quantized.
    """
    ops = _ops()
    for table, name, lookups in _tables(model):
        if name.startswith((_BANK, *skip)):
            continue
        rows, scales = rowwise_int8(table.data)
        rows, scales = ops.constant(rows, name=name), ops.constant(scales, name=name + _SCALE)
        for lookup in lookups:
            ids, axis = lookup.input_value(1), ops.constant(np.int64(0))
            found = ops.convert(ops.gather(rows, ids, axis), "f32")
            _replace(lookup, ops.multiply(found, ops.gather(scales, ids, axis)))
        for user in table.output(0).get_target_inputs():  # those that are left: the decoder
            user.replace_source_output(ops.multiply(ops.convert(rows, "f32"), scales).output(0))


def _compress_matrices(model: Any, prefixes: tuple[str, ...]) -> None:
    """Makes the weights of products int8 by output channels; activations stay float32."""
    ops = _ops()
    for node, name in _products(model):
        weight = node.input_value(1).get_node()
        is_wanted = name.startswith(prefixes) and not name.startswith(_BANK)
        if not is_wanted or not _is_float(weight) or weight.data.size < _SMALL:
            continue
        flags = node.get_attributes()
        rows, scales = rowwise_int8(weight.data if flags["transpose_b"] else weight.data.T)
        rows, scales = ops.constant(rows, name=name), ops.constant(scales, name=name + _SCALE)
        back = ops.multiply(ops.convert(rows, "f32"), scales)
        _replace(node, ops.matmul(node.input_value(0), back, flags["transpose_a"], True))


def _compress_blocks(model: Any, recipe: Recipe, curvatures: Curvatures) -> None:
    """Makes tables and the weights of products int8 with a scale for each few numbers of a row."""
    ops = _ops()

    def expand(codes: Any, scales: Any, rank: int, width: int) -> Any:
        """Makes ``(..., G, S) int8`` float32 ``(..., G x S)``."""
        whole = ops.constant(np.array([0] * rank + [width]))
        return ops.reshape(ops.multiply(ops.convert(codes, "f32"), scales), whole, special_zero=True)

    def store(
        name: str, matrix: NDArray[np.float32], block: int, curvature: NDArray[np.float32] | None = None
    ) -> tuple[Any, Any]:
        codes, scales = round_blocks(matrix, 8, block, curvature)
        numbers = (codes.astype(np.int16) - 128).astype(np.int8).reshape(len(matrix), -1, block)
        return ops.constant(numbers, name=name), ops.constant(scales[..., None], name=name + _SCALE)

    for table, name, lookups in _tables(model):
        width = table.data.shape[1]
        block = recipe.block_size(width, 8)
        if name.startswith(KEPT) or recipe.bits(name, is_table=True) != 8 or not block:
            continue
        codes, scales = store(name, table.data, block)
        for lookup in lookups:
            ids, axis = lookup.input_value(1), ops.constant(np.int64(0))
            rank = ids.get_partial_shape().rank.get_length()
            found, steps = ops.gather(codes, ids, axis), ops.gather(scales, ids, axis)
            _replace(lookup, expand(found, steps, rank, width))
        for user in table.output(0).get_target_inputs():
            user.replace_source_output(expand(codes, scales, 1, width).output(0))
    for node, name in _products(model):
        weight, flags = node.input_value(1).get_node(), node.get_attributes()
        if not _is_float(weight) or weight.data.size < _SMALL or name.startswith(KEPT):
            continue
        is_kept_table = any(_is_lookup(user) for user in weight.output(0).get_target_inputs())
        rows = np.ascontiguousarray(weight.data if flags["transpose_b"] else weight.data.T)
        block = recipe.block_size(rows.shape[1], 8)
        if block and not is_kept_table and recipe.bits(name, is_table=False) == 8:
            codes, scales = store(name, rows, block, curvatures.get(name))
            back = expand(codes, scales, 1, rows.shape[1])
            _replace(node, ops.matmul(node.input_value(0), back, flags["transpose_a"], True))


def _quantize(model: Any, calibration: Sequence[Mapping[str, Array]]) -> Any:
    """Makes weights and activations of the remaining products int8."""
    nncf, ranges = import_openvino("nncf"), import_openvino("nncf.quantization.range_estimator")
    names = [port.get_any_name() for port in model.inputs]
    feeds = [{name: np.asarray(feed[name]) for name in names} for feed in calibration]
    _log.info("measuring activations on %d inputs", len(feeds))
    # Answers of the built-in checkpoint's T-expert to 255 sentences that stay the same: 96 % so; 92 % with
    # NNCF's own ranges, which are means over the inputs and cut off what is rare. Its smoothing costs more in
    # both the built-in checkpoint and MiniLM; histograms, and bias correction, change nothing and take long.
    advanced = nncf.AdvancedQuantizationParameters(
        activations_range_estimator_params=ranges.RangeEstimatorParametersSet.MINMAX,
        disable_bias_correction=True,
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1),
    )
    with _quiet():
        return nncf.quantize(
            model,
            nncf.Dataset(feeds),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(feeds),
            ignored_scope=nncf.IgnoredScope(names=_kept(model), validate=False),
            advanced_parameters=advanced,
        )


def _compress_int4(model: Any) -> Any:
    """Makes the weights of the remaining products int4 in groups."""
    nncf = import_openvino("nncf")
    with _quiet():
        return nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=_GROUP_SIZE,
            all_layers=True,
            ignored_scope=nncf.IgnoredScope(names=_kept(model), validate=False),
            advanced_parameters=nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
            ),
        )


def _kept(model: Any) -> list[str]:
    """Names of nodes that NNCF leaves alone: lookups, products that are compressed or read the bank."""
    products = [
        node.get_friendly_name()
        for node, name in _products(model)
        if name.startswith(_BANK) or not _is_float(node.input_value(1).get_node())
    ]
    lookups = [
        node.get_friendly_name()
        for node in _nodes(model, "Gather")
        if not _is_left_table(node.input_value(0).get_node())
    ]
    divisions = [
        node.get_friendly_name()
        for node in _nodes(model, "Multiply")
        if node.get_friendly_name().endswith(_DIVIDE)
    ]
    return products + lookups + divisions


def _searches_bank(model: Any) -> bool:
    return any("retrieved" in port.names for port in model.outputs)


def _tables(model: Any) -> Iterator[tuple[Any, str, list[Any]]]:
    """Yields each large float32 table, its name, and the lookups of its rows."""
    for table in _nodes(model, "Constant"):
        users = table.output(0).get_target_inputs()
        lookups = [user.get_node() for user in users if _is_lookup(user)]
        if lookups and _is_float(table) and table.data.ndim == 2 and table.data.size >= _SMALL:
            yield table, table.get_friendly_name(), lookups


def _products(model: Any) -> Iterator[tuple[Any, str]]:
    """Yields each product with a weight, plain or compressed, and the name of the weight."""
    for node in _nodes(model, "MatMul"):
        weight = node.input_value(1).get_node()
        for step in ("Multiply", "Convert"):
            if weight.get_type_name() == step:
                weight = weight.input_value(0).get_node()
        if weight.get_type_name() == "Constant":
            yield node, weight.get_friendly_name()


def _nodes(model: Any, kind: str) -> list[Any]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() == kind]


def _is_constant(node: Any) -> bool:
    return bool(node.get_type_name() == "Constant")


def _is_float(node: Any) -> bool:
    """Whether a node is a constant of float32."""
    return _is_constant(node) and bool(node.get_element_type().get_type_name() == "f32")


def _is_left_table(node: Any) -> bool:
    """Whether a node is a table that was left to NNCF, and not the scales of one that was not."""
    name = node.get_friendly_name()
    return _is_float(node) and name.startswith(_CLIP) and not name.endswith(_SCALE)


def _is_lookup(user: Any) -> bool:
    """Whether an input of a node is the table that it takes rows from."""
    node = user.get_node()
    if node.get_type_name() != "Gather" or user.get_index() != 0:
        return False
    axis = node.input_value(2).get_node()
    return bool(axis.get_type_name() == "Constant" and axis.data.item() == 0)


def _replace(node: Any, by: Any) -> None:
    """Puts one node in the place of another, under its names."""
    by.set_friendly_name(node.get_friendly_name())
    by.output(0).get_tensor().set_names(node.output(0).get_tensor().get_names())
    node.output(0).replace(by.output(0))


def _ops() -> Any:
    return import_openvino("openvino.opset13")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps NNCF's progress bars and notes off stdout; its warnings go to the root logger."""
    logger = logging.getLogger("nncf")
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.handlers, logger.level, logger.propagate = before
