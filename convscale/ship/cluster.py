"""The address of a Ray cluster: whether anybody answers there, asked before Ray is, which would wait for minutes."""

from __future__ import annotations

import socket

from convscale.errors import UserError, first_line

_PATIENCE_S = 5.0
"""Seconds in which a cluster's address must answer."""


def check_answers(address: str) -> None:
    """
    Raises:
        UserError: nobody listens at ``host:port``; ``auto`` and ``local`` are left to Ray.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"Ray address {address!r} is none; host:port, ray://host:port or auto would be right")
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE_S).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the last: no host can have the name
        raise UserError(
            f"no Ray cluster answers at {address} ({first_line(error)}); start one with `ray start --head`, or leave "
            "the address out"
        ) from error
