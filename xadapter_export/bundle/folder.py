"""A bundle on disk, read so that every file is verified.

Reading trusts no path in the manifest: a file must lie inside the folder, symbolic links included, and be the
one that was recorded. The one exception is the Hub's cache, where each file of a snapshot is a link to a blob
of the same repository. Writing is in ``staging``.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Unpack

from xadapter_export.bundle.hub import HubRepo, PushOptions, push_files
from xadapter_export.bundle.manifest import FileEntry, Manifest
from xadapter_export.bundle.small_files import read_text
from xadapter_export.errors import (
    BundleError,
    HashMismatchError,
)

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
CLIP_TOKENIZER_NAME = "clip_tokenizer.json"
BANK_NAME = "bank.jsonl"
FEATURES_NAME = "bank.safetensors"
PROJECTIONS_NAME = "bank_projections.safetensors"
REFERENCE_NAME = "reference.npz"
PROVEN_BANK_NAME = "reference_bank.npz"
SWAPPED_NAME = "reference_swapped.npz"
PARITY_NAME = "parity.json"
SIGNATURE_NAME = "model.sig"  # made after the manifest, which does not list it


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Return size and hash of every file under a folder, by relative path with slashes.

    The manifest is not among them, nor the signature.
    """
    others = {folder / MANIFEST_NAME, folder / SIGNATURE_NAME}
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path not in others)
    return {
        path.relative_to(folder).as_posix(): FileEntry(
            size_bytes=path.stat().st_size, sha256=sha256_file(path)
        )
        for path in paths
    }


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest was read.

    Attributes:
        folder: Its folder; of a bundle on the Hub, the folder of its snapshot in the cache.
        manifest: Its manifest.
        repo: Where its files are downloaded from when they are needed; None if it is complete.
    """

    folder: Path
    manifest: Manifest
    repo: HubRepo | None = None

    @property
    def name(self) -> str:
        """What it is called: ``org/name`` on the Hub, or the name of its folder."""
        return self.folder.name if self.repo is None else self.repo.name

    def file(self, relative: str) -> Path:
        """Return the path of a file of the bundle, downloaded if need be.

        Raises:
            BundleError: If it is missing, or leads out of the folder through a symbolic link.
            HubError: If it cannot be downloaded.
        """
        self.fetch((relative,))
        return inside(self.folder, relative, "bundle")

    def fetch(self, names: Collection[str]) -> None:
        """Download those of the files that are not here yet; nothing to do for a bundle in a folder.

        Raises:
            HubError: If one cannot be downloaded.
        """
        if self.repo is not None:
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                self.repo.fetch([escape(name) for name in missing])

    def push_to_hub(self, repo: str, **options: Unpack[PushOptions]) -> str:
        """Upload the bundle to the Hugging Face Hub, as one commit that replaces what was there.

        Args:
            repo: ``org/name``; made if it is not there.
            options: ``private``, ``revision``, ``message``; see ``bundle.hub.PushOptions``.

        Returns:
            The address of the commit.

        Raises:
            HubError: If anything goes wrong; then nothing was committed.
        """
        files = [MANIFEST_NAME, *self.manifest.files]
        if (self.folder / SIGNATURE_NAME).is_file():
            files.append(SIGNATURE_NAME)
        return push_files(self.folder, files, repo, **options)


def inside(folder: Path, relative: str, kind: str) -> Path:
    """Return the path of a file of a folder, which is a ``kind``.

    Raises:
        BundleError: If it is missing, or leads out of the folder through a symbolic link.
    """
    path = folder / relative
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        raise BundleError(f"a file of the {kind} cannot be read", where=path, got=error) from error
    if not real.is_relative_to(root) and not _is_blob_of(real, root):
        raise BundleError(
            f"a file of the {kind} is outside its folder",
            where=path,
            got=real,
            hint=f"copy the {kind} so that links become files (cp -rL)",
        )
    if not path.is_file():
        raise BundleError(f"a file of the {kind} is missing", where=path, hint="copy the whole folder")
    return path


def _is_blob_of(file: Path, snapshot: Path) -> bool:
    """Whether a file, with no link left in its path, is among the blobs of a snapshot in the Hub's cache.

    The cache is ``models--org--name/snapshots/COMMIT`` and ``models--org--name/blobs``.
    """
    repo = snapshot.parent.parent
    return (
        snapshot.parent.name == "snapshots"
        and repo.name.startswith("models--")
        and file.parent == repo / "blobs"
    )


def read_bundle(
    source: Path | str, *, revision: str | None = None, verify: bool = True, on_demand: bool = False
) -> Bundle:
    """Read a bundle's manifest and check its files.

    Args:
        source: Its folder, or the name of a repository on the Hub, ``org/name``.
        revision: Branch, tag or commit on the Hub; ``main`` if None.
        verify: Whether to compare every file's hash. Presence, place and size are always checked, and that
            no file which is read later goes unlisted.
        on_demand: Whether a file of a bundle on the Hub is downloaded when it is needed; else all of them
            are downloaded now.

    Raises:
        BundleError: If there is no bundle, its manifest is wrong, or a file is missing, cut short or not
            listed.
        HashMismatchError: If a file is not the one that was recorded.
        ConfigError: If there is a revision, and the bundle is a folder.
        HubError: If it cannot be downloaded.
    """
    repo = HubRepo.find(source, revision)
    folder = Path(source) if repo is None else repo.fetch_first(MANIFEST_NAME)
    bundle = Bundle(folder, _read_manifest(folder), None if repo is None else repo.at_commit(folder))
    unlisted = sorted(_files_to_list(bundle) - set(bundle.manifest.files))
    if unlisted:
        raise BundleError(
            "the bundle has a file that its manifest does not list, so its hash cannot be checked",
            where=folder / unlisted[0],
            hint="copy or export the bundle again",
        )
    names = set(bundle.manifest.files)
    if repo is not None and on_demand:
        names = {name for name in names if (folder / name).exists()}  # what was downloaded before
    bundle.fetch(names)
    for name in sorted(names):
        path, wanted = bundle.file(name), bundle.manifest.files[name].size_bytes
        size = path.stat().st_size
        if size != wanted:
            raise BundleError(
                "a file of the bundle has the wrong size",
                where=path,
                expected=f"{wanted} bytes",
                got=size,
                hint=_get_again(bundle),
            )
    if verify:
        verify_files(bundle, bundle.manifest.files)
    return bundle


def _read_manifest(folder: Path) -> Manifest:
    manifest_file = folder / MANIFEST_NAME
    if not manifest_file.is_file():
        raise BundleError(
            "this is not a bundle",
            where=folder,
            expected=f"a folder with {MANIFEST_NAME}",
            got="no such folder" if not folder.is_dir() else "a folder without one",
            hint="make one with: xad-export --experts t -o bundle",
        )
    text = read_text(manifest_file, "the manifest")
    return Manifest.from_json(text, where=str(manifest_file))


def _get_again(bundle: Bundle) -> str:
    """Return what helps where a file is damaged; in the Hub's cache it would be taken for good for ever."""
    if bundle.repo is None:
        return "copy or export the bundle again"
    return f"delete {bundle.folder.parent.parent}, and load the bundle again"


def verify_files(bundle: Bundle, names: Iterable[str]) -> None:
    """Compare the hashes of some files of a bundle with those in its manifest.

    Raises:
        HashMismatchError: If a file is not the one that was recorded.
    """
    for name in names:
        path, entry = bundle.file(name), bundle.manifest.files[name]
        if (found := sha256_file(path)) != entry.sha256:
            raise HashMismatchError(
                "a file of the bundle has changed",
                where=path,
                expected=f"SHA-256 {entry.sha256}",
                got=found,
                hint=_get_again(bundle),
            )


@contextmanager
def verifying(bundle: Bundle, names: Iterable[str]) -> Iterator[None]:
    """Compare hashes as ``verify_files`` does while the body opens the files, which takes as long.

    What the body opened counts only where this ends without an error. Where both fail, the error is that of
    the hashes, which explains the other.

    Raises:
        HashMismatchError: If a file is not the one that was recorded.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        verified = pool.submit(verify_files, bundle, names)
        try:
            yield
        finally:
            verified.result()


def companions(manifest: Manifest) -> set[str]:
    """Return the files that go with every graph: tokenizers, and the pictures where a set names them."""
    names = {TOKENIZER_NAME}
    if manifest.clip is not None:
        names.add(CLIP_TOKENIZER_NAME)
    if any(tensor.name == "retrieved" for spec in manifest.expert_sets.values() for tensor in spec.outputs):
        names.add(BANK_NAME)
    return names


def unlisted_files(bundle: Bundle) -> list[str]:
    """Return every file in a bundle's folder that its manifest does not list, links to folders too.

    The manifest and the signature are not among them.
    """
    listed = {MANIFEST_NAME, SIGNATURE_NAME, *bundle.manifest.files}
    paths = (path for path in bundle.folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted({path.relative_to(bundle.folder).as_posix() for path in paths} - listed)


def _files_to_list(bundle: Bundle) -> set[str]:
    """Return every file that is read later: what the manifest calls for, and the proof if it is there."""
    manifest = bundle.manifest
    names = companions(manifest) | {path for variant in manifest.variants for path in variant.all_files}
    if manifest.bank is not None and manifest.bank.features is not None:
        names.add(manifest.bank.features)
    optional = (PROJECTIONS_NAME, REFERENCE_NAME, PROVEN_BANK_NAME, SWAPPED_NAME, PARITY_NAME)
    return names | {name for name in optional if (bundle.folder / name).exists()}
