"""The commands: names, arguments and help. Each imports what it does only when it runs."""

from __future__ import annotations

from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import rich  # noqa: F401  (said to be missing here, before a command starts)
import typer

app = typer.Typer(
    help="Inspect, explain, measure and convert LoRA adapters.",
    epilog="Exit codes: 0 done, 1 the job failed, 2 wrong usage. LORAFX_DEBUG=1 shows tracebacks.",
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=False,
)

Model = Annotated[str, typer.Argument(help="A model's folder, its name on the hub, or 'demo'.", show_default=False)]
Adapters = Annotated[
    list[str],
    typer.Option(
        "--adapter", "-a", metavar="NAME=PATH", help="An adapter under a name, or a path alone. Repeat for more."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


class Format(str, Enum):
    peft = "peft"
    gguf = "gguf"


class Number(str, Enum):
    f16 = "f16"
    f32 = "f32"


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"lorafx {version('lorafx')}")
        except PackageNotFoundError as error:
            raise typer.BadParameter("lorafx is not installed here, so it has no version") from error
        raise typer.Exit()


def _by_name(given: list[str]) -> dict[str, str]:
    """``NAME=PATH``, or a path alone, which is named after its folder."""
    found: dict[str, str] = {}
    for item in given:
        name, mark, path = item.partition("=")
        if not mark or "/" in name:  # a folder may be called lr=0.1
            name, path = Path(item).name, item
        if not name or not path or name == "__base__":
            raise typer.BadParameter(f"--adapter got {item!r}; expected NAME=PATH, such as sql=adapters/sql")
        if name in found:
            raise typer.BadParameter(f"two adapters are called {name!r}; expected a name of its own for each")
        found[name] = path
    return found


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Debug = False,
) -> None:
    pass


@app.command(epilog="Example: lorafx inspect adapters/sql")
def inspect(
    adapter: Annotated[Path, typer.Argument(help="A folder that PEFT's save_pretrained wrote.", show_default=False)],
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Show what is in an adapter, and whether it is sound. Needs no model. Exits with 1 where something is wrong."""
    from lorafx.cli.inspecting import run

    return run(adapter, as_json=json)


@app.command(epilog="Example: lorafx explain meta-llama/Llama-3.2-1B --adapter sql=adapters/sql --svg layer.svg")
def explain(
    model: Model,
    adapter: Adapters,
    svg: Annotated[Path | None, typer.Option(help="Draw one layer to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report to this file, as HTML.")] = None,
    json: Json = False,
    compiled: Annotated[
        bool, typer.Option("--compiled/--eager", help="Compile, and report the graphs; or look at the modules alone.")
    ] = False,
    skeleton: Annotated[
        bool, typer.Option("--skeleton/--weights", help="Read the model's config alone; or its weights too.")
    ] = True,
    debug: Debug = False,
) -> int:
    """Show which LoRA branches of a model lorafx fuses, and why it leaves the others."""
    adapters = _by_name(adapter)
    from lorafx.cli.explaining import run

    return run(model, adapters, svg=svg, html=html, as_json=json, compiled=compiled, skeleton=skeleton)


@app.command(epilog="Example: lorafx bench demo --adapter json=demo/adapters/json --batch 8")
def bench(
    model: Model,
    adapter: Adapters,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Rows; several adapters take turns on them.")] = 1,
    tokens: Annotated[int, typer.Option(min=4, help="New tokens of a round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each contender, in turn.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: as torch chooses.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Measure decode tokens/s on this machine: the compiled base model, PEFT eager, and lorafx."""
    adapters = _by_name(adapter)
    from lorafx.cli.benching import run

    return run(model, adapters, batch=batch, tokens=tokens, rounds=rounds, threads=threads, as_json=json)


@app.command(epilog="Example: lorafx convert adapters/sql sql.gguf --to gguf --model HuggingFaceTB/SmolLM2-135M")
def convert(
    source: Annotated[str, typer.Argument(help="The adapter to convert.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder (peft) or file (gguf) to write.", show_default=False)],
    to: Annotated[Format, typer.Option(help="The format to write.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="The base model; its config is read, no weights.")] = None,
    dtype: Annotated[Number | None, typer.Option(help="Of the numbers in a gguf file. Default: f16.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    debug: Debug = False,
) -> int:
    """Write an adapter in another format."""
    if dtype is not None and to is not Format.gguf:
        raise typer.BadParameter("--dtype is for --to gguf: a PEFT folder keeps the numbers as they are")
    if to is Format.gguf and model is None:
        raise typer.BadParameter("--to gguf needs --model: the file is laid out by the base model's config")
    if not overwrite and out.exists() and (to is Format.gguf or (out / "adapter_config.json").exists()):
        raise typer.BadParameter(f"{str(out)!r} is there already; --overwrite replaces it")
    from lorafx.cli.converting import run

    return run(source, out, to=to.value, model=model, dtype=dtype.value if dtype else None, overwrite=overwrite)


@app.command(epilog='Example: lorafx demo --prompt "What is the capital of Peru?"')
def demo(
    prompt: Annotated[str | None, typer.Option(help="What the five rows of the batch are asked.")] = None,
    debug: Debug = False,
) -> int:
    """Run the demo: four adapters and the base model in one batch. Needs a checkout of lorafx."""
    from lorafx.cli.demo import run

    return run(prompt)
