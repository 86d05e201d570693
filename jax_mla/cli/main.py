"""Chooses the command and turns the library's errors into one line and an exit code."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax_mla

# One module of this package each, with `add_arguments(parser)` and `run(args) -> exit code`.
COMMANDS = {
    "demo": "generate text with the bundled model",
    "generate": "continue a prompt with the model of a folder",
    "serve": "serve a model over HTTP, as OpenAI does, with a web page",
    "inspect": "show the contents of a checkpoint folder and the cost of its cache",
    "verify": "check a checkpoint's numbers, against golden data or against themselves",
    "plan": "show how many bytes each device of a mesh needs, to train or to serve",
    "train": "train a model on files of text or tokens",
    "doctor": "show versions, devices, and which kernels run here",
}


INTERRUPTED = 130


def program() -> NoReturn:
    """`main` as a process. An interrupted one exits without the interpreter's shutdown.

    jaxlib 0.10 abandons an interrupted compilation while its threads keep running, and the shutdown
    frees what they use: the process would end with a segmentation fault.
    """
    code = main()
    if code == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# Of the caller's files, options, weights or installation: one line, no traceback.
_BAD_INPUT = (ValueError, OSError, NotImplementedError, ModuleNotFoundError, FloatingPointError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jax-mla argv`; the exit code is 0, 1 (a check failed), 2 (bad input) or 130."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser(argv).parse_args(argv)
    try:
        code = importlib.import_module(f"jax_mla.cli.{args.command}").run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `jax-mla inspect DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except _BAD_INPUT as error:
        if args.traceback:
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if args.traceback or not _is_of_the_machine(error):
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 2


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-mla",
        description="DeepSeek-family models in JAX. `jax-mla COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=jax_mla.__version__)
    parser.add_argument("--traceback", action="store_true", help="on an error, show where it arose")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # A prompt may also be the name of a command: only the first word that is not an option counts.
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        if name == chosen:
            importlib.import_module(f"jax_mla.cli.{name}").add_arguments(command)
    return parser


def _is_of_the_machine(error: RuntimeError) -> bool:
    """Whether jax reports a missing platform or a lack of memory, rather than a bug of ours."""
    is_of_a_device = type(error).__name__ == "JaxRuntimeError"
    return is_of_a_device or str(error).startswith("Unable to initialize backend")


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
