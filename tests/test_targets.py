"""Targets: the table, and what another package adds to it without a line of the library changed."""

import json
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from click.testing import CliRunner

from tests.tiny_checkpoint import TEXTS, make_model
from xadapter_export import XAdapterSession, export, registry
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.manifest import Optimization
from xadapter_export.bundle.model_card import model_card, run_flags
from xadapter_export.cli.inspect import inspect
from xadapter_export.errors import ConfigError, MissingExtraError, UnsupportedError
from xadapter_export.exporters.makers.maker import (
    Deployed,
    Deployer,
    DeployJob,
    GraphJob,
    GraphMaker,
    MadeGraph,
    check_options,
    load_maker,
)
from xadapter_export.exporters.pipeline import ExportResult
from xadapter_export.exporters.request import ExportRequest
from xadapter_export.parity import prove_bundle
from xadapter_export.runtime.choose import choices_of
from xadapter_export.sessions.session import OnnxSession, Opening
from xadapter_export.targets import (
    CPU_PROVIDER,
    KINDS,
    ONNXRUNTIME,
    PORTABLE,
    PRECISIONS,
    TARGETS,
    Precision,
    Runtime,
    Target,
    VariantName,
    all_targets,
    all_variants,
)

GROUP = "xadapter_export.targets"
SENTENCES = [
    f"the {thing} is a {kind}."
    for thing in ("banana", "cherry", "lime")
    for kind in ("fruit", "very green fruit")
]

# -------------------------------------------------------------------------------- what a package would have


class ListMaker(Deployer):
    """Lists the operators of a graph: a target that is only packaged."""

    def deploy(self, job: DeployJob) -> Deployed:
        graph = ir.load(job.folder / job.variant.file)
        file = job.folder / "listed" / f"{job.variant.expert_set}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(sorted({node.op_type for node in graph.graph})))
        return Deployed((f"listed/{file.name}",), {"operators": str(len(graph.graph))})


LISTED = Target(
    name="listed",
    says="a list of operators",
    maker="tests.test_targets:ListMaker",
    precisions=("fp32",),
    made_from={"fp32": VariantName("cpu", "fp32")},
)


class WholeMaker(GraphMaker):
    """Puts graph and weights into one file; below fp32 the first try is wrong."""

    def tries(self, job: GraphJob) -> Iterator[MadeGraph]:
        for factor in (1.0,) if job.precision == "fp32" else (-1.0, 1.0):
            job.say(f"times {factor}")
            graph = ir.external_data.load_to_model(job.material.graphs["whole"].clone())
            for value in graph.graph.initializers.values():
                if factor < 0 and value.const_value is not None and value.const_value.nbytes > 1000:
                    array = value.const_value.numpy()
                    value.const_value = ir.tensor(array * np.float32(factor), name=value.name)
            file = job.empty_scratch() / f"{job.stems['whole']}_{job.precision}.whole"
            file.write_bytes(ir.to_proto(graph).SerializeToString())
            file.with_suffix(".json").write_text(json.dumps(job.material.longest))
            step = Optimization(name=f"times {factor}", lossless=False, unit="bytes", before=2, after=1)
            yield MadeGraph([step], files={"whole": file})


class ChoosyMaker(WholeMaker):
    """Refuses int8."""

    def check(self, options: ExportRequest, precisions: Sequence[Precision]) -> None:
        if "int8" in precisions:
            raise ConfigError("this one takes no int8", where=self.target.name)


def open_whole(file: Path, how: Opening) -> OnnxSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = how.num_threads or 0
    session: OnnxSession = onnxruntime.InferenceSession(file.read_bytes(), options, providers=[CPU_PROVIDER])
    return session


WHOLE = Target(
    name="whole",
    says="onnxruntime, one file",
    maker="tests.test_targets:WholeMaker",
    precisions=("fp32", "int8"),
    opener="tests.test_targets:open_whole",
    runtime=Runtime("Whole", "onnxruntime", ("my-package[whole]",), ("onnxruntime",), is_optional=False),
    provider=CPU_PROVIDER,
    places={"fp32": (1,) * len(KINDS)},
)
CHOOSY = Target(
    name="choosy",
    says="needs what is not installed",
    maker="tests.test_targets:ChoosyMaker",
    precisions=("fp32", "int8"),
    opener="tests.test_targets:open_whole",
    runtime=ONNXRUNTIME,
    needs=("no_such_module", "my-package[export]"),
)
NO_MAKER = Target("nomaker", "nothing", "tests.test_targets:open_whole", ("fp32",))


def install(monkeypatch: pytest.MonkeyPatch, **places: str) -> None:
    """Let entry points name these places, or take them away."""
    points = [EntryPoint(name, place, GROUP) for name, place in places.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == GROUP else [])
    forget()


def forget() -> None:
    """Forget what entry points gave."""
    for cached in (all_targets, all_variants):
        cached.cache_clear()
    for name in OURS:
        TARGETS._loaded.pop(name, None)


OURS = {"listed": "tests.test_targets:LISTED", "whole": "tests.test_targets:WHOLE"}


@pytest.fixture
def from_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    install(monkeypatch, **OURS)
    yield
    monkeypatch.undo()
    forget()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    folder = tmp_path_factory.mktemp("outside")
    (folder / "texts.txt").write_text("\n".join(SENTENCES))
    with pytest.MonkeyPatch.context() as patch:
        install(patch, **OURS)
        result = export(
            make_model(folder),
            folder / "bundle",
            "t",
            variants=("onnx-fp32", "whole-fp32", "whole-int8", "listed-fp32"),
            calibration=folder / "texts.txt",
        )
    forget()
    return result


# ------------------------------------------------------------------------------------------------ the tests


def test_the_table_is_whole() -> None:
    """What a row says of itself fits what the others say."""
    assert PORTABLE in all_variants()
    for target in all_targets():
        load_maker(target)
        assert set(target.precisions) <= set(PRECISIONS)
        assert set(target.splits) | set(target.swap_refused) | set(target.places) <= set(target.precisions)
        assert (target.opener is None) == (target.runtime is None)
        if target.is_deployment:
            assert set(target.made_from) == set(target.precisions)
            for precision, source in target.made_from.items():
                assert all_variants()[str(source)] == source
                assert source.precision == precision
                assert not TARGETS[source.target].is_deployment
        else:
            assert target.opener is not None
            assert (target.axes, target.largest_axes, target.reads) == ((), (), ())
    for precision in PRECISIONS:
        assert [precision in target.default_for for target in all_targets()].count(True) == 1
    for kind in KINDS:
        places = [of_kind[KINDS.index(kind)] for t in all_targets() for of_kind in t.places.values()]
        assert len(set(places)) == len(places)


@pytest.mark.long
def test_a_target_of_another_package_is_made_proven_and_listed(bundle: ExportResult) -> None:
    manifest = bundle.manifest
    assert [v.name for v in manifest.variants] == ["onnx-fp32", "whole-fp32", "whole-int8", "cpu-fp32"]
    fp32, int8 = (manifest.variant("t", name) for name in ("whole-fp32", "whole-int8"))
    assert (fp32.file, fp32.is_onnx) == ("whole/model_fp32.whole", False)
    assert fp32.weight_files == ("whole/model_fp32.json",)
    assert {cell.output for cell in bundle.parity.cells_of("t", "whole-fp32")} == {"logits"}
    assert bundle.parity.passed
    [made] = manifest.deployments
    assert (made.name, made.source, made.files) == ("listed-fp32", "cpu-fp32", ("listed/t.txt",))
    assert "MultiHeadAttention" in (bundle.folder / made.files[0]).read_text()
    assert int8.agreement is not None
    read_bundle(bundle.folder)  # sizes and hashes


@pytest.mark.long
def test_a_maker_is_told_the_longest_inputs(bundle: ExportResult) -> None:
    manifest = bundle.manifest
    assert manifest.clip is not None
    longest = json.loads((bundle.folder / "whole" / "model_fp32.json").read_text())
    assert longest == {"seq": manifest.plm.max_seq, "clip_seq": manifest.clip.context_length}


@pytest.mark.long
def test_the_card_says_how_to_run_a_target_of_another_package(
    bundle: ExportResult, from_outside: None
) -> None:
    """What to install, and the variant's name where no session would take it unasked."""
    alone = bundle.manifest.model_copy(update={"variants": bundle.manifest.variants[1:2]})
    card = model_card(alone, "b", {})
    assert 'pip install "my-package[whole]"\n' in card
    assert "It runs with Whole;" in card
    assert '[MASK]." --variant whole-fp32\n' in card
    assert run_flags(alone, {"every CPU": "whole-fp32"}) == ""


def test_a_graph_that_cannot_be_made_here_is_refused_before_anything_is(
    monkeypatch: pytest.MonkeyPatch, from_outside: None
) -> None:
    """By what the row needs, and by what its maker says."""
    install(monkeypatch, choosy="tests.test_targets:CHOOSY")
    try:
        with pytest.raises(MissingExtraError, match=r'no_such_module .*pip install "my-package\[export\]"'):
            check_options(ExportRequest(variants=("choosy-fp32",)))
        monkeypatch.setitem(sys.modules, "no_such_module", ModuleType("no_such_module"))
        with pytest.raises(ConfigError, match="this one takes no int8: choosy"):
            check_options(ExportRequest(variants=("choosy-fp32", "choosy-int8")))
        check_options(ExportRequest(variants=("choosy-fp32",)))
    finally:
        TARGETS._loaded.pop("choosy", None)


@pytest.mark.long
def test_the_first_try_that_passes_its_gate_is_kept(bundle: ExportResult) -> None:
    int8 = bundle.manifest.variant("t", "whole-int8")
    assert int8.optimizations[-1].name == "times 1.0"
    assert int8.agreement is not None
    assert int8.agreement.same_top == 1


@pytest.mark.long
def test_a_session_opens_it_and_the_commands_name_it(bundle: ExportResult, from_outside: None) -> None:
    session = XAdapterSession.load(bundle.folder, num_threads=1)
    assert session.answered_by == "whole-fp32"
    portable = XAdapterSession.load(bundle.folder, variant="onnx-fp32", num_threads=1)
    assert session.fill_mask(TEXTS[0])[0].token == portable.fill_mask(TEXTS[0])[0].token
    assert set(choices_of(bundle.manifest).values()) == {"whole-fp32"}
    assert prove_bundle(bundle.folder, variants=["whole-fp32"]).passed
    shown = CliRunner().invoke(inspect, [str(bundle.folder)]).output
    assert "whole-int8" in shown
    assert "listed-fp32" in shown


@pytest.mark.long
def test_a_bundle_is_read_where_the_package_is_not_installed(
    bundle: ExportResult, from_outside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    assert XAdapterSession.load(bundle.folder, num_threads=1).answered_by == "cpu-fp32"
    with pytest.raises(UnsupportedError, match=r"no such target .*got whole"):
        XAdapterSession.load(bundle.folder, variant="whole-fp32")


@pytest.mark.usefixtures("from_outside")
def test_a_package_that_is_broken_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, whole="tests.test_targets:WHOLE", broken="tests.nowhere:TARGET")
    with pytest.warns(UserWarning, match=r"a target cannot be loaded: .*broken = tests\.nowhere:TARGET"):
        names = [target.name for target in all_targets()]
    assert "whole" in names
    assert "broken" not in names


def test_a_row_that_names_no_maker_is_an_error() -> None:
    precision: Precision = "fp32"
    with pytest.raises(ConfigError, match=r"names no maker: tests\.test_targets:open_whole .*a GraphMaker"):
        load_maker(NO_MAKER)
    with pytest.raises(ConfigError, match="names what is not there"):
        load_maker(Target("gone", "nothing", "tests.test_targets:Nothing", (precision,)))
