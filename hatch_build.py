"""The build of wheels: FUNCATTN_WHEEL=native adds the operators of funcattn/native, compiled.

Without it the wheel is pure, and what is built needs hatchling alone.
"""

import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeOperators(BuildHookInterface):
    """Compiles the library into a platform wheel, for any Python 3."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the library and its platform to the wheel."""
        if os.environ.get("FUNCATTN_WHEEL") != "native":
            return
        sys.path.insert(0, self.root)
        from funcattn.native import building

        self.folder = Path(tempfile.mkdtemp())
        library = self.folder / building.PACKAGED.name
        building.compile_to(building.found_compiler(), library, "-s")
        platform = sysconfig.get_platform().replace("-", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["force_include"][str(library)] = f"funcattn/native/{library.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the compiled library."""
        shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)
