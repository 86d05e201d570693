"""`jax-mla serve`: a model behind the HTTP API of OpenAI, with a web page."""

import argparse
import contextlib
import importlib.resources
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from jax_mla.checkpoint.folder import read_model_config
from jax_mla.cli.arguments import number_above_0, positive
from jax_mla.cli.byte_progress import ByteProgress
from jax_mla.config.fields import DTYPES
from jax_mla.text import ByteTokenizer, load_chat_template, load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="DIR", help="the bundled model without it")
    parser.add_argument("--name", help="of the model in requests; the folder's without it")
    parser.add_argument("--host", default="127.0.0.1", help="127.0.0.1: this machine alone")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="8000; 0 takes any")
    parser.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="that requests must carry; may be repeated",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="the config's without it")
    parser.add_argument(
        "--num-pages", type=positive, metavar="N", help="of the cache; as fit without it"
    )
    parser.add_argument("--page-size", type=positive, default=64, metavar="N", help="64 tokens")
    parser.add_argument(
        "--max-batch", type=positive, default=8, metavar="N", help="requests at once (8)"
    )
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="of prompt and answer")
    parser.add_argument(
        "--max-waiting",
        type=positive,
        default=256,
        metavar="N",
        help="requests in the server (256)",
    )
    parser.add_argument(
        "--timeout", type=number_above_0, metavar="SECONDS", help="after which a request ends"
    )
    parser.add_argument(
        "--compiled", type=Path, metavar="DIR", help="keeps compiled programs for the next start"
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="answers do not depend on other requests"
    )
    parser.add_argument("--paranoid", action="store_true", help="checks the engine at every step")


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port must be from 0 to {2**16 - 1}, got {args.port}")
    if "" in (args.api_key or ()):
        raise ValueError("--api-key must not be empty")
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"serve needs the {error.name} package: pip install 'jax-mla[serve]'"
        ) from None
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_bound(args.host, args.port))
        demo = importlib.resources.files("jax_mla") / "demo/model"
        folder = args.model or stack.enter_context(importlib.resources.as_file(demo))
        name = args.name or ("demo" if args.model is None else folder.resolve().name)
        app = _app(args, Path(folder), name)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"{name} at http://{shown}:{port}", file=sys.stderr, flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30)
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the address, before anything is loaded for it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except socket.gaierror:
        raise ValueError(f"--host must be an address of this machine, got {host!r}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen at {host}:{port}: {error.strerror}") from None
    return listener


def _app(args: argparse.Namespace, folder: Path, name: str) -> Any:
    """The application, whose engine is compiled now and runs as long as it is served."""
    tokenizer = load_tokenizer(folder, read_model_config(folder, args.dtype))
    template = load_chat_template(folder, is_byte_level=isinstance(tokenizer, ByteTokenizer))

    import jax_mla
    from jax_mla.serving import AsyncEngine, Engine
    from jax_mla.serving.server.app import Limits, Server, make_app

    with ByteProgress("Loading") as progress:
        params, config = jax_mla.load(folder, dtype=args.dtype, progress=progress)
    max_tokens = args.max_tokens or config.max_position_embeddings
    engine = Engine(
        params,
        config,
        num_pages=args.num_pages,
        page_size=args.page_size,
        max_batch=args.max_batch,
        max_tokens=max_tokens,
        deterministic=args.deterministic,
        paranoid=args.paranoid,
    )
    limits = Limits(max_tokens=max_tokens, max_waiting=args.max_waiting, timeout_s=args.timeout)
    engine.warm_up(show=True, cache_dir=args.compiled)
    front = AsyncEngine(engine)
    server = Server(front, tokenizer, name, limits, template, args.api_key or ())

    @contextlib.asynccontextmanager
    async def running(app: Any) -> AsyncIterator[None]:
        with front:
            yield

    return make_app(server, lifespan=running)
