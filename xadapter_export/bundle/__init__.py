"""The bundle on disk: its manifest, its files, and the onnxruntime session of one of its graphs."""

from xadapter_export.bundle.folder import Bundle, list_files, read_bundle, sha256_file, staged_folder
from xadapter_export.bundle.manifest import Manifest

__all__ = ["Bundle", "Manifest", "list_files", "read_bundle", "sha256_file", "staged_folder"]
