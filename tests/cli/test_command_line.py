"""The console script itself: what it imports, its exit codes, its one-line errors."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from typer.testing import CliRunner

import lorafx
from lorafx_cli import main
from lorafx_cli.app import app

ROOT = Path(__file__).parent.parent.parent
COMMANDS = ["inspect", "explain", "bench", "convert", "demo"]


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """In a process of its own, as from a shell."""
    return subprocess.run(
        [sys.executable, "-m", "lorafx_cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80", **environment},
        timeout=120,
    )


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["bench", "--help"], 0), (["no-such"], 2), (["explain", "m", "-a", "a=b=", "-a", "a=c"], 2)],
)
def test_help_and_wrong_usage_import_no_torch(arguments, code):
    done = python(
        f"import sys; from lorafx_cli import main; code = main({arguments!r})\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'lorafx') if m in sys.modules], code, file=sys.stderr)"
    )
    assert done.stderr.splitlines()[-1] == f"[] {code}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_an_example(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: lorafx {command}" in " ".join(result.output.split())


def test_no_arguments_show_the_help():
    done = run()
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert run("--version").stdout.strip() == f"lorafx {version('lorafx')}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["inspect"], "Missing argument"),
        (["inspect", "--no-such"], "No such option"),
        (["explain", "m"], "Missing option '--adapter'"),
        (["explain", "m", "-a", "=path"], "expected NAME=PATH"),
        (["explain", "m", "-a", "name="], "expected NAME=PATH"),
        (["explain", "m", "-a", "__base__=x"], "expected NAME=PATH"),
        (["explain", "m", "-a", "a=x", "-a", "a=y"], "two adapters are called 'a'"),
        (["bench", "m", "-a", "a=x", "--batch", "0"], "Invalid value for '--batch'"),
        (["convert", "a", "b", "--to", "kohya"], "'kohya' is not one of"),
        (["convert", "a", "b", "--to", "peft", "--dtype", "f16"], "--dtype is for --to gguf"),
    ],
)
def test_wrong_usage_exits_2_with_one_line(lorafx_command, arguments, expected):
    code, out, err = lorafx_command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert expected in err
    assert err.count("\n") == 1


def test_a_folder_with_an_equals_sign_is_a_path(tmp_path, lorafx_command, model):
    code, _, err = lorafx_command("explain", model, "-a", tmp_path / "lr=0.1")
    assert code == 1
    assert "adapter 'lr=0.1'" in err


@pytest.mark.parametrize("name", ["nowhere", "a" * 5000, "new\nline\x1b[31m", "\udcff", "", "."])
def test_a_bad_path_exits_1_with_one_line(lorafx_command, name):
    code, out, err = lorafx_command("inspect", name)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert len(err) < 1100


def test_debug_shows_the_traceback():
    with pytest.raises(lorafx.AdapterFormatError):
        main(["inspect", "nowhere", "--debug"])
    done = run("inspect", "nowhere", LORAFX_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "AdapterFormatError" in done.stderr


def test_without_typer_one_line_says_what_to_install():
    for missing in ("typer", "rich"):
        done = python(f"import sys; sys.modules[{missing!r}] = None\nfrom lorafx_cli import main; sys.exit(main([]))")
        assert done.returncode == 2
        assert done.stderr == "error: lorafx's command line needs typer and rich: pip install 'lorafx[cli]'\n"


def test_ctrl_c_exits_130_quietly():
    code = (
        "import sys, time\nfrom lorafx_cli import main\nfrom lorafx_cli.app import app\n"
        "@app.command()\ndef wait():\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "sys.exit(main(['wait']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_reader_that_goes_is_no_traceback(sql):
    process = subprocess.Popen(
        [sys.executable, "-m", "lorafx_cli", "inspect", str(sql), "--json"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 1


def test_installed_as_a_script_with_its_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["lorafx"] == "lorafx_cli:main"
    assert {"lorafx.cli", "lorafx_cli"} <= set(project["tool"]["setuptools"]["packages"])
