import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest

from xadapter_export import XAdapterSession
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.errors import ConfigError, ParityError, UnsupportedError
from xadapter_export.sessions.onnx_session import open_onnx

if TYPE_CHECKING:
    from xadapter_export.exporters.pipeline import ExportResult

TEXTS = ["The color of a banana is [MASK].", "[MASK] and a long sentence about a frog that is [MASK]."]


@pytest.fixture(scope="module")
def phone(tmp_path_factory: pytest.TempPathFactory) -> "ExportResult":
    from xadapter_export import export

    folder = tmp_path_factory.mktemp("phone") / "bundle"
    return export("builtin", folder, "t", precisions=("fp32", "int8"), targets=("mobile",))


def test_ort_file_answers_as_the_graph_that_it_was_made_from(phone: "ExportResult") -> None:
    session = XAdapterSession.load(phone.folder, variant="onnx-fp32")
    for deployment in phone.manifest.deployments:
        variant = phone.manifest.variant("t", deployment.source)
        graph = open_onnx(phone.folder / variant.file)
        ort_file = onnxruntime.InferenceSession(phone.folder / deployment.files[0])
        for texts in (TEXTS[:1], TEXTS):
            arrays = session._clip_encoder.encode(texts)
            feed = {value.name: arrays[value.name] for value in graph.get_inputs()}
            wanted, got = graph.run(["logits"], feed)[0], ort_file.run(["logits"], feed)[0]
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
            assert np.isfinite(got).all()


def test_manifest_names_the_files_and_what_they_need(phone: "ExportResult") -> None:
    made = phone.manifest.deployments
    assert [(d.target, d.source) for d in made] == [("mobile", "onnx-fp32"), ("mobile", "cpu-int8")]
    assert made[0].files == ("mobile/model.ort", "mobile/model.required_operators.config")
    read_bundle(phone.folder)  # sizes and hashes of all of them
    ort_bytes = (phone.folder / made[0].files[0]).stat().st_size
    assert ort_bytes < 1.05 * phone.manifest.variant("t").size_bytes  # the tied table stands once
    text = (phone.folder / made[0].files[1]).read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert {line.split(";")[0] for line in lines} == {"ai.onnx", "com.microsoft"}
    assert "LayerNormalization" in text
    assert str(phone.folder) not in text
    assert "/" not in text
    assert made[0].facts["operators"] == str(sum(len(line.split(",")) for line in lines))


def test_ort_file_of_another_graph_is_refused(phone: "ExportResult", tmp_path: Path) -> None:
    from xadapter_export.exporters.makers import mobile
    from xadapter_export.exporters.makers.maker import DeployJob
    from xadapter_export.exporters.request import ExportRequest

    folder = Path(shutil.copytree(phone.folder, tmp_path / "bundle"))
    other = folder / phone.manifest.deployments[1].files[0]
    with pytest.raises(ParityError, match=r"onnx-fp32: the \.ort file does not say what the graph says in "):
        job = DeployJob(folder, phone.manifest, phone.manifest.variant("t"), ExportRequest(), print)
        mobile._prove(job, other)


def test_operators_that_stock_packages_lack_are_refused_and_the_bundle_is_kept_aside(
    phone: "ExportResult", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.tiny_checkpoint import make_model
    from xadapter_export import export
    from xadapter_export.exporters import pipeline
    from xadapter_export.exporters.makers import mobile

    def build(self: pipeline._Builder, *_: object) -> object:
        shutil.copytree(
            phone.folder, self.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("mobile")
        )
        manifest = phone.manifest.model_copy(update={"deployments": ()})
        return pipeline._write_manifest(self.folder, manifest, "bundle"), phone.parity

    monkeypatch.setattr(mobile, "STOCK_DOMAINS", ("ai.onnx",))
    monkeypatch.setattr(pipeline._Builder, "build", build)
    with pytest.raises(
        UnsupportedError, match=r"not have com\.microsoft:FusedMatMul.*; .* kept in .*\.rejected"
    ):
        export(make_model(tmp_path), tmp_path / "bundle", "t", targets=("mobile",))
    kept = read_bundle(tmp_path / "bundle.rejected").manifest
    assert (kept.variants, kept.deployments) == (phone.manifest.variants, ())
    assert not (tmp_path / "bundle").exists()


def test_precision_that_is_not_for_phones_is_refused(tmp_path: Path) -> None:
    from xadapter_export import export

    with pytest.raises(ConfigError, match="precision fp16 is not available for target mobile"):
        export("builtin", tmp_path / "bundle", "t", precisions=("fp16",), targets=("mobile",))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precisions": ("fp32", "fp16")}, "precision fp16 is not available for target mobile"),
        ({"profile": {"batch": (1, 8)}}, "a profile for this axis: profile batch; .* tensorrt or triton"),
        ({"compute_capabilities": ("sm999",)}, "compute capabilities are for the target tensorrt-rtx"),
        ({"targets": ("onnx",), "profile": {"seq": (1, 8)}}, "a profile for this axis: profile seq"),
        ({"targets": ("mobil",)}, "unknown target: mobil "),
        ({"targets": (), "precisions": ("fp61",)}, "unknown precision: fp61 "),
        ({"experts": "tv"}, r"unknown expert set: tv \(expected one of none, v, t, vt"),
    ],
)
def test_what_no_target_takes_is_refused_before_the_model_loads(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    from xadapter_export import export

    asked = {"experts": "t", "targets": ("mobile",), **options}
    with pytest.raises(ConfigError, match=said):
        export("nowhere", tmp_path / "bundle", **asked)
