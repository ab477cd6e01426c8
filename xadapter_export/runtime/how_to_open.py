"""How a session opens a bundle: everything that ``XAdapterSession.load`` takes by keyword."""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from xadapter_export.bundle.folder import Bundle, verifying
from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.errors import ConfigError
from xadapter_export.runtime.load_check import CHECK_WHEN, CheckWhen
from xadapter_export.runtime.split import CACHE_SIZE
from xadapter_export.sessions.retrieval import PictureIndex
from xadapter_export.sessions.session import Provider


class SessionOptions(TypedDict, total=False):
    """The keywords of ``XAdapterSession.load`` for a type checker; ``HowToOpen`` says what each does."""

    experts: ExpertSet | None
    variant: str
    providers: Sequence[Provider] | None
    num_threads: int | None
    batch_size: int
    share_weights: bool
    index: PictureIndex | Path | str | None
    cache_size: int
    cache_dir: Path | str | None
    verify: bool
    verify_key: Path | str | None
    allow_fallback: bool
    check: CheckWhen
    revision: str | None


@dataclass(frozen=True, kw_only=True)
class HowToOpen:
    """How a session opens a bundle.

    Attributes:
        experts: The expert set that answers; the bundle's default if None.
        variant: Which of the set's graphs answers: ``auto``, by rule the fastest on this kind of CPU
            (``runtime.choose``); ``fastest``, which opens what ``auto`` could take, times it on one text
            and keeps the result in ``cache_dir``, in about 2 s; a whole name, ``onnx-fp32``,
            ``cpu-int8``, ``openvino-int8``; a precision, ``fp32`` or ``int8``, the fastest here that has
            it; or engines, ``tensorrt-rtx-fp16``, for the GPU of this machine. Another expert set of
            the session gets the same, or where it lacks it what ``auto`` gives.
        providers: onnxruntime execution providers in order of preference; the CPU if None. One that does
            not start is an error, never a silent fallback.
        num_threads: Threads inside one operator; the engine's choice if None: onnxruntime's is one for
            each core.
        batch_size: How many texts of a list go through the graph together at most. Texts of about the
            same length do, and the answers come back in the order of the list.
        share_weights: Whether sessions of this process that ask for the same graph, providers and number
            of threads share one loaded copy, its weights and its threads, which takes the memory of one.
            False gives this session a copy and threads of its own.
        index: Where the bank is searched outside the graph (``--retrieval external``): what
            ``xad-bank index`` wrote, an index of faiss, or any object with ``search(queries, k)``; see
            ``PictureIndex``. None for an exact search of the bundle's own bank, which reads all of it.
        cache_size: Of how many texts a bundle whose graphs are split (``--split``, ``--retrieval
            external``) keeps what CLIP said and what was retrieved, so that a text that comes again runs
            the answer graph alone; 0 for none. A text takes some ten KiB, a long one with the T-expert
            a few hundred.
        cache_dir: A folder, which nobody else may write to, where OpenVINO keeps the graphs that it
            compiled, a few MB each: the next load takes a third of the time; and where what
            ``variant="fastest"`` measured is kept. None for nothing written.
        verify: Whether to compare every file that is used with its hash first.
        verify_key: PEM file with the public key, or the trusted certificates, that the bundle must be signed
            with; then every file is downloaded, and compared with what was signed, before any is opened. See
            ``bundle.signature.verify_signature``. None for no such check.
        allow_fallback: Whether the CPU may answer, with a warning, where a provider does not start, or
            an engine cannot be run: with the same variant, or where that is for a GPU with what ``auto``
            gives.
        check: When a graph that is opened is asked one case that the bundle carries: ``once`` in this
            process for the same files, ``always``, or ``never``. One that gives something else on this
            processor is refused with a warning, and the next best answers; see
            ``XAdapterSession.checks``. Engines are not asked.
        revision: Branch, tag or commit of a bundle on the Hub; ``main`` if None.

    Raises:
        ConfigError: If ``num_threads`` or ``batch_size`` is below 1, ``cache_size`` is below 0, or there is
            no such value of ``check``.
    """

    experts: ExpertSet | None = None
    variant: str = "auto"
    providers: Sequence[Provider] | None = None
    num_threads: int | None = None
    batch_size: int = 32
    share_weights: bool = True
    index: PictureIndex | Path | str | None = None
    cache_size: int = CACHE_SIZE
    cache_dir: Path | str | None = None
    verify: bool = True
    verify_key: Path | str | None = None
    allow_fallback: bool = False
    check: CheckWhen = "once"
    revision: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("cache_size", 0), ("num_threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}", got=value)
        if self.check not in CHECK_WHEN:
            raise ConfigError("unknown value for check", expected=", ".join(CHECK_WHEN), got=self.check)

    @property
    def cache_folder(self) -> Path | None:
        """``cache_dir`` as a path."""
        return None if self.cache_dir is None else Path(self.cache_dir)

    def verifying(self, bundle: Bundle, names: Collection[str]) -> AbstractContextManager[None]:
        """Download files, and compare their hashes while the body opens them, where that was asked for.

        Raises:
            HubError: If one cannot be downloaded.
        """
        bundle.fetch(names)
        return verifying(bundle, names) if self.verify else nullcontext()
