"""The files of the page, put together in one folder that any static server can serve."""

import hashlib
import html
import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import metadata
from pathlib import Path

from PIL import Image

from export.web.pictures import BUILTIN_CREDIT, bank_pictures, builtin_pictures, write_sheets
from xadapter_export.bundle.folder import BANK_NAME, MANIFEST_NAME, PARITY_NAME, REFERENCE_NAME, read_bundle
from xadapter_export.bundle.pictures import read_pictures
from xadapter_export.bundle.staging import staged_folder
from xadapter_export.errors import ConfigError, MissingExtraError, UnsupportedError

HERE = Path(__file__).parent
MARKER = "xadapter-page.txt"  # only a folder with it is replaced
PAGE = ("index.html", "style.css", "app.js", "download.js", "show.js", "xadapter.js", "offline.js", "old.js")
# Of npm's packages, what the page loads: the WebAssembly of the processor, that of WebGPU, the tokenizers.
VENDOR = {
    "onnxruntime-web/dist": (
        "ort.wasm.min.mjs",
        "ort-wasm-simd-threaded.mjs",
        "ort-wasm-simd-threaded.wasm",
        "ort.webgpu.min.mjs",
        "ort-wasm-simd-threaded.asyncify.mjs",
        "ort-wasm-simd-threaded.asyncify.wasm",
    ),
    "@huggingface/tokenizers/dist": ("tokenizers.min.mjs",),
}
LICENSES = {
    "onnxruntime-web": ("package.json", "README.md"),
    "@huggingface/tokenizers": ("package.json", "LICENSE"),
}
_PROOF = frozenset((REFERENCE_NAME, PARITY_NAME))  # repeats the proof; the page does not read it


def install_packages(folder: Path, *, lock_from: Path = HERE) -> Path:
    """Install the pinned npm packages into a folder, unless they are there, and return ``node_modules``.

    Args:
        folder: Kept between builds.
        lock_from: Where ``package.json`` and ``package-lock.json`` are.

    Raises:
        MissingExtraError: If npm is not installed or fails.
    """
    names = ("package.json", "package-lock.json")
    wanted = hashlib.sha256(b"".join((lock_from / name).read_bytes() for name in names)).hexdigest()
    marker = folder / "installed"
    installed = folder / "node_modules"
    if marker.is_file() and marker.read_text(encoding="utf-8") == wanted and installed.is_dir():
        return installed
    npm = shutil.which("npm")
    if npm is None:
        raise MissingExtraError("npm is not installed", hint="install Node.js 20 or later, which has it")
    folder.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    for name in names:
        shutil.copyfile(lock_from / name, folder / name)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingExtraError(
            "npm cannot install the page's packages",
            where=folder,
            got=" ".join(done.stderr.split()) or f"exit status {done.returncode}",
            hint="look at the network, and run it again",
        )
    marker.write_text(wanted, encoding="utf-8")
    return installed


def address_of_project() -> str | None:
    """Return the repository that the installed package names; a checkout names none."""
    urls = metadata("xadapter-export").get_all("Project-URL") or []
    return next((url.partition(", ")[2] for url in urls if url.startswith("Repository, ")), None)


def write_page(
    output: Path, bundle: Path, packages: Path, pictures: str = "none", *, project: str | None = None
) -> None:
    """Write page, libraries and bundle into a folder, which is replaced.

    Args:
        output: The folder; what is there must be an earlier page.
        bundle: The bundle that the page loads.
        packages: ``node_modules`` with the libraries.
        pictures: ``builtin`` to draw those of the built-in bank, the folder of a bank with thumbnails, or
            ``none`` for captions alone.
        project: Address of the repository that the page links to; None for no link.

    Raises:
        OutputExistsError: If something that is no page is in the way.
        BundleError: If the bundle is not whole.
        HashMismatchError: If a file of it was changed.
        UnsupportedError: If a set of it is split.
        ConfigError: If the pictures are not those of its bank.
        MissingExtraError: If a library is not installed whole.
    """
    with staged_folder(output, force=True, marker=MARKER) as staged:
        _fill(staged.path, bundle, packages, pictures)
        if project is not None:
            _link(staged.path / "index.html", html.escape(project.rstrip("/")))


def _link(page: Path, project: str) -> None:
    """Link the name of the project in the footer, and its documentation."""
    links = f'<a href="{project}">xadapter-export</a> (<a href="{project}/tree/main/docs">documentation</a>)'
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("Made with xadapter-export", f"Made with {links}"), encoding="utf-8")


def _fill(output: Path, bundle: Path, packages: Path, pictures: str) -> None:
    manifest = read_bundle(bundle).manifest
    if split := [name for name, spec in manifest.expert_sets.items() if spec.split]:
        raise UnsupportedError(
            "the page runs one graph for a text, and an expert set of the bundle is split into two",
            where=bundle,
            got=", ".join(split),
            hint="export it without --split and with --retrieval in-graph",
        )
    if pictures != "none" and manifest.bank is None:
        raise ConfigError("the bundle looks at no pictures", where=bundle, hint="leave out --pictures")
    thumbnails: Mapping[int, Image.Image] = {}
    num_rows = manifest.bank.num_pictures if manifest.bank else 0
    if pictures == "builtin":
        known = read_pictures(bundle / BANK_NAME, num_pictures=num_rows)
        thumbnails = builtin_pictures(Path("build/pictures"), known)
    elif pictures != "none" and manifest.bank:
        thumbnails = bank_pictures(Path(pictures), manifest.bank.sha256)
    (output / MARKER).write_text(
        "python -m export.web wrote this folder, and may replace it.\n", encoding="utf-8"
    )
    for name in PAGE:
        _copy(HERE / name, output / name)
    for folder, names in VENDOR.items():
        for name in names:
            _copy_library(packages / folder / name, output / "vendor" / name)
    for package, names in LICENSES.items():
        for name in names:
            kept = output / "vendor" / "licenses" / package.replace("/", "-") / name
            _copy_library(packages / package / name, kept)
    for name in (MANIFEST_NAME, *(name for name in manifest.files if name not in _PROOF)):
        _copy(bundle / name, output / "bundle" / name)
    credit = BUILTIN_CREDIT if pictures == "builtin" else ""
    write_sheets(output / "pictures", thumbnails, num_rows, credit)
    if pictures == "builtin":
        _copy(HERE / "PICTURES.md", output / "pictures" / "PICTURES.md")
        _copy(HERE.parents[1] / "LICENSE", output / "pictures" / "LICENSE")


def size_bytes(paths: Iterable[Path]) -> int:
    """The bytes of files, and of all files in folders."""
    files = (file for path in paths for file in ([path] if path.is_file() else path.rglob("*")))
    return sum(file.stat().st_size for file in files if file.is_file())


def bundle_bytes(output: Path) -> int:
    """What of the bundle the page downloads in all: every graph with its weights, tokenizers, captions."""
    manifest = json.loads((output / "bundle" / MANIFEST_NAME).read_text(encoding="utf-8"))
    listed = {name for v in manifest["variants"] for name in (v["file"], *v["weight_files"])}
    listed |= {"tokenizer.json", "clip_tokenizer.json", "bank.jsonl", MANIFEST_NAME}
    return size_bytes(path for name in listed if (path := output / "bundle" / name).is_file())


def _copy_library(source: Path, target: Path) -> None:
    if not source.is_file():
        raise MissingExtraError(
            "a file of the page's npm packages is missing",
            where=source,
            hint="remove the folder of the packages, and run it again",
        )
    _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
