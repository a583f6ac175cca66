"""Pictures as clients send them: one's bytes, a form of several, or a list in base64."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING

from convscale.errors import UserError
from convscale.read import json_of
from convscale.serve.answering import in_pool, read_body, unpacked
from convscale.serve.guard import Guarded
from convscale.serve.protocol import Problem

if TYPE_CHECKING:
    from starlette.requests import Request

_ONE = ("", "application/octet-stream", "application/x-www-form-urlencoded")
"""Content types of one picture beside ``image/...``; the last is what curl says of ``--data-binary``."""


async def pictures_of(one: Guarded, request: Request, most: int) -> tuple[list[bytes], bool]:
    """The bytes of each picture, and whether they came as several.

    Raises:
        Problem: none, too many, or in an unknown way.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        found = await _of_form(request, most)
    elif kind == "application/json":
        body = await unpacked(one, request.headers, await read_body(one))
        found = await in_pool(_of_list, body, most)
    elif kind in _ONE or kind.startswith("image/"):
        body = await unpacked(one, request.headers, await read_body(one))
        if not body:
            raise Problem(400, "the request holds no picture; send a JPEG's or PNG's bytes")
        return [body], False
    else:
        raise Problem(
            415,
            f"content type {kind[:80]!r} is unknown; send image/..., application/octet-stream, multipart/form-data or "
            "application/json",
        )
    if not found:
        raise Problem(400, "the request holds no picture")
    return found, True


async def _of_form(request: Request, most: int) -> list[bytes]:
    """The files of a form, whatever its fields are called."""
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException

    try:
        async with request.form(max_files=most, max_fields=most) as form:
            return [await value.read() for _, value in form.multi_items() if isinstance(value, UploadFile)]
    except HTTPException as error:
        raise Problem(400, f"the form can not be read: {error.detail}") from error


def _of_list(body: bytes, most: int) -> list[bytes]:
    """``["...", ...]`` or ``{"pictures": ["...", ...]}``."""
    try:
        said = json_of(body, "the request")
    except UserError as error:
        raise Problem(400, str(error)) from error
    listed = said.get("pictures") if isinstance(said, dict) else said
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        raise Problem(400, "the request must be a list of pictures, each in base64")
    if len(listed) > most:
        raise Problem(413, f"{len(listed)} pictures are sent at once; at most {most} are taken")
    try:
        return [base64.b64decode(each, validate=True) for each in listed]
    except (binascii.Error, ValueError):
        raise Problem(400, "a picture in the list is not base64") from None
