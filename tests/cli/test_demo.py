import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_without_a_checkout_one_line_says_where_to_get_it(tmp_path):
    """As installed: the packages, without the folders beside them."""
    for package in ("lorafx", "lorafx_cli"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("passes", "kernels"))
    for package in ("passes", "kernels"):
        shutil.copytree(ROOT / package, tmp_path / "lorafx" / package)
    code = (
        "import sys; from lorafx_cli import main\n"
        "codes = [main(['demo']), main(['explain', 'demo', '-a', 'a=b'])]; sys.exit(codes != [1, 1])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stderr.splitlines()
    assert first.startswith("error: the demo is in lorafx's repository")
    assert second.startswith("error: the demo's model is read by code in lorafx's repository")
