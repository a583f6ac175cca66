"""A Ray cluster: of this machine, or one whose address is given."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from convscale.errors import UserError, first_line

_PATIENCE_S = 5.0
"""Seconds in which a cluster's address must answer."""


def begin(ray: Any, address: str | None, *, cores: int, environment: Mapping[str, str] | None = None) -> None:
    """Start a cluster of this machine, or join the one whose address is given.

    Args:
        ray: the library.
        address: of a cluster; None: of this machine alone.
        cores: that a cluster of this machine has.
        environment: variables of the processes that run there.

    Raises:
        UserError: Ray can not be started here, or nobody answers at the address, or not as Ray wants it.
    """
    if address is not None:
        check_answers(address)
    # Without "local" Ray would join a cluster that runs on this machine, or the one that RAY_ADDRESS names.
    where: dict[str, Any] = {"address": "local", "num_cpus": cores} if address is None else {"address": address}
    if environment is not None:
        where["runtime_env"] = {"env_vars": dict(environment)}
    try:
        ray.init(**where, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # of many kinds, each with its reason
        if address is None:
            raise UserError(
                f"no Ray cluster can be started on this machine: {first_line(error)}; engine local needs none"
            ) from error
        raise UserError(
            f"the Ray cluster at {address} can not be used: {first_line(error)}; start one with `ray start --head`, or "
            "leave the address out"
        ) from error


def check_answers(address: str) -> None:
    """Ask before Ray does, which would wait for minutes.

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
