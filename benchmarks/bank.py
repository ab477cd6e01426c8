"""``python -m benchmarks.bank``: building a bank from files against the bare image tower.

Both see the same pictures in the same batches with the same number of threads. The build lists JPEG files,
decodes and prepares them, encodes them, and writes its shards; loading the CLIP is left out, as it is paid
once however many pictures there are. The bare tower gets batches that were prepared before the clock runs.
They take turns, and the figure to read is the ratio. That of CPU time says what the build costs on top, and
holds on a machine that is busy with other work.

Dimensions: B batch, D CLIP embedding size.
"""

import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.machine import cpu
from xadapter_export.bank_builder.build import BuildSettings, encode_shards
from xadapter_export.bank_builder.decode import decode_picture
from xadapter_export.bank_builder.image_tower import ImageTower, choose_device, load_image_tower
from xadapter_export.bank_builder.processes import Processes
from xadapter_export.bank_builder.sources import DatasetColumns, Source, open_source
from xadapter_export.bank_builder.work_folder import WorkFolder
from xadapter_export.cli.command import make_console, print_json
from xadapter_export.model.clip_text import CONFIG_NAME, WEIGHTS_NAME
from xadapter_export.torchvision_cure import cure_torchvision

_MODEL = "ViT-B-32"
_SIDE = 256  # of the pictures, in pixels
_QUICK = {"clip": "builtin", "pictures": 48, "rounds": 2, "batch_size": 16}


@dataclass(frozen=True)
class _Pass:
    """All pictures once.

    Attributes:
        elapsed_s: Time on the clock.
        cpu_s: CPU time of this process and those it started.
        features: ``(pictures, D) float32`` of length 1.
    """

    elapsed_s: float
    cpu_s: float
    features: Tensor


def _measure(encode: Callable[[], Tensor]) -> _Pass:
    cpu, start = sum(os.times()[:4]), time.perf_counter()
    features = encode()
    elapsed = time.perf_counter() - start
    return _Pass(elapsed, sum(os.times()[:4]) - cpu, features)


def _measure_in_turn(
    build: Callable[[], Tensor], encode_bare: Callable[[], Tensor], rounds: int
) -> tuple[list[_Pass], list[_Pass]]:
    _measure(encode_bare)
    builds: list[_Pass] = []
    bares: list[_Pass] = []
    for number in range(rounds):
        for run, passes in ((build, builds), (encode_bare, bares))[:: 1 if number % 2 else -1]:
            passes.append(_measure(run))
    return builds, bares


def _write_pictures(folder: Path, count: int) -> None:
    """Write JPEG files with large soft shapes and fine grain, as photographs have."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        shapes = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        soft = np.asarray(shapes.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = rng.normal(scale=6.0, size=(_SIDE, _SIDE, 1))
        pixels = np.clip(soft + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06}.jpg", quality=90)


def _write_clip(folder: Path) -> str:
    """Write a ViT-B-32 with random weights in open_clip's hub layout."""
    cure_torchvision()
    import open_clip

    folder.mkdir()
    torch.manual_seed(0)
    model = open_clip.create_model(_MODEL, pretrained=None)
    settings = {
        "model_cfg": open_clip.get_model_config(_MODEL),
        "preprocess_cfg": {
            key: model.visual.preprocess_cfg[key] for key in ("mean", "std", "interpolation", "resize_mode")
        },
    }
    (folder / CONFIG_NAME).write_text(json.dumps(settings), encoding="utf-8")
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS_NAME
    )
    return str(folder)


def _prepare_batches(source: Source, tower: ImageTower, batch_size: int) -> list[Tensor]:
    """Return batches ``(B, 3, size, size) float32`` as the build makes them."""
    pixels = [tower.preprocess(decode_picture(source.read(row), _SIDE)) for row in source.rows()]
    return [torch.stack(pixels[start : start + batch_size]) for start in range(0, len(pixels), batch_size)]


def _summarize(builds: list[_Pass], bares: list[_Pass], pictures: int) -> dict[str, dict[str, float]]:
    pairs = list(zip(builds, bares, strict=True))
    return {
        "build": _medians(builds, pictures),
        "bare tower": _medians(bares, pictures),
        "ratio": _spread([bare.elapsed_s / build.elapsed_s for build, bare in pairs]),
        "ratio of CPU time": _spread([bare.cpu_s / build.cpu_s for build, bare in pairs]),
    }


def _medians(passes: list[_Pass], pictures: int) -> dict[str, float]:
    return {
        "pictures/s": pictures / statistics.median(run.elapsed_s for run in passes),
        "CPU ms a picture": 1e3 * statistics.median(run.cpu_s for run in passes) / pictures,
    }


def _spread(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def _print(title: str, row: dict[str, dict[str, float]]) -> None:
    table = Table("", "pictures/s", "CPU ms a picture", show_edge=False)
    for name in ("build", "bare tower"):
        table.add_row(name, f"{row[name]['pictures/s']:.1f}", f"{row[name]['CPU ms a picture']:.1f}")
    console = make_console()
    console.print(title)
    console.print(f"on {cpu()}")
    console.print(table)
    for name in ("ratio", "ratio of CPU time"):
        found = row[name]
        console.print(
            f"{name}, build to bare tower: {found['median']:.3f} "
            f"(rounds {found['lowest']:.3f} to {found['highest']:.3f})"
        )


@click.command()
@click.option("--clip", help="CLIP in open_clip's hub layout, or builtin. [default: random ViT-B-32]")
@click.option("--pictures", default=256, show_default=True, help="Pictures of each pass.")
@click.option("--rounds", default=4, show_default=True, help="Passes of each, in turn.")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--workers", type=int, help="Processes that decode. [default: the build's own choice]")
@click.option(
    "--threads", default=torch.get_num_threads(), show_default=True, help="CPU threads of the tower."
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--quick", is_flag=True, help="A few pictures and the built-in CLIP: says only that it runs.")
@click.option("--json", "as_json", is_flag=True)
def main(quick: bool, as_json: bool, device: str, threads: int, **options: Any) -> None:
    """Time the build of a bank against the bare image tower."""
    if quick:
        options |= _QUICK
    clip, pictures, rounds = options["clip"], options["pictures"], options["rounds"]
    settings = BuildSettings(batch_size=options["batch_size"], workers=options["workers"])
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_pictures(folder / "pictures", pictures)
        weights = clip or _write_clip(folder / "clip")
        tower = load_image_tower(weights, device=choose_device(device), precision="fp32")
        source = open_source([str(folder / "pictures")], dataset=None, columns=DatasetColumns())
        batches = _prepare_batches(source, tower, options["batch_size"])

        def build() -> Tensor:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                work = WorkFolder.prepare(
                    Path(place) / "build", source, {}, shard_rows=settings.shard_rows, force=False
                )
                encode_shards(work, source, tower, settings, Processes())
                shards = [work.read_shard(shard).features for shard in range(work.num_shards)]
            return torch.from_numpy(np.concatenate(shards))

        @torch.inference_mode()
        def encode_bare() -> Tensor:
            encoded = [tower.model.encode_image(batch.to(tower.device)) for batch in batches]  # type: ignore[operator]  # torch types a module's attributes as tensors
            return F.normalize(torch.cat(encoded), dim=-1).cpu()

        builds, bares = _measure_in_turn(build, encode_bare, rounds)
        difference = (builds[0].features - bares[0].features).abs().max().item()
    row = _summarize(builds, bares, pictures)
    if as_json:
        print_json({**row, "largest difference of a feature": difference, "pictures": pictures})
        return
    title = (
        f"{Path(clip).name if clip else f'random {_MODEL}'} on {tower.device}, {threads} threads, "
        f"{rounds} rounds of {pictures} pictures, medians"
    )
    _print(title, row)
    make_console().print(shlex.join(["python", "-m", "benchmarks.bank", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
