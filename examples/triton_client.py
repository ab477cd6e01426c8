"""Asks a Triton server that serves a bundle: tokenizes here, sends token ids, formats the answers.

It needs the bundle's tokenizers and manifest, no graph and no onnxruntime; only ``--prove`` of a lossy model
runs its graph here, with onnxruntime, to compare with:

    pip install ".[triton]"
    python examples/triton_client.py BUNDLE "The color of a banana is [MASK]."
    python examples/triton_client.py BUNDLE --prove
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

from xadapter_export.bundle.folder import BANK_NAME, Bundle, read_bundle
from xadapter_export.bundle.manifest import Deployment, Manifest
from xadapter_export.bundle.pictures import read_pictures
from xadapter_export.parity.engines import compare_engine
from xadapter_export.parity.reference import read_reference
from xadapter_export.runtime.encoders import load_encoders
from xadapter_export.tasks import TASKS
from xadapter_export.tasks.spec import Asked

Arrays = dict[str, NDArray[Any]]
TOP_K = 5
SEQ_MULTIPLE = 16  # Triton batches requests of equal shape only


def ask(client: InferenceServerClient, model: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """Sends arrays, all of the same number of rows; returns every output of the model."""
    config = client.get_model_config(model).config
    sent = []
    for tensor in config.input:
        array = np.ascontiguousarray(inputs[tensor.name], np.int64)
        sent.append(InferInput(tensor.name, list(array.shape), "INT64"))
        sent[-1].set_data_from_numpy(array)
    names = [tensor.name for tensor in config.output]
    answer = client.infer(model, sent, outputs=[InferRequestedOutput(name) for name in names])
    return {name: answer.as_numpy(name) for name in names}


def pad(inputs: Mapping[str, NDArray[Any]], manifest: Manifest) -> Arrays:
    """Pads tokens to a multiple, or to what the models read: requests of other clients fit into one batch."""
    padded = {}
    for name, array in inputs.items():
        extra = 0 if name == "mask_positions" else -array.shape[1] % SEQ_MULTIPLE
        longest = manifest.plm.max_seq
        if name == "clip_input_ids" and manifest.clip is not None:
            longest = manifest.clip.context_length
        extra = min(extra, longest - array.shape[1])
        filler = manifest.plm.pad_token_id if name == "input_ids" else 0
        padded[name] = np.pad(array, ((0, 0), (0, extra)), constant_values=filler)
    return padded


def deployment_of(bundle: Bundle, model: str | None) -> Deployment:
    """Returns the Triton deployment of a bundle by its model's name; the first if None."""
    found = {d.facts["model"]: d for d in bundle.manifest.deployments if d.target == "triton"}
    if not found:
        raise click.ClickException("the bundle has no model repository: export it with --target triton")
    if model is not None and model not in found:
        raise click.ClickException(f"the bundle has no model {model}; it has {', '.join(found)}")
    return found[model or next(iter(found))]


def answer(client: InferenceServerClient, bundle: Bundle, deployment: Deployment, texts: list[str]) -> None:
    """Prints, for each text, the most probable words or labels, and the pictures that were looked at."""
    manifest = bundle.manifest
    plain, with_clip = load_encoders(bundle)
    encoder = with_clip if "clip_input_ids" in _inputs_of(bundle, deployment) else plain
    task = TASKS[manifest.task]
    inputs = encoder.encode(texts, require_mask=task.reads_masks)
    outputs = ask(client, deployment.facts["model"], pad(inputs, manifest))
    asked = Asked(texts, inputs, manifest, TOP_K, manifest.candidates, None, encoder.tokenizer)
    for row, (text, found) in enumerate(zip(texts, task.answers(outputs[task.compared], asked), strict=True)):
        print(text)
        if isinstance(found, list):
            for one in found:
                print(f"  {one.word:<12} {one.score:6.1%}")
        else:
            print(" ", *(f"{number:.4f}" for number in found[:TOP_K]), "...")
        if "retrieved" in outputs and manifest.bank is not None:
            pictures = read_pictures(bundle.file(BANK_NAME), num_pictures=manifest.bank.num_pictures)
            shown = [pictures[i].caption for i in outputs["retrieved"][row].tolist()]
            print(f"  looked at: {', '.join(shown)}")


class _Served:
    """A model of the server in the place of a session of onnxruntime."""

    def __init__(self, client: InferenceServerClient, model: str) -> None:
        self._client, self._model = client, model

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, NDArray[Any]]) -> list[Any]:
        """Computes the named outputs."""
        outputs = ask(self._client, self._model, input_feed)
        return [outputs[name] for name in output_names or outputs]


def prove(client: InferenceServerClient, bundle: Bundle, deployment: Deployment) -> bool:
    """Compares the server with PyTorch's outputs, or with its own graph where that is lossy."""
    served: Any = _Served(client, deployment.facts["model"])
    cells, _ = compare_engine(bundle, deployment, served, lambda _: True, read_reference(bundle))
    failed = [cell for cell in cells if not cell.passed]
    largest = max(cell.max_abs or 0.0 for cell in cells)
    print(f"{len(cells) - len(failed)} of {len(cells)} cells passed, largest difference {largest:.1e}")
    return not failed


def _inputs_of(bundle: Bundle, deployment: Deployment) -> list[str]:
    return [tensor.name for tensor in bundle.manifest.expert_sets[deployment.expert_set].inputs]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1)
@click.option("--url", default="localhost:8001", show_default=True, help="The server's gRPC address.")
@click.option("--model", help="Name of the model in the repository. [default: the bundle's first]")
@click.option(
    "--prove",
    "proves",
    is_flag=True,
    help="Compare with PyTorch's outputs in the bundle; a lossy model with its graph.",
)
def main(bundle: Path, texts: tuple[str, ...], url: str, model: str | None, proves: bool) -> None:
    """Ask a Triton server that serves BUNDLE/triton."""
    held = read_bundle(bundle)
    deployment = deployment_of(held, model)
    with InferenceServerClient(url) as client:
        if texts:
            answer(client, held, deployment, list(texts))
        if proves and not prove(client, held, deployment):
            sys.exit(1)


if __name__ == "__main__":
    main()
