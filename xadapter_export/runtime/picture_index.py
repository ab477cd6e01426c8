"""Indices on disk: what ``xad-bank index`` writes, opened and searched.

An index is a folder with ``index.json``, which says of which bank it is, and what faiss or LanceDB wrote.

Dimensions: N pictures, D CLIP embedding size, Q queries, C candidates.
"""

import os
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from xadapter_export.bundle.bank_rows import Float32, Int64
from xadapter_export.bundle.folder import inside, sha256_file
from xadapter_export.bundle.manifest import FileEntry, InnerPath, Sha256, Size
from xadapter_export.bundle.small_files import read_model
from xadapter_export.errors import BundleError, HashMismatchError, XAdapterError, import_extra
from xadapter_export.sessions.retrieval import PictureIndex

IndexKind = Literal["flat", "ivf-pq", "lancedb"]
KINDS: Final[tuple[IndexKind, ...]] = ("flat", "ivf-pq", "lancedb")
INDEX_RECORD_NAME: Final = "index.json"
FAISS_NAME: Final = "bank.faiss"
LANCE_NAME: Final = "bank.lancedb"  # a database; its table is TABLE_NAME
TABLE_NAME: Final = "pictures"
ROW_COLUMN, VECTOR_COLUMN = "row", "vector"
BANK_KEY: Final = b"bank_sha256"  # of the metadata of a table's schema


class IndexRecord(BaseModel):
    """The contents of ``index.json``.

    Attributes:
        bank_sha256: Hash of the bank that it is an index of, as the bundle's manifest has it.
        num_lists: Lists that the rows are divided into; None where every row is looked at.
        num_probes: Lists that a search looks into.
        candidates: Rows that are proposed at least; the nearest of them by their exact cosines are taken.
        recall: Share of the k nearest rows that are found, by k, as it was measured.
        files: Size and hash of every file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    kind: IndexKind
    bank_sha256: Sha256
    num_pictures: Size
    dim: Size
    num_lists: Size | None = None
    num_probes: Size | None = None
    candidates: Size = 1
    recall: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    files: dict[InnerPath, FileEntry]
    created_with: dict[str, str] = {}

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.size_bytes for entry in self.files.values())


class FaissIndex:
    """An index of faiss that proposes more rows than are wanted.

    Args:
        index: The index of faiss.
        record: What is known of it.
    """

    returns_features = False

    def __init__(self, index: Any, record: IndexRecord) -> None:  # faiss has no types
        self.index = index
        self.d, self.ntotal, self.bank_sha256 = index.d, index.ntotal, record.bank_sha256
        self.candidates = record.candidates

    def search(self, queries: Float32, k: int) -> tuple[Float32, Int64]:
        """Return scores and rows, ``(Q, C)`` each; see ``PictureIndex``."""
        scores, rows = self.index.search(queries, min(max(k, self.candidates), self.ntotal))
        return scores, rows


class LanceIndex:
    """A table of LanceDB with the columns ``row`` and ``vector``, whose rows have length 1.

    Args:
        table: The table, of a local database or of one elsewhere.
        bank_sha256: Hash of the bank that it holds; what the table says of it if None.
        num_probes: Lists that a search looks into; LanceDB's choice if None.
        candidates: Rows that are proposed at least; their cosines are exact.
    """

    returns_features = True

    def __init__(
        self,
        table: Any,  # lancedb's Table, which the base install does not have
        bank_sha256: str | None = None,
        *,
        num_probes: int | None = None,
        candidates: int = 1,
    ) -> None:
        self.table = table
        said = (table.schema.metadata or {}).get(BANK_KEY)
        self.bank_sha256 = said.decode() if bank_sha256 is None and said is not None else bank_sha256
        self.ntotal = table.count_rows()
        self.d = table.schema.field(VECTOR_COLUMN).type.list_size
        self._num_probes, self.candidates = num_probes, candidates

    def search(self, queries: Float32, k: int) -> tuple[Float32, Int64, Float32]:
        """Return scores and rows, ``(Q, C)`` each, and features ``(Q, C, D)``; see ``PictureIndex``."""
        count = min(max(k, self.candidates), self.ntotal)
        scores = np.full((len(queries), count), -np.inf, np.float32)
        rows = np.full((len(queries), count), -1, np.int64)  # the lists that are looked into may hold fewer
        features = np.zeros((len(queries), count, self.d), np.float32)
        for q, query in enumerate(queries):
            found = self._search_one(query, count)
            size = len(found[0])
            scores[q, :size], rows[q, :size], features[q, :size] = found
        return scores, rows, features

    def _search_one(self, query: Float32, count: int) -> tuple[Float32, Int64, Float32]:
        search = self.table.search(query, vector_column_name=VECTOR_COLUMN).distance_type("dot").limit(count)
        if self._num_probes is not None:
            search = search.nprobes(self._num_probes)
        table = search.select([ROW_COLUMN, VECTOR_COLUMN, "_distance"]).to_arrow()
        vectors = table[VECTOR_COLUMN].combine_chunks()
        features = np.asarray(vectors.flatten(), np.float32).reshape(-1, self.d)
        rows = table[ROW_COLUMN].to_numpy().astype(np.int64)
        return 1 - table["_distance"].to_numpy().astype(np.float32), rows, features


def import_lancedb() -> ModuleType:
    """Import LanceDB, which writes to stderr what it thinks of its own k-means unless it is told not to.

    Raises:
        MissingExtraError: If it is not installed.
    """
    os.environ.setdefault("LANCEDB_LOG", "error")
    return import_extra("lancedb", "lancedb")


def read_index_record(folder: Path) -> IndexRecord:
    """Read ``index.json``.

    Raises:
        BundleError: If there is none, or it is wrong.
    """
    path = folder / INDEX_RECORD_NAME
    if not path.exists():
        raise BundleError(
            "this is not an index",
            where=folder,
            expected=f"a folder with {INDEX_RECORD_NAME}",
            hint="make one with: xad-bank index BUNDLE -o INDEX",
        )
    return read_model(path, IndexRecord, "the index's record")


def open_index(folder: Path | str, *, verify: bool = True) -> PictureIndex:
    """Open an index that ``xad-bank index`` wrote.

    Args:
        folder: Its folder.
        verify: Whether to compare every file with its hash.

    Raises:
        BundleError: If there is none, it cannot be read, or a file is missing, cut short, not listed or
            outside of the folder.
        HashMismatchError: If a file is not the one that was recorded.
        MissingExtraError: If faiss or LanceDB is not installed.
    """
    folder = Path(folder)
    record = read_index_record(folder)
    database = [path for path in (folder / LANCE_NAME).rglob("*") if path.is_symlink() or not path.is_dir()]
    read = {FAISS_NAME} if record.kind != "lancedb" else {p.relative_to(folder).as_posix() for p in database}
    if unlisted := sorted(read - record.files.keys()):
        raise BundleError(
            "the index has a file that its record does not list, so its hash cannot be checked",
            where=folder / unlisted[0],
            hint="make it again",
        )
    for name, entry in record.files.items():
        path = inside(folder, name, "index")
        if path.stat().st_size != entry.size_bytes:
            raise BundleError("a file of the index is truncated", where=path, hint="make it again")
        if verify and sha256_file(path) != entry.sha256:
            raise HashMismatchError("a file of the index has changed", where=path, hint="make it again")
    try:
        if record.kind == "lancedb":
            lancedb = import_lancedb()
            table = lancedb.connect(str(folder / LANCE_NAME)).open_table(TABLE_NAME)
            return LanceIndex(
                table, record.bank_sha256, num_probes=record.num_probes, candidates=record.candidates
            )
        faiss = import_extra("faiss", "faiss")
        # Mapped: of lists on disk only those are read that a search looks into.
        flags = faiss.IO_FLAG_MMAP if record.num_lists is not None else faiss.IO_FLAG_MMAP_IFC
        return FaissIndex(faiss.read_index(str(folder / FAISS_NAME), flags), record)
    except XAdapterError:
        raise
    except Exception as error:  # neither library has a base of its errors
        raise BundleError("the index cannot be read", where=folder, got=error) from error
