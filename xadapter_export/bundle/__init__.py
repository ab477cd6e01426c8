"""The bundle on disk: its manifest and its files."""

from xadapter_export.bundle.folder import Bundle, list_files, read_bundle, sha256_file
from xadapter_export.bundle.manifest import Manifest
from xadapter_export.bundle.staging import staged_folder

__all__ = ["Bundle", "Manifest", "list_files", "read_bundle", "sha256_file", "staged_folder"]
