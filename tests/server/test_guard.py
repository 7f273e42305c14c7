from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from edgemoe import EdgeMoEError
from edgemoe.server.guard import Guard
from edgemoe.server.protocols.errors import ApiError
from edgemoe.server.settings import ServerSettings, is_loopback

KEYS = frozenset({"first", "second"})


def status(settings: ServerSettings, path: str = "/v1/models", method: str = "GET", **headers: str) -> int:
    """The status of a request with these headers; 200 where it may be served."""
    given = {name.replace("_", "-"): value for name, value in ({"host": "localhost:8080"} | headers).items()}
    try:
        Guard(settings).check(method, path, Headers(given))
    except ApiError as error:
        return error.status
    return 200


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]", "api.localhost", "LOCALHOST."])
def test_the_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    ServerSettings(host=host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "example.org", "localhost.example.org"])
def test_any_other_address_needs_one(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(EdgeMoEError, match="give one as api_key="):
        ServerSettings(host=host)
    ServerSettings(host=host, api_keys=KEYS)


def test_a_blank_key_is_none() -> None:
    with pytest.raises(EdgeMoEError, match="not blank"):
        ServerSettings(api_keys=frozenset({" "}))


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "192.168.1.5:8080", "", "/", "[::1", "a@b"]
)
def test_a_name_that_points_here_is_not_this_machine(host: str) -> None:
    assert status(ServerSettings(), host=host) == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:1234", "127.0.0.1:8080", "[::1]:8080", "LocalHost:1"])
def test_this_machines_names(host: str) -> None:
    assert status(ServerSettings(), host=host) == 200


def test_behind_a_key_any_name_will_do() -> None:
    settings = ServerSettings(host="0.0.0.0", api_keys=KEYS)
    assert status(settings, host="models.example", authorization="Bearer first") == 200


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://localhost:8080", 200),
        ("http://localhost:9999", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("", 403),
        ("http://localhost:8080.evil.example", 403),
    ],
)
def test_pages_of_other_origins(origin: str, expected: int) -> None:
    assert status(ServerSettings(), origin=origin) == expected


def test_origins_that_are_allowed() -> None:
    named = ServerSettings(allow_origins=("https://app.example",))
    assert status(named, origin="https://app.example") == 200
    assert status(named, origin="https://evil.example") == 403
    assert status(ServerSettings(allow_origins=("*",)), origin="https://evil.example") == 200


def test_keys() -> None:
    settings = ServerSettings(api_keys=KEYS)
    assert status(settings) == 401
    assert status(settings, authorization="Bearer first") == 200
    assert status(settings, authorization="bearer second") == 200
    assert status(settings, x_api_key="second") == 200
    for wrong in ("Bearer", "Bearer ", "Bearer firs", "Bearer first1", "Basic first", "first", "Bearer first second"):
        assert status(settings, authorization=wrong) == 401, wrong
    assert status(settings, "/") == status(settings, "/health") == 200
    assert status(settings, "/health/") == 401
    # A browser asks without the key whether it may send one.
    assert status(settings, method="OPTIONS") == 200


@pytest.mark.parametrize("host", ["host.docker.internal:8080", "host.containers.internal"])
def test_a_container_reaches_the_loopback_by_its_own_name(host: str) -> None:
    assert status(ServerSettings(), host=host) == 200


def test_a_proxy_before_the_loopback_keeps_its_name() -> None:
    settings = ServerSettings(api_keys=KEYS)
    assert status(settings, host="llm.example", x_api_key="second") == 200
    assert status(settings, host="llm.example") == 401


def test_either_header_may_have_the_key() -> None:
    settings = ServerSettings(api_keys=KEYS)
    assert status(settings, authorization="Bearer none", x_api_key="second") == 200
    assert status(settings, authorization="Bearer first", x_api_key="none") == 200
    assert status(settings, authorization="Bearer none", x_api_key="none") == 401
