"""The ONNX opsets that a bundle may be written in."""

from xadapter_export.errors import UnsupportedError

MIN_OPSET, MAX_OPSET = 17, 21


def check_opset(opset: int) -> None:
    """Refuses an opset that cannot be written.

    Raises:
        UnsupportedError: If it is outside 17 to 21.
    """
    if not MIN_OPSET <= opset <= MAX_OPSET:
        why = (
            "LayerNormalization is standard only since 17"
            if opset < MIN_OPSET
            else "converter and runtimes have been proven up to 21"
        )
        raise UnsupportedError(f"opset {opset} is not supported: expected {MIN_OPSET} to {MAX_OPSET}, {why}")
