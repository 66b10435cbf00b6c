# SPDX-License-Identifier: Apache-2.0
"""The application with all commands.

Exit status: 0 for success; 1 for a negative answer (``doctor``, ``control``); 2 for input or arguments that cannot be
used; 130 after Ctrl-C.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .control import control
from .doctor import doctor
from .maps import check, convert
from .plan import plan
from .report import report
from .simulate import simulate
from .watch import watch

app = typer.Typer(
    name="vllm-ascend-eplb",
    help="Tools of the expert-parallel load balancer for vLLM: check, plan, simulate, watch, control.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for command in (doctor, plan, simulate, report, watch, control, convert, check):
    app.command()(command)


def main() -> None:
    app(prog_name="vllm-ascend-eplb")
