"""``python -m benchmarks.latency``: a bundle in onnxruntime against the same checkpoint in PyTorch eager.

Both run in one process with the same number of threads and the same inputs, in turn, so that a machine whose
speed drifts drifts for both. The figure to read is the ratio; a single time means little.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from rich.table import Table

from xadapter_export import XAdapterModel, XAdapterSession, export
from xadapter_export.bundle.manifest import EXPERT_SETS
from xadapter_export.cli.command import make_console, print_json

_SENTENCE = "The color of a strawberry is {mask}."


def _time_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


@click.command()
@click.argument("checkpoint", default="builtin")
@click.option("--threads", default=2, show_default=True)
@click.option("--repeats", default=60, show_default=True, help="Pairs of runs for each row.")
@click.option("--json", "as_json", is_flag=True)
def main(checkpoint: str, threads: int, repeats: int, as_json: bool) -> None:
    """Time every expert set of CHECKPOINT with one text and with eight."""
    torch.set_num_threads(threads)
    model = XAdapterModel.from_pretrained(checkpoint).eval()
    rows: list[dict[str, str | int | float]] = []
    with tempfile.TemporaryDirectory() as folder:
        held = set(model.config.experts)
        sets = [experts for experts in EXPERT_SETS if experts == "none" or held.issuperset(experts)]
        result = export(model, Path(folder) / "bundle", sets)
        session = XAdapterSession.load(result.folder, num_threads=threads)
        for experts in sets:
            names = [tensor.name for tensor in result.manifest.expert_sets[experts].inputs]
            for num_texts in (1, 8):
                inputs = model.encode([_SENTENCE.format(mask=model.text_encoder.mask_token)] * num_texts)
                feed = {name: inputs[name].numpy() for name in names}

                def run_torch() -> object:
                    with torch.inference_mode():
                        return model(**inputs, experts=experts)  # noqa: B023  # called before the next round

                def run_onnx() -> object:
                    return session.run(feed, experts=experts)  # noqa: B023  # called before the next round

                for run in (run_torch, run_onnx):
                    _time_ms(run)
                pairs = [(_time_ms(run_torch), _time_ms(run_onnx)) for _ in range(repeats)]
                ratios = sorted(a / b for a, b in pairs)
                row: dict[str, str | int | float] = {
                    "experts": experts,
                    "texts": num_texts,
                    "PyTorch eager (ms)": statistics.median(a for a, _ in pairs),
                    "onnxruntime (ms)": statistics.median(b for _, b in pairs),
                    "ratio": statistics.median(ratios),
                    "ratio, 5 %": ratios[repeats // 20],
                    "ratio, 95 %": ratios[-1 - repeats // 20],
                }
                rows.append(row)
    if as_json:
        print_json(rows)
        return
    title = f"{checkpoint}, {threads} threads, {repeats} interleaved pairs, medians"
    table = Table(title=title, show_edge=False)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    make_console().print(table)


if __name__ == "__main__":
    main()
