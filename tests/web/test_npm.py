"""The npm package and transformers.js in Node, compared with Python."""

import json
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.web.build import install_packages
from tests import ROOT
from tests.documents import code_blocks
from xadapter_export import XAdapterSession, export
from xadapter_export.errors import MissingExtraError
from xadapter_export.model.builtin import builtin_folder

pytestmark = pytest.mark.slow  # minutes: `make test-slow`

SETS = ("vt", "v", "t", "none")


def questions() -> list[str]:
    """10 sentences about objects that the plug-in never saw, and one with two masks."""
    lines = (builtin_folder() / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line)["sentences"][0] for line in lines]
    return [*asked[::5][:10], "The color of a banana is [MASK] and that of a frog is [MASK]."]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in Node into which the packed package and what it needs are installed."""
    if shutil.which("node") is None:
        pytest.skip("Node.js is not installed")
    try:  # the page's packages have onnxruntime-web
        folders = [
            install_packages(ROOT / "build/npm" / name, lock_from=source)
            for name, source in (("package", ROOT / "export/npm"), ("web", ROOT / "export/web"))
        ]
    except MissingExtraError as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("npm")
    shutil.copytree(ROOT / "export/npm", root / "export/npm")
    (root / "export/web").mkdir()
    for name in ("export/web/xadapter.js", "LICENSE"):
        shutil.copyfile(ROOT / name, root / name)
    npm = shutil.which("npm")
    assert npm is not None  # it installed the packages
    pack, install = code_blocks("integrations.md", "console")[0].splitlines()
    assert pack == "npm pack ./export/npm"
    subprocess.run([npm, *pack.split()[1:]], cwd=root, capture_output=True, check=True)
    (packed,) = root.glob("*.tgz")
    assert f"./{packed.name} onnxruntime-node" in install
    modules = root / "project/node_modules"
    modules.mkdir(parents=True)
    packages = {package.name: package for folder in reversed(folders) for package in folder.iterdir()}
    for name, package in packages.items():
        (modules / name).symlink_to(package)
    with tarfile.open(packed) as archive:
        archive.extractall(root / "packed", filter="data")
    shutil.move(root / "packed/package", modules / "xadapter")
    return root / "project"


def run_js(project: Path, code: str, *arguments: str | Path) -> Any:
    """Run a module in the project, with ``argv`` for its arguments, and return the JSON that it prints."""
    (project / "program.mjs").write_text("const argv = process.argv.slice(2);\n" + code, encoding="utf-8")
    done = subprocess.run(
        ["node", "program.mjs", *arguments], cwd=project, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


ANSWER = """
const session = await load(argv[0]);
const results = {};
for (const experts of JSON.parse(argv[2])) {
  results[experts] = [];
  for (const text of JSON.parse(argv[1])) results[experts].push(await session.answer(text, { experts }));
}
console.log(JSON.stringify(results));
"""


def check_answers(results: dict[str, list[dict[str, Any]]], session: XAdapterSession) -> None:
    """Compare what JavaScript answered with the session, expert set by expert set."""
    for experts, found in results.items():
        for result, wanted in zip(found, session.fill_mask(questions(), experts=experts), strict=True):
            answers = [answer for mask in result["answers"] for answer in mask]
            assert [answer["word"] for answer in answers] == [answer.token for answer in wanted]
            scores = [answer.score for answer in wanted]
            assert [answer["score"] for answer in answers] == pytest.approx(scores, abs=1e-4)
        if session.retrieves(experts):
            for result, pictures in zip(found, session.retrieve(questions(), experts=experts), strict=True):
                assert [p["caption"] for p in result["pictures"]] == [p.caption for p in pictures]


def test_the_package_has_what_it_names(project: Path) -> None:
    packed = project / "node_modules/xadapter"
    assert {path.name for path in packed.iterdir()} == {
        *("package.json", "README.md", "LICENSE"),
        *("xadapter.js", "node.js", "browser.js", "index.d.ts"),
    }
    assert (packed / "xadapter.js").read_bytes() == (ROOT / "export/web/xadapter.js").read_bytes()
    version = json.loads((packed / "package.json").read_text())["version"]
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_node_answers_as_the_session(project: Path, builtin_export: Any) -> None:
    code = 'import { load } from "xadapter";' + ANSWER
    texts, sets = json.dumps(questions()), json.dumps(SETS)
    results = run_js(project, code, builtin_export.folder, texts, sets)
    assert list(results) == list(SETS)
    check_answers(results, XAdapterSession.load(builtin_export.folder, variant="onnx-fp32"))


@pytest.fixture
def address(builtin_export: Any) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_args: object) -> None:
            pass

    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=str(builtin_export.folder))
    ) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_browsers_half_answers_as_the_session(project: Path, address: str, builtin_export: Any) -> None:
    code = 'import { load } from "./node_modules/xadapter/browser.js";' + ANSWER
    results = run_js(project, code, address, json.dumps(questions()), '["v"]')
    check_answers(results, XAdapterSession.load(builtin_export.folder, variant="onnx-fp32"))


def test_what_is_no_bundle_is_one_clear_line(project: Path, address: str) -> None:
    code = """
    import { load, XAdapterError } from "xadapter";
    import { load as loadFrom } from "./node_modules/xadapter/browser.js";
    const errors = [];
    for (const loading of [load("nowhere"), loadFrom(argv[0])]) {
      await loading.catch((error) => errors.push(`${error instanceof XAdapterError}: ${error.message}`));
    }
    console.log(JSON.stringify(errors));
    """
    assert run_js(project, code, f"{address}/nowhere") == [
        "true: nowhere is not a whole bundle: manifest.json cannot be read (ENOENT)",
        f"true: {address}/nowhere/ is not a whole bundle: manifest.json is missing (404)",
    ]


TYPED = """
import { load, XAdapterSession, type Result } from "xadapter";

const session: XAdapterSession = await load("bundle", { variant: "cpu-int8" });
const result: Result = await session.answer("a [MASK]", { experts: "v", topK: 3, candidates: ["red"] });
const best: { word: string; score: number } = result.answers[0][0];
console.log(best.word, result.pictures[0].caption, session.expertSets.length, session.pictures[0].id);
"""


def test_the_types_fit_and_find_mistakes(project: Path) -> None:
    def problems(code: str) -> str:
        (project / "program.mts").write_text(code, encoding="utf-8")
        options = ("--noEmit", "--strict", "--target", "es2022", "--module", "nodenext", "--types", "node")
        compiler = project / "node_modules/typescript/bin/tsc"
        done = subprocess.run(
            ["node", compiler, *options, "program.mts"],
            cwd=project,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout

    assert problems(TYPED) == ""
    for right, wrong in (("topK: 3", 'topK: "3"'), ('"a [MASK]"', "5"), (".caption", ".title")):
        assert "error TS2" in problems(TYPED.replace(right, wrong)), wrong


@pytest.mark.parametrize("task", ["feature-extraction", "fill-mask"])
def test_a_bundle_without_experts_loads_in_transformers_js(project: Path, tmp_path: Path, task: str) -> None:
    export("builtin", tmp_path / "embeddings", "none", task=task)
    session = XAdapterSession.load(tmp_path / "embeddings", variant="onnx-fp32")
    start = """
    import { env, pipeline, AutoModelForMaskedLM, AutoTokenizer, Tensor } from "@huggingface/transformers";
    env.localModelPath = argv[0];
    env.allowRemoteModels = false;
    """
    texts = questions()[:10]
    if task == "feature-extraction":
        code = """
        const embed = await pipeline("feature-extraction", "embeddings");
        const found = await embed(JSON.parse(argv[1]), { pooling: "mean", normalize: true });
        console.log(JSON.stringify(found.tolist()));
        """
        found = run_js(project, start + code, tmp_path, json.dumps(texts))
        np.testing.assert_allclose(found, session.embed(texts), rtol=1e-4, atol=1e-5)
        shutil.copytree(tmp_path / "embeddings", project / "embeddings")
        guide = code_blocks("integrations.md", "js")[1].replace(
            "vectors.dims)", "JSON.stringify(vectors.dims))"
        )
        assert run_js(project, guide) == [1, session.manifest.plm.hidden_size]
        return
    code = """
    const tokenizer = await AutoTokenizer.from_pretrained("embeddings");
    const model = await AutoModelForMaskedLM.from_pretrained("embeddings");
    const words = [];
    for (const text of JSON.parse(argv[1])) {
      const inputs = tokenizer(text);
      const mask = inputs.input_ids.tolist()[0].findIndex((id) => Number(id) === tokenizer.mask_token_id);
      const mask_positions = new Tensor("int64", [BigInt(mask)], [1, 1]);
      const { logits } = await model({ ...inputs, mask_positions });
      const row = Array.from(logits.data);
      words.push(row.indexOf(Math.max(...row)));
    }
    console.log(JSON.stringify(words));
    """
    found = run_js(project, start + code, tmp_path, json.dumps(texts))
    assert found == [answers[0].token_id for answers in session.fill_mask(texts, top_k=1)]
