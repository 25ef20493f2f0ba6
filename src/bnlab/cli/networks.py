"""The verbs about networks: how large they are, and weights from elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from bnlab.cli.app import app
from bnlab.cli.console import run_command, show_result
from bnlab.cli.options import Json
from bnlab.errors import printable, quoted


@app.command("net")
def net_verb(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A network; none: list them all.")] = None,
    size: Annotated[int, typer.Option(help="Side of the picture the network sees, in pixels.")] = 224,
    classes: Annotated[int, typer.Option(help="How many classes it tells apart.")] = 1000,
    auxiliary: Annotated[bool, typer.Option("--auxiliary", help="With GoogLeNet's auxiliary classifiers.")] = False,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A recipe's key that shapes the network, or in_channels."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Each part by itself (in --json they always are).")] = False,
    as_json: Json = False,
) -> None:
    """List the networks, or count the parameters and multiply-adds of one, layer by layer."""
    from bnlab.cli import render
    from bnlab.commands import net
    from bnlab.config import parse_assignments

    if name is None:
        if auxiliary or options or every or (size, classes) != (224, 1000):
            raise typer.BadParameter("without NAME, only --json has an effect; name a network")
        show_result(as_json, net.listing(), render.net_list(), "Count one: bnlab net NAME")
        return
    asked = net.NetSettings(
        name=name, size=size, classes=classes, auxiliary=auxiliary, options=parse_assignments(options or [])
    )
    result = run_command(net.run, asked)
    show_result(as_json, result.to_json(), render.net_table(result, by_part=every), render.what_is_counted(result))


@app.command("import")
def import_verb(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Weights: a state_dict that torch.save wrote, or safetensors.")
    ],
    output: Annotated[Path, typer.Option(metavar="OUT", help="New classifier file, NAME.safetensors.")],
    classes: Annotated[
        Path | None,
        typer.Option(metavar="CLASSES", help='File of their names: {"0": NAME, ...} or a list as JSON, or one a line.'),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="tutorial, torchvision, caffe or bnlab; guessed unless given.")
    ] = None,
    network: Annotated[str | None, typer.Option(help="Which it is, where the tensors do not tell.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key of the recipe, of the network or of what it sees."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn weights from elsewhere into a classifier file.

    It knows torchvision's googlenet, the GoogLeNet tutorial's files, BN-Inception with Caffe's names (Cadene, TSN) and
    bnlab's own networks. Nothing in FILE is run; what does not match is named.
    """
    from bnlab.cli.render import import_lines
    from bnlab.commands import import_weights
    from bnlab.config import parse_assignments

    options = ({"network": network} if network else {}) | parse_assignments(settings or [])
    asked = import_weights.ImportSettings(file=file, output=output, classes=classes, format=format, options=options)
    result = run_command(import_weights.run, asked)
    show_result(
        as_json,
        result.to_json(),
        import_lines(result),
        f"{printable(output)}: written. Next: bnlab evaluate {quoted(output)} DATA",
    )
