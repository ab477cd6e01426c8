"""Which texts go through the graph together: those of about the same length."""

from collections.abc import Sequence

RUN_COST = 32
"""What a run costs beside its tokens, in tokens: BERT-base at 1x12 and 1x32 on 2 threads took as long as if
every run had read 28 tokens more in fp32 (onnxruntime), and 48 in int8 (OpenVINO)."""


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return batches of texts, each as the texts' numbers, shortest texts first.

    A batch is closed when it is full, and when the padding that the next text would bring costs more than a
    run of its own.

    Args:
        lengths: Tokens of each text.
        batch_size: Most texts in a batch.
    """
    batches: list[list[int]] = []
    padding = 0
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        if batches:
            last = batches[-1]
            padding += len(last) * (lengths[number] - lengths[last[-1]])
        if not batches or len(last) == batch_size or padding > RUN_COST:
            batches.append([])
            padding = 0
        batches[-1].append(number)
    return batches
