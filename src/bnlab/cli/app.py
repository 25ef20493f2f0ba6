"""The program `bnlab`, to which the verbs are added."""

from typing import Annotated

import typer

from bnlab import __version__

app = typer.Typer(
    name="bnlab",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Train a batch-normalised image classifier on your own photos, and measure what batch normalisation does "
    "for it.",
    epilog="Begin with `bnlab demo`, or with a folder that has one sub-folder of photos for each class: "
    "`bnlab split PHOTOS --into DATA`, then `bnlab train DATA`.",
)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"bnlab {__version__}")  # noqa: T201
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())  # noqa: T201
        raise typer.Exit(2)
