"""Repositories on the Hugging Face Hub: what is downloaded from them, and what is uploaded.

Downloads go into the Hub's own cache, and what is there is not downloaded again. huggingface_hub does the
work: it reads ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME`` and ``HF_HUB_OFFLINE``, retries and resumes.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final, Self, TypedDict, Unpack

from xadapter_export.errors import ConfigError, HubError

_REPO_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_AGAIN: Final = "run it again: files that arrived are not downloaded twice"


class PushOptions(TypedDict, total=False):
    """How something is uploaded to the Hub.

    Attributes:
        private: Whether a repository that is made is private; the account's default if None.
        revision: Branch to commit to, made if it is not there; ``main`` if None.
        message: The commit's message.
    """

    private: bool | None
    revision: str | None
    message: str | None


@dataclass(frozen=True)
class HubRepo:
    """A repository, at one revision.

    Attributes:
        name: ``org/name``.
        revision: Branch, tag or commit; ``main`` if None.
    """

    name: str
    revision: str | None = None

    @classmethod
    def find(cls, source: Path | str, revision: str | None = None) -> Self | None:
        """Return the repository that a source names; None if it is a folder.

        A string of the form ``org/name`` is a repository, unless there is such a folder. A ``Path`` is
        always a folder.

        Raises:
            ConfigError: If it is a folder, and there is a revision.
        """
        if isinstance(source, Path) or not _REPO_ID.fullmatch(source) or Path(source).exists():
            if revision is not None:
                raise ConfigError("a revision is for repositories on the Hub", where=source, got=revision)
            return None
        return cls(source, revision)

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    def at_commit(self, snapshot: Path) -> Self:
        """Return the same repository at the commit of a snapshot: later downloads belong to the first."""
        return replace(self, revision=snapshot.name)

    def fetch_first(self, file: str) -> Path:
        """Download one file, and return the folder of the snapshot that it belongs to.

        Args:
            file: Its path in the repository: the one that shows what kind of repository this is.

        Raises:
            HubError: If it cannot be had.
        """
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(self.name, file, revision=self.revision))
        except Exception as error:  # the client raises many kinds, with no common base below Exception
            raise self._explain(error, file) from error
        return path.parents[len(PurePosixPath(file).parts) - 1]

    def has(self, file: str) -> bool:
        """Whether there is such a file; it is downloaded. False also if there is no Hub and no such cache.

        Raises:
            HubError: If it cannot be told: the repository is gated, or there is no such revision.
        """
        from huggingface_hub.errors import EntryNotFoundError

        try:
            self.fetch_first(file)
        except HubError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                return False
            raise
        return True

    def fetch(self, patterns: Collection[str]) -> Path:
        """Download files that are not in the cache, and return the folder of the snapshot.

        Args:
            patterns: Their paths in the repository, or patterns of these, as ``*.json``.

        Raises:
            HubError: If one cannot be had.
        """
        from huggingface_hub import snapshot_download

        wanted = list(patterns)
        try:
            return Path(snapshot_download(self.name, revision=self.revision, allow_patterns=wanted))
        except Exception as error:  # as above
            raise self._explain(error, ", ".join(wanted)) from error

    def _explain(self, error: Exception, what: str) -> HubError:
        """Return the one line that says what went wrong, for whichever error of the client."""
        from huggingface_hub import errors
        from huggingface_hub.constants import HF_HUB_OFFLINE

        log_in = "log in with: hf auth login"
        if isinstance(error, errors.GatedRepoError):
            return HubError(
                "the Hub repository is gated", where=self, hint=f"ask for access on its page, then {log_in}"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return HubError(
                "there is neither a folder nor a Hub repository of this name, or it is private",
                where=self,
                hint=f"check the name; for a private repository, {log_in}",
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return HubError("the Hub repository has no such revision", where=self)
        if isinstance(error, errors.LocalEntryNotFoundError):
            why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the Hub cannot be reached"
            return HubError(
                f"{why}, and the cache does not have all of the repository",
                where=self,
                expected=what,
                hint="check the name, or download it once with a connection",
            )
        if isinstance(error, errors.EntryNotFoundError):
            return HubError("the Hub repository lacks a file", where=self, expected=what)
        return HubError("the download from the Hub failed", where=self, got=_first_line(error), hint=_AGAIN)


def push_files(folder: Path, files: Collection[str], repo: str, **options: Unpack[PushOptions]) -> str:
    """Upload files of a folder as one commit, which removes what else was in the repository.

    Args:
        folder: The folder.
        files: Their paths in it.
        repo: ``org/name``; made if it is not there.
        options: How; ``PushOptions`` lists them.

    Returns:
        The address of the commit.

    Raises:
        HubError: If anything goes wrong; then nothing was committed.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

    api, revision = HfApi(library_name="xadapter-export"), options.get("revision")
    try:
        api.create_repo(repo, private=options.get("private"), exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(repo, revision=revision)) - {".gitattributes"}
        commit = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(name, folder / name) for name in sorted(files)),
                *(CommitOperationDelete(name) for name in sorted(there - set(files))),
            ],
            commit_message=options.get("message") or "Upload with xadapter-export",
            revision=revision,
        )
    except Exception as error:  # the client raises many kinds, with no common base below Exception
        refused = isinstance(error, errors.HfHubHTTPError) and error.response.status_code in {401, 403}
        raise HubError(
            "the upload to the Hub was refused" if refused else "the upload to the Hub failed",
            where=repo,
            got=_first_line(error),
            hint="log in with: hf auth login, as somebody who may write there"
            if refused
            else "run it again: files that arrived are not sent twice",
        ) from error
    return commit.commit_url


def _first_line(error: Exception) -> str:
    """Return what the client says, without its links and advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
