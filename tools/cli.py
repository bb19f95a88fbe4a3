"""The `latentrelay` command. Every subcommand imports what it needs when it runs, so `--help` is instant."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from latentrelay.tools import cli_devices, cli_make, cli_measure, cli_run

# Every usage error descends from BadParameter's grandparent; typer brings its own copy of click, so it is asked here.
_USAGE_ERRORS = typer.BadParameter.__mro__[2]
MISUSED = 2
INTERRUPTED = 130

app = typer.Typer(
    name="latentrelay",
    help="One Stable Diffusion run, shared: the cloud starts it, the device finishes it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 failed, 2 misused, 3 refused.",
)
devices = typer.Typer(help="Device profiles: those shipped, your own, and one of this machine.", no_args_is_help=True)
app.add_typer(devices, name="devices")

_DEVICES: dict[str, Callable[..., None]] = {
    "list": cli_devices.devices_list,
    "show": cli_devices.devices_show,
    "validate": cli_devices.devices_validate,
    "check": cli_devices.devices_check,
    "measure": cli_devices.devices_measure,
}
_COMMANDS: tuple[Callable[..., None], ...] = (
    cli_make.compress,
    cli_make.build,
    cli_make.sign,
    cli_run.serve,
    cli_run.generate,
    cli_run.plan,
    cli_run.verify,
    cli_measure.bench,
    cli_measure.evaluate,
    cli_measure.demo,
)
for _name, _each in _DEVICES.items():
    devices.command(_name)(_each)
for _each in _COMMANDS:
    app.command()(_each)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as of

        typer.echo(f"latentrelay {of('latentrelay')}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit with its status."""
    given = sys.argv[1:] if arguments is None else arguments
    with _signals_unwind():
        sys.exit(_status(given))


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """SIGTERM and a closed terminal end the command as Ctrl-C does: partial folders go, the demo's server ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {each: signal.getsignal(each) for each in numbers}
    for each, handler in before.items():
        if handler is signal.SIG_DFL:  # nohup's choice, or an embedding program's, stands
            signal.signal(each, _end)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _status(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    try:
        status: Any = app(arguments, prog_name="latentrelay", standalone_mode=False)
        if status == INTERRUPTED:  # typer makes a status of Ctrl-C
            return _interrupted(INTERRUPTED, as_json)
        return status if isinstance(status, int) else 0
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted(INTERRUPTED, as_json)
    except SystemExit as ended:
        return _interrupted(ended.code if isinstance(ended.code, int) else 1, as_json)
    except Exception as error:
        from latentrelay.tools.console import report_error

        if hasattr(error, "exit_status"):
            return report_error(error, as_json)
        if isinstance(error, _USAGE_ERRORS):
            if not as_json:
                error.show()  # type: ignore[attr-defined]
                return MISUSED
            return report_error(error, as_json, MISUSED)
        if isinstance(error, OSError):  # a full disk, a folder that may not be written, weights that are not there
            return report_error(error, as_json)
        if as_json:
            import traceback

            traceback.print_exc()
            return report_error(error, as_json)
        raise


def _interrupted(status: int, as_json: bool) -> int:
    if as_json:
        from latentrelay.tools.console import report_error

        return report_error(KeyboardInterrupt("interrupted"), as_json, status)
    return status


if __name__ == "__main__":
    main()
