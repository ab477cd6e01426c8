"""Graphs that are loaded in this process: sessions that ask for the same one share it.

onnxruntime packs the weights of every session anew into memory of that session, and its Python interface
offers no way to share the packed ones; without packing the mapped file is shared, but every run is slower by
a third or more. One loaded graph may answer any number of threads, so that is what is shared.
"""

import os
import threading
from collections.abc import Callable
from weakref import WeakValueDictionary

from xadapter_export.bundle.folder import Bundle, verify_files
from xadapter_export.bundle.manifest import Deployment, Variant
from xadapter_export.sessions.open import open_variant
from xadapter_export.sessions.session import OnnxSession, Opening
from xadapter_export.sessions.tensorrt_session import engine_file_for, find_gpu, open_engine

_loaded: WeakValueDictionary[tuple[object, ...], OnnxSession] = WeakValueDictionary()
_lock = threading.Lock()


def open_shared(bundle: Bundle, variant: Variant, how: Opening) -> OnnxSession:
    """Open a variant as ``open_variant`` does, or return it if this process has it open already.

    It is the same one where the files, the providers and the number of threads are the same, and it goes when
    nobody holds it any more. A file that was replaced or written anew is another file.

    A variant of two graphs is opened by ``open_split``, each of them by this.

    Raises:
        As ``open_variant``.
    """
    files = identify(bundle, variant.file, *variant.weight_files)
    key = (variant.target, files, repr(list(how.providers or [])), how.num_threads)
    return _share(key, lambda: open_variant(bundle, variant, how))


def open_shared_engine(bundle: Bundle, made: Deployment, *, verify: bool) -> OnnxSession:
    """Open the engine of a deployment for the GPU of this machine, or return it if this process has it open.

    Its hash is compared before it is read: an engine is a program for the GPU.

    Args:
        bundle: The bundle.
        made: One of its deployments, with engines.
        verify: Whether to compare the hash.

    Raises:
        HashMismatchError: If the file was changed.
        As ``open_engine``, and ``engine_file_for``.
    """
    file = engine_file_for(made, find_gpu())
    if verify:
        verify_files(bundle, (file,))
    key = (made.target, identify(bundle, file))
    return _share(key, lambda: open_engine(bundle.file(file), made.target))


def _share(key: tuple[object, ...], open_it: Callable[[], OnnxSession]) -> OnnxSession:
    key = (os.getpid(), *key)  # a graph that was loaded before a fork has no threads after it
    with _lock:
        session = _loaded.get(key)
        if session is None:
            session = _loaded[key] = open_it()
        return session


def identify(bundle: Bundle, *files: str) -> tuple[tuple[int, ...], ...]:
    """Return what tells these files from any others, and from what was in their places before."""
    stats = [bundle.file(file).stat() for file in files]
    return tuple((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)
