"""A graph that gives other numbers on this machine is refused when it is opened, and another one answers."""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper

from tests.parity.test_prove import change_reference, scale_weight
from tests.tiny_bundle import CASES, rehash, write_bundle
from xadapter_export import XAdapterSession
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.machine import read_machine
from xadapter_export.bundle.manifest import ExpertSet, Task, Variant
from xadapter_export.cli.run import run
from xadapter_export.errors import BundleError, ConfigError, HashMismatchError, ParityError
from xadapter_export.parity import check_lossy
from xadapter_export.parity.recorded import Check, Record, noise, opened_record
from xadapter_export.runtime import graphs
from xadapter_export.sessions import shared
from xadapter_export.sessions.onnx_session import open_onnx
from xadapter_export.sessions.session import Array, OnnxSession

BANANA = "the color of a banana is [MASK]."
VARIANTS = ("onnx-fp32", "cpu-fp32", "cpu-int8")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("several") / "bundle", variants=VARIANTS)


@pytest.fixture
def copied(several: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(several, tmp_path / "bundle"))


@pytest.fixture
def int8_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``auto`` take cpu-int8, then cpu-fp32, whatever the machine."""
    from xadapter_export.runtime import choose

    order = (("cpu-int8", "first"), ("cpu-fp32", "second"), ("onnx-fp32", "third"))
    monkeypatch.setattr(choose, "order_of", lambda _kind: order)


def file_of(folder: Path, name: str, experts: ExpertSet = "vt") -> Path:
    return folder / read_bundle(folder, verify=False).manifest.variant(experts, name).file


def break_weight(folder: Path, name: str, experts: ExpertSet, weight: str, factor: float = 1.05) -> None:
    scale_weight(file_of(folder, name, experts), weight, factor)
    rehash(folder)


def test_what_is_right_passes_and_says_what_it_found(several: Path) -> None:
    for name in VARIANTS:
        session = XAdapterSession.load(several, experts="v", variant=name, num_threads=1, check="always")
        (check,) = session.checks
        assert (check.variant, check.expert_set, check.case) == (name, "v", "single_typical")
        assert check.passed
        assert check.problem is None
        assert check.difference is not None
        assert check.bound is not None
        assert 0 <= check.difference <= check.bound < 1
        assert check.milliseconds > 0
        assert session.with_experts("none").fill_mask(BANANA)
        assert [check.expert_set for check in session.checks] == ["v", "none"]


@pytest.mark.usefixtures("int8_first")
@pytest.mark.parametrize(("experts", "weight"), [("v", "adapter_v"), ("t", "adapter_t"), ("vt", "adapter_t")])
def test_one_weight_that_is_off_by_five_percent_is_refused_and_another_variant_is_right(
    copied: Path, experts: ExpertSet, weight: str
) -> None:
    right = XAdapterSession.load(copied, experts=experts, variant="cpu-fp32", num_threads=1)
    break_weight(copied, "cpu-int8", experts, weight)
    message = (
        rf"^a variant computes wrong outputs on this processor: cpu-int8, experts {experts}, .*"
        r"\(expected at most .* off, got .*\); using cpu-fp32 instead$"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        session = XAdapterSession.load(copied, experts=experts, num_threads=1)
    assert len(warned) == 1
    assert str(read_machine()) in str(warned[0].message)
    assert session.answered_by == "cpu-fp32"
    assert session.variant_reason == "second"
    assert [(check.variant, check.passed) for check in session.checks] == [
        ("cpu-int8", False),
        ("cpu-fp32", True),
    ]
    assert session.fill_mask(BANANA) == right.fill_mask(BANANA)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_that_is_named_is_an_error_where_it_is_wrong(copied: Path, name: str) -> None:
    break_weight(copied, name, "vt", "adapter_t")
    with pytest.raises(
        ParityError, match=rf"wrong outputs .*: {name}, experts vt, .*skip this check with check"
    ):
        XAdapterSession.load(copied, experts="vt", variant=name, num_threads=1)
    session = XAdapterSession.load(
        copied, experts="v", variant=name, num_threads=1
    )  # of that set it is right
    with pytest.raises(ParityError, match=f"{name}, experts vt"):
        session.fill_mask(BANANA, experts="vt")
    assert session.fill_mask(BANANA)[0].token == "yellow"


@pytest.mark.usefixtures("int8_first")
def test_where_all_are_wrong_nothing_answers(copied: Path) -> None:
    for name in VARIANTS:
        break_weight(copied, name, "vt", "adapter_t")
    with (
        pytest.warns(UserWarning, match="instead") as warned,
        pytest.raises(
            ParityError,
            match=r"wrong outputs .*: onnx-fp32, .*; every suitable variant computes wrong outputs",
        ),
    ):
        XAdapterSession.load(copied, experts="vt", num_threads=1)
    assert len(warned) == 2


def test_without_a_check_it_is_as_wrong_as_it_is_and_no_reference_is_read(copied: Path) -> None:
    break_weight(copied, "cpu-int8", "v", "adapter_v", 0.0)
    reference = bytearray((copied / "reference.npz").read_bytes())
    reference[-1] ^= 1
    (copied / "reference.npz").write_bytes(reference)
    session = XAdapterSession.load(copied, experts="v", variant="cpu-int8", num_threads=1, check="never")
    assert session.fill_mask(BANANA)[0].token != "yellow"
    assert session.checks == ()
    with pytest.raises(HashMismatchError, match=r"has changed: .*reference\.npz"):
        XAdapterSession.load(copied, experts="v", variant="cpu-int8", num_threads=1)
    with pytest.raises(
        ConfigError, match=r"unknown value for check \(expected always, once, never, got ever\)"
    ):
        XAdapterSession.load(copied, check="ever")  # type: ignore[arg-type]  # the mistake in question


def test_the_same_files_are_asked_once_in_a_process(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = Record.check

    def count(self: Record, session: OnnxSession, variant: Variant, case: str) -> Check:
        asked.append(variant.name)
        return original(self, session, variant, case)

    monkeypatch.setattr(Record, "check", count)
    first = XAdapterSession.load(copied, experts="v", variant="cpu-int8", num_threads=1)
    again = XAdapterSession.load(copied, experts="v", variant="cpu-int8", num_threads=1)
    assert asked == ["cpu-int8"]
    assert again.checks == first.checks
    XAdapterSession.load(copied, experts="v", variant="cpu-int8", num_threads=1, check="always")
    XAdapterSession.load(copied, experts="v", variant="cpu-int8", num_threads=2)
    assert len(asked) == 3
    break_weight(copied, "cpu-int8", "v", "adapter_v")  # another file now
    with pytest.raises(ParityError, match="wrong outputs"):
        XAdapterSession.load(copied, experts="v", variant="cpu-int8", num_threads=1)
    assert len(asked) == 4


class WrongKernel:
    """A session with one output that somebody else computed."""

    def __init__(self, session: OnnxSession, change: Callable[[Array], Array]) -> None:
        self._session, self._change = session, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, names: Sequence[str] | None, feed: Mapping[str, Array]) -> list[Array]:
        first, *rest = self._session.run(names, feed)
        return [self._change(first), *rest]


def _mix(array: Array) -> Any:
    return np.ascontiguousarray(array[..., ::-1])


@pytest.mark.usefixtures("int8_first")
@pytest.mark.parametrize(
    "change",
    [
        lambda array: array * np.float32(0) + np.float32(0.01),
        lambda array: array * np.float32("nan"),
        lambda array: array[:, :, :-1],
        lambda array: array.astype(np.float64),
        _mix,
    ],
    ids=["flat", "nan", "cut", "double", "mixed"],
)
def test_a_wrong_kernel_is_refused_and_another_variant_is_right(
    several: Path, change: Callable[[Array], Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = shared.open_shared

    def open_one(bundle: Any, variant: Variant, how: Any) -> Any:
        session = opened(bundle, variant, how)
        return WrongKernel(session, change) if variant.name == "cpu-int8" else session

    monkeypatch.setattr(graphs, "open_shared", open_one)
    with pytest.warns(UserWarning, match=r"cpu-int8, experts v, .*; using cpu-fp32 instead"):
        session = XAdapterSession.load(several, experts="v", num_threads=1, check="always")
    assert session.answered_by == "cpu-fp32"
    assert session.fill_mask(BANANA)[0].token == "yellow"
    answers = session.fill_mask(BANANA, experts="vt")
    assert answers == XAdapterSession.load(several, variant="cpu-fp32", num_threads=1).fill_mask(BANANA)
    with pytest.raises(ParityError, match=r"every suitable variant .*: cpu-int8, experts v, "):
        XAdapterSession.load(several, experts="v", variant="int8", num_threads=1, check="always")


def test_another_answer_that_comes_first_is_seen_where_its_column_was_not_kept(copied: Path) -> None:
    def keep_little(arrays: dict[str, Any]) -> None:
        key = "single_typical/v/cpu-int8/out/logits"
        arrays[f"{key}#shape"] = np.array(arrays[key].shape)
        columns = np.unique([0, 1, int(arrays[key].argmax())])
        arrays[key], arrays[f"{key}#columns"] = arrays[key][..., columns], columns

    change_reference(copied, keep_little)
    bundle = read_bundle(copied)
    variant = bundle.manifest.variant("v", "cpu-int8")
    right = open_onnx(copied / variant.file)

    def raise_another(array: Array) -> Array:
        changed = array.copy()
        changed[..., 17] += 100
        return changed

    with opened_record(bundle) as record:
        assert record.check(right, variant, "single_typical").passed
        check = record.check(WrongKernel(right, raise_another), variant, "single_typical")
    assert not check.passed
    assert check.problem == "another answer comes first"
    assert check.got == "another answer comes first"  # no number that was kept is off


@pytest.mark.usefixtures("int8_first")
@pytest.mark.parametrize(
    ("task", "weight"), [("text-classification", "head"), ("feature-extraction", "adapter_v")]
)
def test_classifiers_and_embeddings_are_asked_too(tmp_path: Path, task: Task, weight: str) -> None:
    folder = write_bundle(tmp_path / "b", task=task, sets=("v",), variants=VARIANTS)
    assert XAdapterSession.load(folder, num_threads=1).answered_by == "cpu-int8"
    break_weight(folder, "cpu-int8", "v", weight, 1.3)
    with pytest.warns(UserWarning, match="cpu-fp32 instead"):
        assert XAdapterSession.load(folder, num_threads=1).answered_by == "cpu-fp32"


@pytest.mark.usefixtures("int8_first")
def test_a_lossy_variant_of_which_nothing_is_recorded_is_not_used(copied: Path) -> None:
    change_reference(copied, lambda arrays: [arrays.pop(k) for k in list(arrays) if "/cpu-int8/" in k])
    with pytest.warns(UserWarning, match=r"got the reference lacks an array: single_typical/v/cpu"):
        assert XAdapterSession.load(copied, experts="v", num_threads=1).answered_by == "cpu-fp32"
    assert not any(check.passed for check in check_lossy(copied))


def test_a_reference_that_cannot_be_read_is_one_line(copied: Path) -> None:
    (copied / "reference.npz").write_bytes(b"PK no archive")
    rehash(copied)
    with pytest.raises(BundleError, match=r"^the reference cannot be read: .*reference\.npz"):
        XAdapterSession.load(copied, experts="v", num_threads=1)


def test_noise_is_of_one_case_where_it_has_many_numbers_and_of_all_where_it_has_few() -> None:
    rng = np.random.default_rng(0)
    reference = {f"{case}/t/out/{name}": np.zeros((1, n), np.float32) for case in "ab" for name, n in NOISES}
    off = {
        f"{case}/t/cpu-int8/out/{name}": rng.normal(0, size, (1, n)).astype(np.float32)
        for case, size in (("a", 0.01), ("b", 1.0))
        for name, n in NOISES
    }
    found = noise(off, reference)
    assert found["a/t/cpu-int8/out/many#noise"] == pytest.approx(0.01, rel=0.1)
    assert found["b/t/cpu-int8/out/many#noise"] == pytest.approx(1.0, rel=0.1)
    both = np.concatenate([off["a/t/cpu-int8/out/few"], off["b/t/cpu-int8/out/few"]])
    assert found["a/t/cpu-int8/out/few#noise"] == pytest.approx(np.sqrt((both**2).mean()), rel=1e-4)


NOISES = (("many", 1000), ("few", 2))


def test_every_case_of_every_lossy_variant_can_be_checked(several: Path) -> None:
    checks = check_lossy(several)
    assert {(check.expert_set, check.case) for check in checks} == {
        (experts, case) for experts in ("none", "v", "t", "vt") for case in CASES
    }
    assert all(check.passed and check.variant == "cpu-int8" for check in checks)


def test_numbers_that_are_not_finite_are_one_clear_error(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", sets=("none",))
    model = onnx.load(folder / "onnx/model.onnx")
    model.graph.node[-1].output[0] = "finite"
    model.graph.initializer.append(helper.make_tensor("nan", onnx.TensorProto.FLOAT, [], [float("nan")]))
    model.graph.node.append(helper.make_node("Add", ["finite", "nan"], ["logits"]))
    onnx.save(model, folder / "onnx/model.onnx")
    rehash(folder)
    with pytest.raises(ParityError, match=r"onnx-fp32, experts none, .*\(got NaN or infinity\)"):
        XAdapterSession.load(folder, variant="onnx-fp32", num_threads=1)
    session = XAdapterSession.load(folder, num_threads=1, check="never")
    with pytest.raises(
        BundleError, match=r"^the graph's outputs contain NaN or infinity: logits of onnx-fp32; copy"
    ):
        session.fill_mask(BANANA)


@pytest.mark.usefixtures("int8_first")
def test_the_command_says_what_was_checked(copied: Path) -> None:
    def call(*options: str) -> Any:
        return CliRunner().invoke(run, [str(copied), BANANA, "--experts", "v", "--json", *options])

    said = json.loads(call().stdout)
    assert said["processor"] == str(read_machine())
    assert said["variant_reason"] == "first"
    assert [(c["variant"], c["passed"], c["case"]) for c in said["checks"]] == [
        ("cpu-int8", True, "single_typical")
    ]
    break_weight(copied, "cpu-int8", "v", "adapter_v")
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as outside of these tests: printed, no error
        result = call()
    assert result.stderr.startswith("Warning: a variant computes wrong outputs on this processor: cpu-int8, ")
    assert len(result.stderr.splitlines()) == 1
    assert [c["passed"] for c in json.loads(result.stdout)["checks"]] == [False, True]
    assert json.loads(result.stdout)["replies"][0]["variant"] == "cpu-fp32"
    assert json.loads(call("--check", "never").stdout)["checks"] == []
    assert call("--variant", "cpu-int8").exit_code == 1
    assert call("--check", "sometimes").exit_code == 2
