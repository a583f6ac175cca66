"""The command ``serve``: artefacts behind a port. ``register`` puts it on the command line."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from convscale.cli.options import Json, Threads, print_json, say
from convscale.errors import EXTRAS, UserError, check_number, check_whole


def register(app: typer.Typer) -> None:
    """Put the command on the app."""
    app.command("serve")(serve_command)


def serve_command(
    artifacts: Annotated[
        list[str],
        typer.Argument(
            help="Artefact folders, each served by its own name or as NAME=FOLDER; of a folder with numbered artefacts "
            "the highest."
        ),
    ],
    port: Annotated[int, typer.Option("--port", help="0: any that is free.")] = 8000,
    host: Annotated[str, typer.Option("--host", help="Where to listen; 127.0.0.1 is this machine alone.")] = (
        "127.0.0.1"
    ),
    workers: Annotated[
        int, typer.Option("--workers", help="Processes, each with its own models and its share of the cores.")
    ] = 1,
    batch_size: Annotated[
        int | None, typer.Option("-b", "--batch-size", help="Images of a batch at most; the tuned one when left out.")
    ] = None,
    max_delay_ms: Annotated[
        float, typer.Option("--max-delay-ms", help="How long less than a batch waits for a request on its way.")
    ] = 5.0,
    queue: Annotated[int, typer.Option("--queue", help="Batches that may wait; beyond them 503.")] = 16,
    timeout_s: Annotated[float, typer.Option("--timeout-s", help="Until an answer, from a whole request on.")] = 30.0,
    max_body_mb: Annotated[int, typer.Option("--max-body-mb", help="Of a request, unpacked.")] = 32,
    max_pixels: Annotated[int, typer.Option("--max-pixels", help="Of a picture, before it is decoded.")] = 40_000_000,
    max_connections: Annotated[int, typer.Option("--max-connections", help="At once, each process.")] = 1_024,
    runtime: Annotated[str | None, typer.Option("--runtime", help="Instead of the artefact's own.")] = None,
    threads: Threads = None,
    poll_s: Annotated[
        float, typer.Option("--poll-s", help="Between looks for a new version in the folders; 0: only when asked.")
    ] = 2.0,
    drain_s: Annotated[
        float, typer.Option("--drain-s", help="How long new connections are answered after SIGTERM.")
    ] = 0.5,
    log: Annotated[str, typer.Option("--log", help="json: a line for each request on standard error; none.")] = "json",
    as_json: Json = False,
) -> None:
    """Serve artefacts: Open Inference Protocol, pictures, a page. A token is read from CONVSCALE_TOKEN."""
    from convscale.serve.models import How, named
    from convscale.serve.server import bind, serve
    from convscale.serve.settings import LOGS, LOOPBACK, TOKEN, Limits, Settings, token_of_environment

    for library in EXTRAS["serve"]:  # what is missing is said before anything is opened
        import_module(library)

    check_whole("--port", port, 0)
    if port > 65_535:
        raise UserError(f"--port is {port}; it must be at most 65535")
    if log not in LOGS:
        raise UserError(f"--log {log!r} is unknown (known: {', '.join(LOGS)})")
    for name, count in (("--workers", workers), ("--queue", queue), ("--max-body-mb", max_body_mb)):
        check_whole(name, count)
    if batch_size is not None:
        check_whole("--batch-size", batch_size)
    for name, value in (("--max-delay-ms", max_delay_ms), ("--poll-s", poll_s), ("--drain-s", drain_s)):
        check_number(name, value, "a number from 0 to 60,000", 0, 60_000)
    token = token_of_environment()
    settings = Settings(
        models=named(artifacts),
        how=How(
            runtime=runtime,
            threads=threads,
            batch_size=batch_size,
            max_delay_s=max_delay_ms / 1000,
            queue_batches=queue,
        ),
        limits=Limits(
            body=max_body_mb * 2**20, pixels=max_pixels, connections=max_connections, answer_s=float(timeout_s)
        ),
        token=token,
        poll_s=poll_s,
        drain_s=drain_s,
        log=log,
    )
    sock = bind(host, port)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{sock.getsockname()[1]}"
    if token is None and host not in LOOPBACK:
        say(f"note: whoever reaches {host} can ask; {TOKEN} in the environment makes clients show a token", err=True)

    def started(facts: list[dict[str, object]]) -> None:
        if as_json:
            print_json({"url": url, "models": facts, "workers": workers, "token": token is not None})
        for each in () if as_json else facts:
            say(
                f"{each['model']}: version {each['version']}, {each['runtime']}, batches up to {each['batch_size']}; "
                f"{each['checked']}"
            )
        if not as_json:
            say(f"serving at {url}/ (page), {url}/v2 (Open Inference Protocol), {url}/openapi.json (all of it)")
        typer.get_text_stream("stdout").flush()

    with sock:
        serve(settings, sock, workers=workers, started=started)
