"""Everything is in pyproject.toml; this only writes the type stubs before the files are gathered."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))

from weft.stubs import write_stubs

write_stubs()
setup()
