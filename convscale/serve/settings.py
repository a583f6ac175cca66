"""What a server is told on its command line, in one value that travels to its worker processes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from convscale.errors import UserError, check_number, check_whole
from convscale.machine import available_cores
from convscale.serve.models import How, Named

TOKEN = "CONVSCALE_TOKEN"
"""The environment variable that a token is read from; it stands in no process list and no log."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")
LOGS = ("json", "none")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server takes at most.

    Raises:
        UserError: a value is impossible.
    """

    body: int = 32 * 2**20
    """Bytes of a request, unpacked."""
    bodies: int = 512 * 2**20
    """Bytes of all requests that are being answered."""
    unread: int = 4 * 2**20
    """Bytes of bodies that have come and wait for the server to read them; more are thrown away, and refused, unless
    their model's queue has room for them."""
    pixels: int = 40_000_000
    """Of a picture, before it is decoded."""
    pictures: int = 64
    """Of one request."""
    connections: int = 1_024
    """At once."""
    header_s: float = 10.0
    """Until a connection has said what it wants."""
    body_s: float = 20.0
    """Until a request's body is there."""
    answer_s: float = 30.0
    """From then to its answer."""
    send_s: float = 20.0
    """Until a client has taken its answer."""

    def __post_init__(self) -> None:
        for name in ("body", "unread", "pixels", "pictures", "connections"):
            check_whole(f"limit of {name}", getattr(self, name))
        for name in ("header_s", "body_s", "answer_s", "send_s"):
            check_number(f"limit {name}", getattr(self, name), "seconds above 0, at most a day", 1e-3, 86_400)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of it."""

    models: tuple[Named, ...]
    """What is served."""
    how: How = field(default_factory=How)
    """How it is opened and queued."""
    limits: Limits = field(default_factory=Limits)
    """What is taken."""
    token: str | None = None
    """What clients must show; None: nothing."""
    decoders: int = field(default_factory=available_cores)
    """Threads that decode pictures."""
    poll_s: float = 2.0
    """Between looks for a new version; 0: only when it is asked for."""
    drain_s: float = 0.5
    """How long new connections are still answered after SIGTERM."""
    log: str = "json"
    """``json``: a line of it for each request, on standard error; ``none``."""


def token_of_environment() -> str | None:
    """The token that clients must show; None where the variable is not set.

    Raises:
        UserError: it is set and empty, or holds what can not stand in a header.
    """
    token = os.environ.get(TOKEN)
    if token is None:
        return None
    if not token.strip():
        raise UserError(f"{TOKEN} is set and empty; give it a token, or unset it to ask for none")
    if not (token.isascii() and token.isprintable()) or token != token.strip():
        raise UserError(f"{TOKEN} holds what can not stand in a header; give it printable ASCII without blanks around")
    return token


def path_free(text: str, folder: Path) -> bool:
    """Whether a text names no path of this machine."""
    return str(folder) not in text and os.sep not in text
