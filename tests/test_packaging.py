"""What ``pip install lorafx`` brings: the library and what it runs on, nothing for plots, notebooks, tools or docs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
CORE = {"torch", "triton", "transformers", "peft", "safetensors"}
TOP_LEVEL = {"lorafx", "lorafx_cli"}  # packages called passes and kernels would meet other people's


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer reads TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def test_the_core_requires_no_more_than_it_runs_on(project: dict[str, Any]) -> None:
    assert names(project["project"]["dependencies"]) == CORE
    for extra, requirements in project["project"]["optional-dependencies"].items():
        assert not names(requirements) & CORE, f"the extra {extra!r} asks again for what the core has"


def test_exact_versions_of_what_the_core_and_the_docs_require(project: dict[str, Any]) -> None:
    pinned = names([line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line])
    assert pinned >= CORE
    assert pinned >= names(project["project"]["optional-dependencies"]["docs"])


def test_what_goes_into_the_wheel(project: dict[str, Any]) -> None:
    packages = project["tool"]["setuptools"]["packages"]
    assert {"lorafx", "lorafx.passes", "lorafx.kernels"} <= set(packages)
    assert {package.partition(".")[0] for package in packages} <= TOP_LEVEL
    data = project["tool"]["setuptools"]["package-data"]
    assert data["lorafx"] == ["py.typed"]
    assert data["lorafx.kernels"] == ["*.cpp"]


def test_importing_lorafx_needs_no_package_of_an_extra(project: dict[str, Any]) -> None:
    """Seen in a Python of its own, in which these can't be imported."""
    extras = project["project"]["optional-dependencies"]
    asked = set().union(*map(names, extras.values())) - {"lorafx"} - CORE
    modules = {name.replace("-", "_") for name in asked} | {"mkdocs", "IPython", "jupyter_client", "material"}
    needed = {"tqdm", "psutil", "setuptools"}  # transformers, PEFT and torch ask for these themselves
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(modules - needed)!r})); import lorafx; lorafx.compile"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
