"""In a checkout ``passes/`` and ``kernels/`` stand beside the package, not in it; installed, they are in it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
PARTS = {"lorafx.passes": HERE.parent / "passes", "lorafx.kernels": HERE.parent / "kernels"}


class _Beside:
    """Finds the two parts and nothing else: the checkout's folder on the package's path would make all of it ours."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        folder = PARTS.get(name)
        if folder is None or not (folder / "__init__.py").is_file():
            return None
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


def find_parts() -> None:
    """Let ``import lorafx.passes`` and ``import lorafx.kernels`` work, wherever this package was found."""
    if not (HERE / "passes").is_dir() and _Beside not in sys.meta_path:
        sys.meta_path.append(_Beside)
