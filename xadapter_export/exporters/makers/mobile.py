"""Files for phones: ``.ort``, onnxruntime's own format, and the list of operators that it needs.

Source:
    onnxruntime 1.32, ``tools/convert_onnx_models_to_ort.py``. It folds constants, which writes the tied table
    of the MLM head twice, once transposed; ours does not, and keeps onnxruntime from it.
"""

import logging
import warnings
from pathlib import Path

import numpy as np

from xadapter_export.bundle.folder import Bundle
from xadapter_export.errors import ParityError, UnsupportedError
from xadapter_export.exporters.makers.maker import Deployed, Deployer, DeployJob
from xadapter_export.parity.compare import TOLERANCES, Place, compare
from xadapter_export.parity.reference import read_reference, reference_feeds
from xadapter_export.sessions.onnx_session import open_onnx
from xadapter_export.targets import CPU_PROVIDER

# onnxruntime-android (Maven), onnxruntime-objc and onnxruntime-c (CocoaPods) are full builds: "all types and
# operators, for ONNX format models" (Maven's description). They have the operators of these domains that the
# CPU provider has; com.microsoft are onnxruntime's own. The reduced onnxruntime-mobile ended with 1.18.
STOCK_DOMAINS = ("ai.onnx", "com.microsoft")
# Measured with the built-in checkpoint on x86: 1.20.1, 1.22.1 and 1.23.2 load the files; 1.18.1 has no kernel
# for ArgMax of integers.
FIRST_READER = "1.20"
# Constants would be folded into a second, transposed copy of a tied table; blocked layouts fit one CPU only.
_DISABLED = ("ConstantFolding", "NchwcTransformer", "SkipLayerNormFusion")


class MobileMaker(Deployer):
    """Writes and proves ``mobile/<graph>.ort``, with its ``.required_operators.config``."""

    def deploy(self, job: DeployJob) -> Deployed:
        """Write them; an ``.ort`` file takes any length.

        Raises:
            UnsupportedError: If the graph needs operators that the stock packages do not have.
            ParityError: If the file does not say what the graph says.
        """
        variant = job.variant
        job.say(f"{self.target.name}, {variant.expert_set}, {variant.precision}")
        source = job.folder / variant.file
        file = job.folder / self.target.name / f"{source.stem}.ort"
        operators_file = file.with_suffix(".required_operators.config")
        file.parent.mkdir(exist_ok=True)
        _convert(source, file)
        operators = _write_operators(file, operators_file)
        strangers = sorted(name for name in operators if name.rpartition(":")[0] not in STOCK_DOMAINS)
        if strangers:
            raise UnsupportedError(
                f"experts {variant.expert_set}, {variant.name}: the stock mobile packages of onnxruntime do "
                f"not have {', '.join(strangers)}; choose --precision fp32"
            )
        difference = _prove(job, file)
        return Deployed(
            files=tuple(path.relative_to(job.folder).as_posix() for path in (file, operators_file)),
            facts={
                "packages": "onnxruntime-android, onnxruntime-objc, onnxruntime-c",
                "reads": f"onnxruntime {FIRST_READER} and later",
                "operators": str(len(operators)),
                "largest difference from the graph": f"{difference:.1e}",
            },
        )


def _convert(source: Path, target: Path) -> None:
    """Has onnxruntime save the graph in its own format, weights inside, optimized for any CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(str(source), options, providers=[CPU_PROVIDER], disabled_optimizers=list(_DISABLED))


def _write_operators(model: Path, file: Path) -> set[str]:
    """Writes the operators of an ``.ort`` file as onnxruntime's reduced builds read them.

    Returns:
        Each as ``domain:name``.
    """
    from onnxruntime.tools.ort_format_model import create_config_from_models

    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the tool leaves the closing of the model to Python
        create_config_from_models([model], file, enable_type_reduction=False)
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    # The tool's own header has the path of this machine.
    file.write_text(f"# Operators of {model.name}\n" + "\n".join(lines) + "\n", encoding="utf-8")
    operators: set[str] = set()
    for line in lines:
        domain, _, names = line.split(";", 2)
        operators |= {f"{domain}:{name}" for name in names.split(",")}
    return operators


def _prove(job: DeployJob, target: Path) -> float:
    """Compares file and graph on the inputs of the proof, and returns the largest difference.

    The operators' kernels are found when the file is opened: onnxruntime refuses it where one is missing.

    Raises:
        ParityError: If an output differs by more than fp32's tolerance; of a lossy graph, if a top answer
            differs.
    """
    import onnxruntime as ort

    variant, reference = job.variant, read_reference(Bundle(job.folder, job.manifest))
    graph = open_onnx(job.folder / variant.file)
    phone = ort.InferenceSession(str(target), providers=[CPU_PROVIDER])
    names = [value.name for value in graph.get_outputs()]
    largest = 0.0
    for case, feed in reference_feeds(reference, job.manifest.expert_sets[variant.expert_set]).items():
        for name, got, wanted in zip(names, phone.run(names, feed), graph.run(names, feed), strict=True):
            if wanted.dtype.kind == "i":
                agrees = variant.precision != "fp32" or np.array_equal(got, wanted)
            else:
                place = Place(variant.expert_set, "mobile", case, name)
                cell = compare(got, wanted, TOLERANCES["fp32"], place)
                largest = max(largest, cell.max_abs or 0.0)
                agrees = cell.passed if variant.precision == "fp32" else cell.argmax_agreement in (1.0, None)
                agrees = agrees and cell.problem is None
            if not agrees:
                raise ParityError(
                    f"experts {variant.expert_set}, {variant.name}: the .ort file does not say what the "
                    f"graph says in {case}, {name}"
                )
    return largest
