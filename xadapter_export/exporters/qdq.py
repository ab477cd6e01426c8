"""Q/DQ int8: standard operators with calibrated scales, for engines that plan with them (TensorRT, NPUs).

onnxruntime's static quantiser does it. Weights and activations are symmetric, as TensorRT wants them; weights
have a scale for each column. What ``quantise`` leaves in fp32 stays so here, and so does a tied decoder,
whose table is int8.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from xadapter_export.bundle.onnx_session import Array
from xadapter_export.errors import ParityError
from xadapter_export.exporters.quantise import is_large


class _Feeds(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
    def __init__(self, feeds: Sequence[Mapping[str, Array]]) -> None:
        self._feeds: Iterator[Mapping[str, Array]] = iter(feeds)

    def get_next(self) -> Mapping[str, Array] | None:
        """Returns the next inputs, as onnxruntime's calibrator asks for them."""
        return next(self._feeds, None)


def quantise_qdq(portable: ir.Model, feeds: Sequence[Mapping[str, Array]]) -> ir.Model:
    """Makes an int8 graph of standard operators.

    Args:
        portable: The portable graph; it is not changed.
        feeds: Inputs to calibrate with, by name.

    Returns:
        The graph, its weights in memory.

    Raises:
        ParityError: If nothing was quantised.
    """
    model = portable.clone()
    kept = []
    for number, node in enumerate(model.graph):
        node.name = f"node_{number}"
        matrix = node.inputs[{"MatMul": 1, "Gather": 0}.get(node.op_type, 0)] if node.inputs else None
        if node.op_type in {"MatMul", "Gather"} and not is_large(matrix):
            kept.append(node.name)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises fusions that engines do themselves
    try:
        with TemporaryDirectory() as folder:
            source, output = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
            ir.save(model, source, external_data="fp32.onnx_data")
            quantize_static(
                source,
                output,
                _Feeds(feeds),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Gather"],
                nodes_to_exclude=kept,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "MatMulConstBOnly": True,
                },
            )
            quantised = ir.external_data.load_to_model(ir.load(output))
    finally:
        logging.disable(level)
    if not any(node.op_type == "QuantizeLinear" for node in quantised.graph):
        raise ParityError("the static quantiser quantised nothing", mend="please report this")
    quantised.graph.sort()
    return quantised
