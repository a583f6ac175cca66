"""The name that an artefact is served by."""

from __future__ import annotations

import re
from pathlib import Path

from convscale.errors import UserError, short

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def check_model_name(name: object) -> str:
    """A name that can stand in an address and in a file's path.

    Raises:
        UserError: it can not.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            f"model name {short(name, 120)} can not stand in an address; give one of letters, digits, _ . and -"
        )
    return name


def name_of(folder: Path) -> str:
    """What an artefact in this folder is called where nobody says: as its folder is.

    Raises:
        UserError: that can not be a name.
    """
    return check_model_name(folder.resolve().name)
