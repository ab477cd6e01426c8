"""``python -m export.engines``: build TensorRT-RTX engines of a BERT-base-sized bundle, and print a table.

No GPU is needed. The case has the shapes of BERT-base and of ViT-B/16's text tower, random weights, and a
bank of 20,000 pictures. Every engine is deleted when it has been measured: together they take 10 GB.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import click
from rich.console import Console
from rich.table import Table

from material.models import CASES, random_bank
from xadapter_export import export
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.cli.command import XadCommand
from xadapter_export.exporters.makers.axis_profile import parse_profile, plan_axes, profile_shapes
from xadapter_export.exporters.makers.engines import EngineJob, build_engine, split_capabilities
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.sessions.tensorrt_session import import_library

_NUM_PICTURES = 20_000
_GPUS = ("sm75", "sm80", "sm86+sm89", "sm120")


@click.command(cls=XadCommand)
@click.argument("bundle", type=click.Path(path_type=Path), default=Path("build/bundles/engines"))
@click.option(
    "--case", default="bert-base", show_default=True, help="What is exported where BUNDLE is not there."
)
@click.option("--compute-capability", "capabilities", multiple=True, default=_GPUS, show_default=True)
@click.option("--profile", multiple=True, default=("batch=1..8 seq=8..128",), show_default=True)
def main(bundle: Path, case: str, capabilities: tuple[str, ...], profile: tuple[str, ...]) -> None:
    """Build an engine of every graph of BUNDLE for every GPU."""
    library = import_library("tensorrt-rtx")
    if not bundle.exists():
        _export(case, bundle)
    opened = read_bundle(bundle)
    manifest = opened.manifest
    axes = plan_axes(manifest, parse_profile(profile))
    table = Table(show_edge=False, caption=f"TensorRT-RTX {library.__version__}, {' '.join(profile)}")
    for column in ("experts", "graph", "for", "layers", "seconds", "engine (MB)", "peak memory (MB)"):
        table.add_column(column)
    refusals = []
    for variant in manifest.variants:
        for group in split_capabilities(capabilities, library):
            name = "+".join(group)
            with TemporaryDirectory(dir=bundle.parent) as folder:
                shapes = profile_shapes(manifest.expert_sets[variant.expert_set].inputs, axes)
                engine = Path(folder) / "one.engine"
                graph = opened.file(variant.file)
                built = build_engine(EngineJob(library.__name__, graph, engine, shapes, group), _ignore)
            size, peak = (f"{(n or 0) / 1e6:,.0f}" for n in (built.size_bytes, built.peak_bytes))
            cells = (f"{sum(built.layers.values())}", f"{built.seconds:.1f}")
            measured = (*cells, "refused", "") if built.refused else (*cells, size, peak)
            table.add_row(variant.expert_set, variant.name, name, *measured)
            click.echo(" ".join((variant.expert_set, variant.name, name, *measured)), err=True)
            if built.refused:
                refusals.append(f"{variant.expert_set}, {variant.name}, {name}: {built.refused}")
    Console(width=160, highlight=False).print(table)
    for line in refusals:
        click.echo(f"refused: {line}")


def _export(case: str, bundle: Path) -> None:
    """Make the bundle; its weights are random, so that int8's agreement says nothing and is no gate."""
    model = CASES[case]()
    bank = random_bank(model.bank_features.shape[1], _NUM_PICTURES)
    larger = XAdapterModel(model.config, model.plm, model.clip, bank)
    larger.adapters.load_state_dict(model.adapters.state_dict())
    export(
        larger.eval(),
        bundle,
        ("t", "v"),
        precisions=("fp32", "fp16", "int8"),
        targets=("onnx",),
        min_agreement=0.0,
        on_stage=lambda stage, detail: click.echo(f"  {stage:5}  {detail}", err=True),
    )


def _ignore(_detail: str) -> None:
    """Phases of the builder are not shown: the table has a line for each engine."""


if __name__ == "__main__":
    main()
