# SPDX-License-Identifier: Apache-2.0
"""Runs vLLM's own start-up with the command line of a server, up to the start of workers.

The parser of ``vllm serve`` reads the arguments (also a file that ``--config`` names), and ``AsyncEngineArgs`` reads
the model's configuration and builds the engine's. Plugins are loaded on the way, as in a server, so that this package
switches balancing on there, or not.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Iterator, Sequence
from typing import Any

PARSERS = ("vllm.utils.argparse_utils", "vllm.utils")
"""Modules with vLLM's class of parsers, the newest first."""


def ask_server(words: Sequence[str]) -> dict[str, Any]:
    """The result of a server's start-up.

    Args:
        words: the arguments behind ``vllm serve``.

    Returns:
        In JSON's types: ``refused``, the error line that ends start-up; or ``balances``, whether workers would balance,
        and ``model``, the architecture. ``said`` has the log lines of this package, with their levels.
    """
    said: list[tuple[str, str]] = []
    answer: dict[str, Any] = {"said": said}
    with _collecting(said):
        try:
            args = _parsed(words)
            config = _configuration(args)
        except _ArgumentsError as error:
            return answer | {"refused": str(error)}
        except Exception as error:  # of this plugin, of vLLM, or of another plugin
            return answer | {"refused": " ".join(f"{type(error).__name__}: {error}".split())[:1000]}
        from ..adaptors.front_end import engine_in_use

        return answer | {
            "balances": engine_in_use().is_on(config),
            "model": str(config.model_config.architecture),
        }


class _ArgumentsError(Exception):
    """vLLM's parser refuses the arguments."""


def _parsed(words: Sequence[str]) -> Any:
    """The arguments as ``vllm serve`` gets them."""
    serve = importlib.import_module("vllm.entrypoints.cli.serve")
    parser = _parser_class()(prog="vllm")
    commands = serve.cmd_init()
    for command in commands:
        command.subparser_init(parser.add_subparsers(dest="subparser"))
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
            args = parser.parse_args(["serve", *words])
    except SystemExit as error:
        if not error.code:
            raise _ArgumentsError("the arguments ask for help or a version; leave that out") from None
        last = (complaint.getvalue().strip().splitlines() or [f"status {error.code}"])[-1]
        raise _ArgumentsError(" ".join(last.split())) from None
    for command in commands:
        command.validate(args)
    if getattr(args, "model_tag", None) is not None:
        args.model = args.model_tag
    return args


def _parser_class() -> Any:
    for name in PARSERS:
        with contextlib.suppress(ImportError):
            found = getattr(importlib.import_module(name), "FlexibleArgumentParser", None)
            if found is not None:
                return found
    raise _ArgumentsError("this vLLM has no FlexibleArgumentParser; start the server to see what it says")


def _configuration(args: Any) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    options = {"headless": True} if getattr(args, "headless", False) else {}
    return AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER, **options)


@contextlib.contextmanager
def _collecting(said: list[tuple[str, str]]) -> Iterator[None]:
    """Collects log lines of this package by a filter, because vLLM sets its logging up again, which removes
    handlers."""

    def keep(record: logging.LogRecord) -> bool:
        said.append((record.levelname.lower(), " ".join(record.getMessage().split())))
        return True

    logger = logging.getLogger("vllm.eplb")
    logger.setLevel(logging.INFO)
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
