"""Triton's repository is what its protobuf and the ONNX file say; the client asks and formats.

Triton itself cannot be installed with pip. The server below speaks its protocol, from NVIDIA's own service
definition, and reads the repository as the onnxruntime backend does; ``docs/triton.md`` has the command that
proves the real one.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests import ROOT
from tests.tiny_checkpoint import TEXTS, make_model
from xadapter_export import XAdapterSession, export
from xadapter_export.bank import BankClip
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.cli.export import export as export_command
from xadapter_export.errors import ConfigError, ParityError, UnsupportedError
from xadapter_export.exporters.makers.triton import check_repository
from xadapter_export.sessions.onnx_session import open_onnx
from xadapter_export.sessions.session import Opening
from xadapter_export.swap.swap import swap_bank

grpc = pytest.importorskip("grpc", reason="needs the extra [triton]")
client = pytest.importorskip("examples.triton_client", reason="needs the extra [triton]")
from google.protobuf import text_format  # noqa: E402
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc  # noqa: E402

# Neither CLIP's context nor the PLM's 40 tokens are a multiple of what the client pads to.
CONTEXT = 27
FILLS_CLIP = f"{TEXTS[1]} a banana"
NAMES = ("xadapter_vt_fp32", "xadapter_vt_int8", "xadapter_none_fp32", "xadapter_none_int8")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton")
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS * 4), encoding="utf-8")
    return export(
        make_model(folder, context_length=CONTEXT),
        folder / "bundle",
        ("vt", "none"),
        precisions=("fp32", "int8"),
        targets=("triton",),
        calibration=folder / "texts.txt",
        min_agreement=0,
        max_points_lost=100,
        profile={"batch": (1, 8)},
    ).folder


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # generated, untyped
    """What of Triton's protocol the client uses, over a model repository; refuses what Triton would."""

    def __init__(self, repository: Path) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.configs, self.sessions = {}, {}
        for home in repository.iterdir():
            text = (home / "config.pbtxt").read_text()
            self.configs[home.name] = text_format.Parse(text, model_config_pb2.ModelConfig())
            self.sessions[home.name] = open_onnx(home / "1/model.onnx", Opening(num_threads=1))

    def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802  # the protocol's name
        return service_pb2.ModelConfigResponse(config=self.configs[request.name])

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802  # the protocol's name
        config, feed = self.configs[request.model_name], {}
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            (declared,) = [item for item in config.input if item.name == tensor.name]
            fits = len(tensor.shape) == 1 + len(declared.dims) and tensor.shape[0] <= config.max_batch_size
            if not fits or f"TYPE_{tensor.datatype}" != model_config_pb2.DataType.Name(declared.data_type):
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"unexpected shape for input '{tensor.name}'")
            feed[tensor.name] = np.frombuffer(raw, np.int64).reshape(tensor.shape)
        self.shapes.append(feed["input_ids"].shape)
        names = [output.name for output in request.outputs]
        answer = service_pb2.ModelInferResponse(model_name=request.model_name)
        for name, array in zip(names, self.sessions[request.model_name].run(names, feed), strict=True):
            kind = {"float32": "FP32", "int64": "INT64"}[array.dtype.name]
            answer.outputs.add(name=name, datatype=kind, shape=array.shape)
            answer.raw_output_contents.append(array.tobytes())
        return answer


@pytest.fixture
def served(bundle: Path) -> Iterator[tuple[str, Server]]:
    server, ours = grpc.server(ThreadPoolExecutor(2)), Server(bundle / "triton")
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(ours, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", ours
    server.stop(None).wait()


def test_the_repository_is_that_of_the_protobuf_and_the_graph(bundle: Path) -> None:
    manifest = read_bundle(bundle).manifest
    assert sorted(path.name for path in (bundle / "triton").iterdir()) == sorted(NAMES)
    assert [d.facts["model"] for d in manifest.deployments] == sorted(
        NAMES, key=[d.facts["model"] for d in manifest.deployments].index
    )
    kinds = {"fp32": "KIND_AUTO", "int8": "KIND_CPU"}
    for deployment in manifest.deployments:
        home = bundle / "triton" / deployment.facts["model"]
        check_repository(home)
        text = (home / "config.pbtxt").read_text()
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
        assert text_format.MessageToString(config) == text
        session = open_onnx(home / "1/model.onnx")
        for values, tensors in ((session.get_inputs(), config.input), (session.get_outputs(), config.output)):
            assert [value.name for value in values] == [tensor.name for tensor in tensors]
            assert all(value.shape[0] == "batch" for value in values)  # every tensor has the batch axis
            want = [[dim if isinstance(dim, int) else -1 for dim in value.shape[1:]] for value in values]
            assert [list(tensor.dims) for tensor in tensors] == want
        assert config.max_batch_size == 8
        assert config.backend == "onnxruntime"
        assert [kinds[deployment.precision]] == [
            model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind) for group in config.instance_group
        ]
        assert config.dynamic_batching.max_queue_delay_microseconds > 0
        assert len(config.model_warmup) == 1
        assert set(deployment.files) == {
            path.relative_to(bundle).as_posix() for path in home.rglob("*") if path.is_file()
        }


def test_a_configuration_that_is_not_the_graph_s_is_an_error(bundle: Path, tmp_path: Path) -> None:
    for number, (old, new, message) in enumerate(
        (
            ('name: "logits"', 'name: "logit"', "output"),
            ("dims: 40", "dims: 41", "output"),
            ("TYPE_INT64", "TYPE_INT32", "input"),
            ('name: "xadapter_vt_fp32"', 'name: "other"', "name"),
            ("max_batch_size", "max_batch", "is not Triton's protobuf"),
            ("dims: 10", "dims: 11", "numbers of"),
        )
    ):
        home = Path(
            shutil.copytree(bundle / "triton/xadapter_vt_fp32", tmp_path / str(number) / "xadapter_vt_fp32")
        )
        text = (home / "config.pbtxt").read_text()
        assert old in text
        (home / "config.pbtxt").write_text(text.replace(old, new, 1))
        with pytest.raises(ParityError, match=message):
            check_repository(home)


def test_the_client_gives_the_answers_of_a_session(bundle: Path, served: tuple[str, Server]) -> None:
    url, server = served
    sets: tuple[ExpertSet, ...] = ("vt", "none")
    for experts in sets:
        model = f"xadapter_{experts}_fp32"
        result = CliRunner().invoke(client.main, [str(bundle), *TEXTS[:1], "--url", url, "--model", model])
        assert result.exit_code == 0, result.output
        session = XAdapterSession.load(bundle, experts=experts, variant="onnx-fp32", num_threads=1)
        want = [f"  {a.token:<12} {a.score:6.1%}" for a in session.fill_mask(TEXTS[0])]
        lines = result.stdout.splitlines()
        assert lines[:6] == [TEXTS[0], *want]
        if experts == "vt":
            assert lines[6] == f"  looked at: {', '.join(p.caption for p in session.retrieve(TEXTS[0]))}"
    texts = [*TEXTS, FILLS_CLIP]
    assert session._clip_encoder.encode(texts)["clip_input_ids"].shape[1] == CONTEXT
    result = CliRunner().invoke(client.main, [str(bundle), *texts, "--url", url, "--model", NAMES[1]])
    assert result.exit_code == 0, result.output
    assert [line for line in result.stdout.splitlines() if not line.startswith(" ")] == texts
    assert all(shape[1] % client.SEQ_MULTIPLE == 0 for shape in server.shapes)


def test_the_client_proves_the_server(bundle: Path, served: tuple[str, Server]) -> None:
    url, server = served
    arguments = [str(bundle), "--url", url, "--prove", "--model"]
    result = CliRunner().invoke(client.main, [*arguments, "xadapter_vt_fp32"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("15 of 15 cells passed")
    server.sessions["xadapter_vt_fp32"] = server.sessions["xadapter_vt_int8"]
    assert CliRunner().invoke(client.main, [*arguments, "xadapter_vt_fp32"]).exit_code == 1
    lossy = CliRunner().invoke(client.main, [*arguments, "xadapter_vt_int8"])  # held to its own graph
    assert (lossy.exit_code, lossy.stdout[:21]) == (0, "15 of 15 cells passed"), lossy.output
    exact = server.sessions["xadapter_vt_int8"]
    off = SimpleNamespace(run=lambda names, feed: [array + 1 for array in exact.run(names, feed)])
    server.sessions["xadapter_vt_int8"] = off
    assert CliRunner().invoke(client.main, [*arguments, "xadapter_vt_int8"]).exit_code == 1
    unknown = CliRunner().invoke(client.main, [*arguments, "other"])
    assert "the bundle has no model other; it has xadapter_vt_fp32" in unknown.output


def test_a_bank_in_a_repository_is_left_out_or_refused(bundle: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", context_length=CONTEXT)
    manifest = read_bundle(bundle).manifest
    assert model.bank is not None
    assert manifest.clip is not None
    (tmp_path / "bank").mkdir()
    object.__setattr__(model.bank, "clip", BankClip(source="tiny-clip", sha256=manifest.clip.sha256))
    model.bank.save(tmp_path / "bank")
    with pytest.raises(
        UnsupportedError, match=r"deployment triton-fp32 contains the old bank; .*--leave-out triton-fp32"
    ):
        swap_bank(bundle, tmp_path / "bank")
    result = swap_bank(bundle, tmp_path / "bank", tmp_path / "out", leave_out=["triton"])
    assert {d.expert_set for d in result.manifest.deployments} == {"none"}
    assert sorted(path.name for path in (result.folder / "triton").iterdir()) == sorted(NAMES[2:])


def test_what_triton_does_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precision int4 is not available for target triton"):
        export("builtin", tmp_path / "bundle", "t", precisions=("int4",), targets=("triton",))
    profile = ROOT / "export/triton.toml"
    refused = CliRunner().invoke(
        export_command, ["--config", str(profile), "--precision", "int4", "-o", str(tmp_path / "bundle")]
    )
    assert "precision int4 is not available for target triton" in refused.output
