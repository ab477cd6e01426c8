"""A server for the page, with the headers that let WebAssembly use threads."""

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from xadapter_export.errors import ConfigError


class _PageHandler(SimpleHTTPRequestHandler):
    extensions_map = {  # noqa: RUF012  # as in the base class
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
        ".webp": "image/webp",
    }
    protocol_version = "HTTP/1.1"
    isolated = True

    def end_headers(self) -> None:
        if self.isolated:  # a page that is isolated from other origins may use threads
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-cache")  # ask whether it changed; answers are then 304
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class's name
        """Log nothing."""


class _PlainHandler(_PageHandler):
    isolated = False


class _PageServer(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that closed its connection."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def make_server(folder: Path, port: int = 0, *, isolated: bool = True) -> ThreadingHTTPServer:
    """Return a server of a folder on this machine only; ``serve_forever`` runs it.

    Args:
        folder: What it serves.
        port: TCP port; a free one if 0.
        isolated: Whether to send the headers that threads need.

    Raises:
        ConfigError: If the port cannot be had.
    """
    handler = _PageHandler if isolated else _PlainHandler
    try:
        return _PageServer(("127.0.0.1", port), partial(handler, directory=str(folder)))
    except OSError as error:
        raise ConfigError(
            "the page cannot be served on this port",
            where=port,
            got=error.strerror,
            hint="choose another with --port (make web PORT=8001), or a free one with --port 0",
        ) from error
