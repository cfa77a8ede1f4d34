"""The command line: one file a command, each a thin skin over a job.

Commands import their jobs when they run, so that `tunesmith --help` stays instant.
"""

import logging
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("TYPER_USE_RICH", "0")

import typer

from tunesmith.cli.advise import advise
from tunesmith.cli.align import align
from tunesmith.cli.chat import chat
from tunesmith.cli.combine import combine
from tunesmith.cli.compare import compare
from tunesmith.cli.data import data_app
from tunesmith.cli.demo import demo
from tunesmith.cli.doctor import doctor
from tunesmith.cli.evaluate import evaluate
from tunesmith.cli.features import features
from tunesmith.cli.import_adapter import import_adapter
from tunesmith.cli.inspect import inspect
from tunesmith.cli.merge import merge
from tunesmith.cli.models import models
from tunesmith.cli.plan import plan
from tunesmith.cli.predict import predict
from tunesmith.cli.reward import reward_app
from tunesmith.cli.schema import schema
from tunesmith.cli.sites import sites
from tunesmith.cli.train import train
from tunesmith.errors import TunesmithError

app = typer.Typer(
    name="tunesmith",
    help="Fine-tune language models with every method, and see the proof that it worked.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command("eval")(evaluate)
app.command()(chat)
app.command()(predict)
app.command()(features)
app.command()(compare)
app.command()(align)
app.command()(plan)
app.command()(advise)
app.command()(merge)
app.command()(combine)
app.command()(inspect)
app.command("import-adapter")(import_adapter)
app.add_typer(data_app, name="data")
app.add_typer(reward_app, name="reward")
app.command()(models)
app.command()(sites)
app.command()(doctor)
app.command()(schema)
app.command()(demo)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error of ours is one message and its exit code, not a traceback."""
    _speak()
    try:
        app(args=None if arguments is None else list(arguments))
    except TunesmithError as error:
        if os.environ.get("TUNESMITH_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _speak() -> None:
    """Print what the rooms log: downloads, settings without effect."""
    logger = logging.getLogger("tunesmith")
    # A new handler each time, since sys.stderr may be another one by now.
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    logger.setLevel(logging.INFO)
