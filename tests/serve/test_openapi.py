"""The application keeps to its own OpenAPI, whatever schemathesis thinks of."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.conftest import Running

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
ALL = {
    "/",
    "/metrics",
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/{name}",
    "/v2/models/{name}/ready",
    "/v2/models/{name}/infer",
    "/v2/models/{name}/classify",
    "/v2/models/{name}/versions/{version}",
    "/v2/models/{name}/versions/{version}/ready",
    "/v2/models/{name}/versions/{version}/infer",
    "/v2/models/{name}/versions/{version}/classify",
    "/v2/repository/index",
    "/v2/repository/models/{name}/load",
}


def test_every_path_is_described(server: Running) -> None:
    described = server.guard.app.openapi()  # pyright: ignore
    assert set(described["paths"]) == ALL
    body = described["paths"]["/v2/models/{name}/classify"]["post"]["requestBody"]["content"]
    assert {"image/jpeg", "image/png", "multipart/form-data", "application/json"} <= set(body)


@pytest.mark.parametrize("path", sorted(path for path in ALL if "/versions/" not in path))  # the same functions
def test_it_keeps_to_what_is_described(server: Running, path: str) -> None:
    described = _named(server.guard.app.openapi())  # pyright: ignore
    schema = schemathesis.openapi.from_dict(described)
    schema.config.update(base_url=server.url)
    (operation,) = [each.ok() for each in schema.get_all_operations() if each.ok().path == path]

    @settings(
        max_examples=6,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def keeps(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    keeps()


def _named(described: dict[str, Any]) -> dict[str, Any]:
    """Half of all names are the one that is served, so that not all requests end at an unknown one."""
    for operations in described["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] in ("name", "version"):
                    right = "fashion" if parameter["name"] == "name" else "1"
                    parameter["schema"] = {"anyOf": [{"const": right}, {"type": "string", "minLength": 1}]}
    return described
