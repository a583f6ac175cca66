"""What the application's OpenAPI says of bodies and answers that are read and written by hand."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_ERROR: Schema = {"type": "object", "required": ["error"], "properties": {"error": _TEXT}}
_TENSOR: Schema = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": _TEXT,
        "datatype": _TEXT,
        "shape": {"type": "array", "items": {"type": "integer"}},
        "parameters": {"type": "object"},
        "data": {"type": "array"},
    },
}
_DESCRIBED: Schema = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name", "datatype", "shape"],
        "properties": {
            "name": _TEXT,
            "datatype": _TEXT,
            "shape": {"type": "array", "items": {"type": "integer"}},
        },
    },
}
_SAID: Schema = {
    "type": "object",
    "properties": {
        "labels": {"type": "array", "items": _TEXT},
        "probabilities": {"type": "array", "items": {"type": "number"}},
        "error": _TEXT,
    },
}
_BYTES: Schema = {"type": "string", "format": "binary"}
_WHY = {
    400: "What was sent is wrong; the message says what would be right.",
    401: "A token is needed.",
    404: "No such model or version.",
    405: "Another method is needed.",
    408: "The request was not there in time.",
    409: "The new version is refused; the log says why.",
    413: "Too much at once.",
    415: "Another content type or encoding is needed.",
    500: "The server failed; its log says why.",
    503: "Too busy, or stopping: try again after Retry-After.",
    504: "There was no answer in time.",
}


def _json(schema: Schema, description: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def errors(*statuses: int) -> dict[int | str, Schema]:
    """Responses of these statuses; 401, 405 and 500 may always come."""
    return {status: _json(_ERROR, _WHY[status]) for status in sorted({401, 405, 500, *statuses})}


def answers(description: str, properties: Schema, required: list[str]) -> Schema:
    """A response of JSON."""
    return _json({"type": "object", "required": required, "properties": properties}, description)


SERVER = answers(
    "The server.",
    {"name": _TEXT, "version": _TEXT, "extensions": {"type": "array", "items": _TEXT}},
    ["name", "version", "extensions"],
)
MODEL = answers(
    "What the model takes and gives.",
    {
        "name": _TEXT,
        "versions": {"type": "array", "items": _TEXT},
        "platform": _TEXT,
        "inputs": _DESCRIBED,
        "outputs": _DESCRIBED,
    },
    ["name", "versions", "platform", "inputs", "outputs"],
)
INFERRED: Schema = {
    "description": "Probabilities; behind the JSON where that was asked for.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["model_name", "model_version", "outputs"],
                "properties": {
                    "model_name": _TEXT,
                    "model_version": _TEXT,
                    "id": _TEXT,
                    "outputs": {"type": "array", "items": _TENSOR},
                },
            }
        },
        "application/octet-stream": {"schema": _BYTES},
    },
}
CLASSIFIED = answers(
    "Labels with probabilities, best first, one answer for each picture; a picture in a list that can not be read has "
    "an error instead.",
    {"model_name": _TEXT, "model_version": _TEXT, "answers": {"type": "array", "items": _SAID}},
    ["model_name", "model_version", "answers"],
)
INFER_BODY: Schema = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "id": {"type": "string", "maxLength": 256},
                    "parameters": {"type": "object"},
                    "inputs": {"type": "array", "items": _TENSOR, "minItems": 1, "maxItems": 1},
                    "outputs": {"type": "array", "items": {"type": "object"}, "maxItems": 1},
                },
            }
        },
        "application/octet-stream": {"schema": _BYTES},
    },
}
CLASSIFY_BODY: Schema = {
    "required": True,
    "description": "One picture's bytes; several as a form; or a list of them in base64.",
    "content": {
        "application/octet-stream": {"schema": _BYTES},
        "image/jpeg": {"schema": _BYTES},
        "image/png": {"schema": _BYTES},
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"pictures": {"type": "array", "items": _BYTES}}}
        },
        "application/json": {"schema": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "byte"}}},
    },
}
