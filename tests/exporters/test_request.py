"""What precisions, targets and variants stand for, and what the options alone rule out."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
from click.testing import CliRunner, Result

from tests.repository.test_imports import HEAVY
from tests.tiny_checkpoint import make_model
from xadapter_export import export
from xadapter_export.cli.export import export as export_command
from xadapter_export.errors import ConfigError
from xadapter_export.exporters.request import (
    ExportOptions,
    ExportRequest,
    WantedVariants,
    wanted_variants,
)
from xadapter_export.targets import all_variants


def names(request: WantedVariants) -> tuple[str, str]:
    """The graphs and the deployments, as one reads them."""
    graphs, deployments = map(sorted, (request.graphs, request.deployments))
    return " ".join(map("-".join, graphs)), " ".join(map("-".join, deployments))


@pytest.mark.parametrize(
    ("precisions", "targets", "graphs", "deployments"),
    [
        ("", "", "onnx-fp32", ""),
        ("", "cpu onnx", "cpu-fp32 onnx-fp32", ""),
        ("int8", "", "cpu-int8", ""),
        ("fp32 int8", "", "cpu-int8 onnx-fp32", ""),
        ("", "openvino", "openvino-fp32", ""),
        ("int8 int8", "openvino cpu", "cpu-int8 openvino-int8", ""),
        ("fp16", "onnx", "onnx-fp16", ""),
        ("fp32 fp16", "cuda", "cuda-fp16 cuda-fp32", ""),
        # int8 goes where it is fastest; Q/DQ only where nobody else takes it.
        ("fp32 int8", "onnx cpu", "cpu-fp32 cpu-int8 onnx-fp32", ""),
        ("int8", "onnx cpu", "cpu-int8", ""),
        ("int8", "onnx", "onnx-int8", ""),
        ("fp32 int8", "onnx cuda", "cuda-fp32 onnx-fp32 onnx-int8", ""),
        ("fp32 int8", "onnx openvino", "onnx-fp32 openvino-fp32 openvino-int8", ""),
        ("fp32 int8", "onnx mobile", "cpu-int8 onnx-fp32", "mobile-fp32 mobile-int8"),
        # Each precision for those of the targets that take it.
        ("int8 fp16", "cpu tensorrt-rtx", "cpu-int8 onnx-fp16", "tensorrt-rtx-fp16"),
        ("int8", "cpu tensorrt", "cpu-int8 onnx-int8", "tensorrt-int8"),
        ("fp16 int8", "tensorrt", "onnx-fp16 onnx-int8", "tensorrt-fp16 tensorrt-int8"),
        ("fp16 int8", "triton", "cpu-int8 onnx-fp16", "triton-fp16 triton-int8"),
        ("", "triton mobile", "onnx-fp32", "mobile-fp32 triton-fp32"),
    ],
)
def test_the_shorthand_adds_nothing_that_nobody_asked_for(
    precisions: str, targets: str, graphs: str, deployments: str
) -> None:
    request = wanted_variants((), precisions.split(), targets.split())  # type: ignore[arg-type]  # such names
    assert names(request) == (graphs, deployments)
    backwards = wanted_variants((), precisions.split()[::-1], targets.split()[::-1])  # type: ignore[arg-type]  # same
    assert names(backwards) == (graphs, deployments)


def test_variants_are_exactly_these_and_the_shorthand_adds_to_them() -> None:
    exact = wanted_variants(["cpu-int8", "tensorrt-rtx-fp16", "cpu-int8"])
    assert exact.graphs == (("cpu", "int8"), ("onnx", "fp16"))
    assert exact.deployments == (("tensorrt-rtx", "fp16"),)
    assert names(wanted_variants(["onnx-int8"], ["fp32", "int8"], ["onnx", "cpu"])) == (
        "cpu-fp32 cpu-int8 onnx-fp32 onnx-int8",
        "",
    )
    assert names(wanted_variants(["cpu-int8"], ["fp32"])) == ("cpu-int8 onnx-fp32", "")
    assert names(wanted_variants(["cpu-int8"], (), ["triton"])) == ("cpu-int8 onnx-fp32", "triton-fp32")
    for name in all_variants():
        target, _, precision = name.rpartition("-")
        request = wanted_variants([name])
        assert len(request.graphs) == 1
        asked = request.deployments or request.graphs
        assert asked == ((target, precision),)


@pytest.mark.parametrize(
    ("precisions", "targets", "message"),
    [
        (
            "fp16",
            "cpu",
            r"fp16 is not available for target cpu \(expected one of onnx, cuda, .*\); add --target",
        ),
        ("int4", "onnx", r"precision int4 is not available for target onnx .*; add --target cpu"),
        ("fp32 fp16", "openvino", "precision fp16 is not available for target openvino"),
        ("fp16", "onnx openvino", r"target openvino does not take precision fp16 \(expected one of fp32"),
        ("fp16", "mobile triton", r"target mobile does not take precision fp16 .*; add --precision fp32"),
        ("fp16 int4", "tensorrt-rtx", "precision int4 is not available for target tensorrt-rtx"),
    ],
)
def test_a_precision_or_target_without_the_other_is_refused(
    precisions: str, targets: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        wanted_variants((), precisions.split(), targets.split())  # type: ignore[arg-type]  # such names


def test_unknown_names_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown variant: cpu-int9 \(expected one of onnx-fp32, .*triton-"
    ):
        wanted_variants(["cpu-int8", "cpu-int9"])
    with pytest.raises(ConfigError, match="unknown precision: bf16"):
        wanted_variants((), ["bf16"])  # type: ignore[list-item]  # the point
    with pytest.raises(ConfigError, match="unknown target: tpu"):
        wanted_variants((), (), ["tpu"])


def test_options_that_do_not_go_together() -> None:
    int8 = ["cpu-int8", "onnx-int8"]
    assert ExportRequest(split=True).is_split
    assert ExportRequest(variants=int8, min_agreement=0.0, skip_failed=True).wanted.is_lossy
    with pytest.raises(ConfigError, match=r"none was requested \(got min_agreement, skip_failed\); remove"):
        ExportRequest(min_agreement=0.0, skip_failed=True)
    with pytest.raises(ConfigError, match=r"cannot be made from split graphs \(.*got onnx-int8\)"):
        ExportRequest(variants=int8, split=True)
    with pytest.raises(
        ConfigError, match=r"deployments cannot be made from split graphs \(got triton-fp32\)"
    ):
        ExportRequest(variants=["triton-fp32"], retrieval="external")


def test_gates_out_of_range() -> None:
    ExportRequest(precisions=["int8"], min_agreement=0.97, max_points_lost=2)
    with pytest.raises(ConfigError, match=r"min_agreement is out of range .*0 to 1, got 97"):
        ExportRequest(precisions=["int8"], min_agreement=97)
    with pytest.raises(ConfigError, match="max_points_lost is out of range"):
        ExportRequest(precisions=["int8"], max_points_lost=float("nan"))


def test_what_export_takes_by_keyword_is_what_a_request_holds() -> None:
    typed = get_type_hints(ExportOptions)
    held = get_type_hints(ExportRequest)
    assert {"experts": held["experts"], **typed} == {
        field.name: held[field.name] for field in fields(ExportRequest)
    }
    flags = {param.name for param in export_command.params}
    assert flags - set(typed) == {
        "checkpoint",
        "experts",
        "output",
        "ranges",
        "quiet",
        "as_json",
        "debug",
        "config",
    }
    assert set(typed) - flags == {"profile"}  # read from --profile's ranges


# Command line


def call(*arguments: object) -> Result:
    return CliRunner().invoke(export_command, [*map(str, arguments), "--quiet"])


def test_an_unknown_variant_is_one_usage_error_that_lists_the_names(tmp_path: Path) -> None:
    result = call("-o", tmp_path / "bundle", "--variant", "cpu-int9")
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert "'cpu-int9' is not one of" in line
    assert all(f"'{name}'" in line for name in all_variants())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--precision fp16 --target cpu", "precision fp16 is not available for target cpu"),
        ("--min-agreement 0.9", "none was requested (got min_agreement)"),
        ("--target tensorrt --max-points-lost 1", "(got max_points_lost)"),
        ("--calibration FILE --evaluate FILE", "(got calibration, evaluate)"),
        ("--variant cpu-fp32 --skip-failed", "(got skip_failed)"),
        ("--variant openvino-int8 --split", "cannot be made from split graphs"),
        ("--variant triton-fp32 --retrieval external", "deployments cannot be made from split graphs"),
    ],
)
def test_what_the_options_alone_rule_out_needs_no_pytorch(tmp_path: Path, flags: str, message: str) -> None:
    arguments = [str(tmp_path / "texts.txt") if flag == "FILE" else flag for flag in flags.split()]
    (tmp_path / "texts.txt").write_text("one\ntwo\n", encoding="utf-8")
    code = f"""
import sys
for name in {(*HEAVY, "onnx_ir", "onnxruntime")}:
    sys.modules[name] = None
from xadapter_export.cli.export import export
export({["no-such-checkpoint", "-o", str(tmp_path / "bundle"), *arguments]})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert message in line


def test_exact_variants_and_no_others_from_flags_a_file_or_python(tmp_path: Path) -> None:
    make_model(tmp_path / "parts").save_pretrained(tmp_path / "checkpoint", self_contained=True)
    open_gates = ["--min-agreement", 0, "--experts", "none"]  # of a model with random weights
    flags = ["--variant", "onnx-int8", "--variant", "triton-fp16", *open_gates]
    made = [call(tmp_path / "checkpoint", "-o", tmp_path / "flags", *flags)]
    config = tmp_path / "export.toml"
    config.write_text('variant = ["onnx-int8", "triton-fp16"]\n', encoding="utf-8")
    made.append(
        call(tmp_path / "checkpoint", "-o", tmp_path / "file", "--config", config, *open_gates, "--json")
    )
    assert [result.exit_code for result in made] == [0, 0], made[0].output + made[1].output
    found = export(
        tmp_path / "checkpoint",
        tmp_path / "python",
        "none",
        variants=["onnx-int8", "triton-fp16"],
        min_agreement=0,
    ).manifest
    assert [variant.name for variant in found.variants] == ["onnx-int8", "onnx-fp16"]
    assert [(made.target, made.source) for made in found.deployments] == [("triton", "onnx-fp16")]
    there = [
        {path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")}
        for name in ("flags", "file", "python")
    ]
    assert there[0] == there[1] == there[2]
    config.write_text('variant = ["cpu-int9"]\n', encoding="utf-8")
    refused = call("-o", tmp_path / "wrong", "--config", config)
    assert (refused.exit_code, "'cpu-int9' is not one of" in refused.stderr) == (2, True)
