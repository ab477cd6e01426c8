"""Builds an index of a bank, block by block, and measures what its search misses.

Dimensions: N pictures, D CLIP embedding size, Q queries.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from xadapter_export.bank.convert import RECALL_AT, noisy_queries
from xadapter_export.bank.nearest import Nearest, recall
from xadapter_export.bank.reader import BankReader
from xadapter_export.bank.record import package_versions
from xadapter_export.bundle.bank_rows import BankRows, Float32
from xadapter_export.bundle.folder import list_files
from xadapter_export.bundle.manifest import BankSpec
from xadapter_export.bundle.staging import staged_folder
from xadapter_export.errors import ConfigError, import_extra
from xadapter_export.runtime.picture_index import (
    BANK_KEY,
    FAISS_NAME,
    INDEX_RECORD_NAME,
    LANCE_NAME,
    ROW_COLUMN,
    TABLE_NAME,
    VECTOR_COLUMN,
    IndexKind,
    IndexRecord,
    import_lancedb,
    open_index,
    read_index_record,
)
from xadapter_export.sessions.retrieval import Retriever

Say = Callable[[str], None]

_SUBVECTOR = 8  # numbers that become one byte
_FEWEST_TRAINED = 256  # rows: as many as a byte has values
_ROWS_A_LIST = 39  # fewer do not tell where its middle is (faiss' own limit)
_TRAINED_A_LIST = 40  # rows drawn for each list to find its middle
_ROUNDS = 10  # of k-means; the middles of lists need not be exact
_SEED = 0
_CANDIDATES: Final = 256
_PROBES: Final = 32
_QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class IndexOptions:
    """How an index is made and searched; it matters where rows are in lists: ivf-pq, and a large lancedb.

    Attributes:
        num_lists: Lists that the rows are divided into; 4 sqrt(N) if None.
        num_probes: Lists that a search looks into; 32 if None.
        candidates: Rows that a search proposes; 256 if None. The nearest by their exact cosines are taken.
        num_queries: On how many queries, rows with noise, the recall is measured.
    """

    num_lists: int | None = None
    num_probes: int | None = None
    candidates: int | None = None
    num_queries: int = 200


def build_index(
    bank: Path,
    output: Path,
    kind: IndexKind,
    options: IndexOptions | None = None,
    *,
    force: bool = False,
    say: Say = lambda _: None,
) -> IndexRecord:
    """Make an index.

    Args:
        bank: A bank's folder, or a checkpoint's or a bundle's with the bank in it.
        output: Folder of the index.
        kind: ``flat``, every row as it is; ``ivf-pq``, rows in lists and in D / 8 bytes each, by faiss both;
            ``lancedb``, a database, in lists where there are rows enough.
        options: How it is made.
        force: Replace an index that is there.
        say: Called as each part of the work begins.

    Returns:
        What was made, with its recall.

    Raises:
        CheckpointError: If the bank cannot be read.
        ConfigError: If the bank is too small for the index, or an option makes no sense.
        MissingExtraError: If faiss or LanceDB is not installed.
        OutputExistsError: If something is at ``output``.
        OutputWriteError: If it cannot be written.
    """
    options = options or IndexOptions()
    stored = (reader := BankReader(bank)).stored
    lists = _plan_lists(stored, kind, options)
    library = import_lancedb() if kind == "lancedb" else import_extra("faiss", "faiss")
    with staged_folder(output, force=force, marker=INDEX_RECORD_NAME) as staged:
        say("hash")
        sha256 = reader.sha256()
        probes = None if lists is None else min(options.num_probes or _PROBES, lists)
        if kind == "lancedb":
            _build_lancedb(library, stored, staged.path, sha256, lists, say)
        else:
            _build_faiss(library, stored, staged / FAISS_NAME, lists, probes, say)
        record = IndexRecord(
            kind=kind,
            bank_sha256=sha256,
            num_pictures=stored.num_pictures,
            dim=stored.dim,
            num_lists=lists,
            num_probes=probes,
            candidates=1 if lists is None else (options.candidates or _CANDIDATES),
            files=list_files(staged.path),
            created_with=package_versions(("xadapter-export", "faiss-cpu", "lancedb")),
        )
        _write_record(staged.path, record)
        if options.num_queries:
            say(f"recall of {options.num_queries} queries")
            found = measure_index_recall(staged.path, reader, options.num_queries)
            record = record.model_copy(update={"recall": found})
            _write_record(staged.path, record)
    return record


def _write_record(folder: Path, record: IndexRecord) -> None:
    (folder / INDEX_RECORD_NAME).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def measure_index_recall(folder: Path, reader: BankReader, num_queries: int) -> dict[str, float]:
    """Return which share of the k nearest rows an index finds, by k.

    Args:
        folder: The index.
        reader: The bank.
        num_queries: How many rows are asked for, noise added to each.
    """
    stored = reader.stored
    ks = [k for k in RECALL_AT if k <= stored.num_pictures]
    spec = BankSpec(
        num_pictures=stored.num_pictures,
        dim=stored.dim,
        sha256=read_index_record(folder).bank_sha256,
        retrieval="topk",
        k=ks[-1],
    )
    queries = noisy_queries(reader, num_queries)
    exact, indexed = Retriever(spec, stored, None), Retriever(spec, stored, open_index(folder, verify=False))
    right, got = (_find(retriever, queries) for retriever in (exact, indexed))
    return {str(k): recall(right, got, k) for k in ks}


def _find(retriever: Retriever, queries: Float32) -> Nearest:
    found = [
        retriever.find(queries[start : start + _QUERIES_AT_ONCE])
        for start in range(0, len(queries), _QUERIES_AT_ONCE)
    ]
    return Nearest(np.concatenate([f.rows for f in found]), np.concatenate([f.scores for f in found]))


def _plan_lists(stored: BankRows, kind: IndexKind, options: IndexOptions) -> int | None:
    """Return into how many lists the rows go; None where they are all looked at.

    Raises:
        ConfigError: If there are too few rows, or an option is below 1.
    """
    n = stored.num_pictures
    for name in ("num_lists", "num_probes", "candidates"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1", got=value)
    if kind == "flat" or (kind == "lancedb" and n < _ROWS_A_LIST * _FEWEST_TRAINED and not options.num_lists):
        for name in ("num_lists", "num_probes", "candidates"):
            if getattr(options, name) is not None:
                raise ConfigError(
                    f"{name} goes with an index that has lists, and this one would look at every row",
                    where=kind,
                    got=getattr(options, name),
                    hint=f"leave it out, or {'choose ivf-pq' if kind == 'flat' else 'give num_lists too'}",
                )
        return None
    if n < _FEWEST_TRAINED:
        raise ConfigError(
            f"the bank is too small for an index of kind {kind}",
            expected=f"{_FEWEST_TRAINED} images or more",
            got=n,
            hint="use --kind flat, which is exact",
        )
    most = n // _ROWS_A_LIST
    if options.num_lists is not None and options.num_lists > most:
        raise ConfigError("too many lists for the bank", expected=f"at most {most}", got=options.num_lists)
    return options.num_lists or max(1, min(round(4 * n**0.5), most))


def _num_subvectors(dim: int) -> int:
    """Return how many bytes a row becomes: the most of D / 8 or fewer that divide D."""
    return max(m for m in range(1, max(1, dim // _SUBVECTOR) + 1) if dim % m == 0)


def _build_faiss(
    faiss: Any, stored: BankRows, path: Path, lists: int | None, probes: int | None, say: Say
) -> None:
    dim = stored.dim
    if lists is None:
        index = faiss.IndexFlatIP(dim)
    else:
        index = faiss.IndexIVFPQ(
            faiss.IndexFlatIP(dim), dim, lists, _num_subvectors(dim), 8, faiss.METRIC_INNER_PRODUCT
        )
        index.nprobe = probes
        index.cp.niter = _ROUNDS
        for settings in (index.cp, index.pq.cp):  # how few are enough was decided above
            settings.min_points_per_centroid, settings.seed = 1, _SEED
        count = min(stored.num_pictures, max(_TRAINED_A_LIST * lists, _FEWEST_TRAINED * _TRAINED_A_LIST))
        say(f"train {lists} lists on {count} rows")
        rng = np.random.default_rng(_SEED)
        drawn = np.sort(rng.choice(stored.num_pictures, count, replace=False))
        index.train(stored.take(drawn))
    for start, block in stored.unit_blocks():
        if start % (len(block) * 64) == 0:
            say(f"add row {start} of {stored.num_pictures}")
        index.add(block)
    say("write")
    faiss.write_index(index, str(path))


def _build_lancedb(
    lancedb: Any, stored: BankRows, folder: Path, sha256: str, lists: int | None, say: Say
) -> None:
    import pyarrow as pa  # lancedb brings it

    vectors = pa.list_(pa.float32(), stored.dim)
    fields = [pa.field(ROW_COLUMN, pa.int64()), pa.field(VECTOR_COLUMN, vectors)]
    schema = pa.schema(fields, metadata={BANK_KEY: sha256.encode()})

    def batches() -> Iterator[Any]:
        for start, block in stored.unit_blocks():
            rows = pa.array(np.arange(start, start + len(block)))
            columns = [rows, pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), stored.dim)]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)

    say(f"write {stored.num_pictures} rows")
    database = lancedb.connect(str(folder / LANCE_NAME))
    table = database.create_table(TABLE_NAME, data=batches(), schema=schema)
    if lists is not None:
        say(f"index {lists} lists")
        config = lancedb.index.IvfPq(
            distance_type="dot",
            num_partitions=lists,
            num_sub_vectors=_num_subvectors(stored.dim),
            max_iterations=_ROUNDS,
            sample_rate=_TRAINED_A_LIST,
        )
        table.create_index(VECTOR_COLUMN, config=config)
