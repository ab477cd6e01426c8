"""The maker of the target ``single-file``."""

from collections.abc import Iterator

import onnx_ir as ir

from xadapter_export.exporters.makers.maker import GraphJob, GraphMaker, MadeGraph


class SingleFileMaker(GraphMaker):
    """Writes the portable graph as one file, with its weights inside."""

    def tries(self, job: GraphJob) -> Iterator[MadeGraph]:
        """Yield the graph, or both where it is split."""
        job.say("weights inside")
        scratch = job.empty_scratch()
        files = {}
        for part, graph in job.material.graphs.items():
            files[part] = scratch / f"{job.stems[part]}.onnx"
            ir.save(ir.external_data.load_to_model(graph.clone()), files[part])
        yield MadeGraph(files=files)
