"""What the package adds to xadapter-export: a target, a task and a layer, and beside them a PLM family.

The library reads these entries to list them, and where a bundle runs, so nothing here imports PyTorch. Each
names the class that does the work, which is imported when it is needed.
"""

from xadapter_export.layers import LayerKind
from xadapter_export.targets import CPU_PROVIDER, ONNXRUNTIME, Target
from xadapter_export.tasks.text_classification import TextClassification

SINGLE_FILE = Target(
    name="single-file",
    says="one .onnx file with its weights inside",
    maker="xadapter_example.target:SingleFileMaker",
    precisions=("fp32",),
    opener="xadapter_export.sessions.onnx_session:open_onnx",
    runtime=ONNXRUNTIME,
    provider=CPU_PROVIDER,
)


class MeanClassification(TextClassification):
    """Text classification whose head reads the mean of all tokens; the answers look the same."""

    name = "mean-classification"
    says = "which label or value a text has, from the mean of its tokens"
    reads = "all"
    torch_half = "xadapter_example.task:MeanHead"


MEAN_CLASSIFICATION = MeanClassification()

GATED = LayerKind(
    name="gated",
    says="each token asks for itself, and decides how much it takes",
    torch_half="xadapter_example.layer:GatedLayer",
)
