"""What can be said of CUDA without a GPU: what is missing, the CPU in its place, options, bound outputs."""

import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tests.cli.test_cli import call
from xadapter_export import XAdapterSession
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.errors import ProviderError
from xadapter_export.parity.reference import read_reference, reference_feeds
from xadapter_export.sessions.cuda import BoundSession, exact_options, find_missing
from xadapter_export.sessions.open import open_variant
from xadapter_export.targets import CUDA_PROVIDER

without_cuda = pytest.mark.skipif(
    CUDA_PROVIDER in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA"
)
TEXT = "a cherry is [MASK]"


def test_tf32_is_off_unless_it_was_asked_for() -> None:
    assert exact_options(CUDA_PROVIDER) == (CUDA_PROVIDER, {"use_tf32": "0"})
    assert exact_options((CUDA_PROVIDER, {"device_id": "1"})) == (
        CUDA_PROVIDER,
        {"use_tf32": "0", "device_id": "1"},
    )
    assert exact_options((CUDA_PROVIDER, {"use_tf32": "1"})) == (CUDA_PROVIDER, {"use_tf32": "1"})
    assert exact_options("CPUExecutionProvider") == "CPUExecutionProvider"


@without_cuda
def test_what_is_missing_is_named() -> None:
    assert any("onnxruntime_providers" in library for library in find_missing(onnxruntime))


@without_cuda
def test_the_cpu_answers_only_where_it_was_allowed_to(tiny: Path) -> None:
    with pytest.raises(ProviderError, match="CUDAExecutionProvider is not in this onnxruntime"):
        XAdapterSession.load(tiny, providers=[CUDA_PROVIDER])
    with pytest.warns(UserWarning, match="CUDAExecutionProvider is not in .*; using the CPU instead"):
        session = XAdapterSession.load(tiny, experts="v", providers=[CUDA_PROVIDER], allow_fallback=True)
    assert session.fill_mask(TEXT)[0].token == "red"


@without_cuda
def test_a_part_of_a_provider_name_is_answered_with_the_whole_one(tiny: Path) -> None:
    with pytest.raises(ProviderError) as caught:
        XAdapterSession.load(tiny, providers=["CUDA"])
    available = ", ".join(onnxruntime.get_available_providers())
    assert str(caught.value) == (
        "there is no execution provider of this name: CUDA; did you mean CUDAExecutionProvider? "
        f"available here: {available}"
    )


def test_nothing_falls_back_where_nothing_fails(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = "set_default_logger_severity"  # the app's, which the CPU has no need to touch
    monkeypatch.setattr(onnxruntime, log, lambda _: pytest.fail("the log was set"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        XAdapterSession.load(tiny, providers=["CPUExecutionProvider"], allow_fallback=True)


@without_cuda
@pytest.mark.filterwarnings("default:.*using the CPU instead")  # it is shown, as the command shows it
def test_the_command_falls_back_with_a_warning_when_told_to(tiny: Path) -> None:
    refused = call("run", tiny, TEXT, "--experts", "v", "--provider", CUDA_PROVIDER)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: the execution provider CUDAExecutionProvider is not in")
    assert len(refused.stderr.splitlines()) == 1
    allowed = call("run", tiny, TEXT, "--experts", "v", "--provider", CUDA_PROVIDER, "--allow-fallback")
    assert allowed.exit_code == 0
    assert allowed.stderr.startswith("Warning: ")
    assert "red" in allowed.stdout


def test_bound_outputs_are_those_of_a_plain_run_and_only_those_asked_for(tiny: Path) -> None:
    bundle = read_bundle(tiny)
    plain = open_variant(bundle, bundle.manifest.variant("vt"))
    bound = BoundSession(plain)
    reference = read_reference(bundle)
    names = [value.name for value in plain.get_outputs()]
    assert len(names) > 1
    for feed in reference_feeds(reference, bundle.manifest.expert_sets["vt"]).values():
        for asked in (None, names[-1:]):
            for got, expected in zip(bound.run(asked, feed), plain.run(asked, feed), strict=True):
                np.testing.assert_array_equal(got, expected)
    assert bound.get_providers() == plain.get_providers()


def test_a_provider_that_fails_while_it_runs_does_not_become_the_cpu_unseen(tiny: Path) -> None:
    bundle = read_bundle(tiny)
    session = open_variant(bundle, bundle.manifest.variant("vt"))
    assert isinstance(session, onnxruntime.InferenceSession)
    assert not session._enable_fallback
