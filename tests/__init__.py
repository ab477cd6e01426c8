"""Tests: a folder for each room of the library, and for what stands beside it; helpers stand here."""

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
"""The checkout."""
