"""Who may call what, for each combination of keys."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.fake_engine import FakeEngine

OPEN_PATHS = ("/health", "/health_generate")
ADMIN_PATHS = ("/load_lora_adapter", "/unload_lora_adapter", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/flush_cache", "/abort_request")
USER_PATHS = ("/v1/models", "/v1/completions", "/generate", "/metrics", "/server_info", "/docs", "/nowhere")


def status(client: Any, path: str, key: str | None) -> int:
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
    return int(client.post(path, json={}, headers=headers).status_code)


@pytest.mark.parametrize(
    ("api_key", "admin_key", "given", "user_ok", "admin_ok"),
    [
        (None, None, None, True, True),
        ("u", None, None, False, False),
        ("u", None, "x", False, False),
        ("u", None, "u", True, True),  # without an admin key the user key guards all
        (None, "a", None, True, False),
        (None, "a", "a", True, True),
        ("u", "a", "u", True, False),
        ("u", "a", "a", True, True),
        ("u", "a", "", False, False),
        ("u", "a", None, False, False),
        ("kü", None, "kü", True, True),
    ],
)
def test_keys(client_of: Any, api_key: str | None, admin_key: str | None, given: Any, user_ok: bool, admin_ok: bool) -> None:
    client = client_of(FakeEngine(api_key=api_key, admin_api_key=admin_key))
    for path in USER_PATHS:
        assert (status(client, path, given) != 401) == user_ok, path
    for path in ADMIN_PATHS:
        for form in (path, f"{path}/", f"{path}%0A", f"{path}%0D", f"{path}%00"):  # a route's pattern takes the first three
            reached = client.post(form, json={}, headers={} if given is None else {"Authorization": f"Bearer {given}".encode()}).status_code not in (401, 404)
            assert reached <= admin_ok and (reached or form not in (path, f"{path}%0A") or not admin_ok), form
    for path in OPEN_PATHS:
        assert client.get(path).status_code == 200


def test_every_endpoint_but_health_needs_a_key(client_of: Any) -> None:
    client = client_of(FakeEngine(api_key="u"))
    routers = [getattr(route, "original_router", client.app) for route in client.app.routes]  # FastAPI keeps those that it includes whole
    paths = {route.path for router in routers for route in router.routes if hasattr(route, "path")}
    assert paths > {*OPEN_PATHS, *ADMIN_PATHS, "/v1/chat/completions", "/generate", "/metrics", "/docs"}
    assert {path for path in paths if status(client, path, None) != 401} == set(OPEN_PATHS)


def test_refusal_is_openais_error_object(client_of: Any) -> None:
    client = client_of(FakeEngine(api_key="u"))
    for headers in ({}, {"Authorization": "Basic u"}, {"Authorization": "u"}, {"Authorization": "Bearer wrong"}):
        response = client.get("/v1/models", headers=headers)
        error = response.json()["error"]
        assert response.status_code == 401 and error["type"] == "authentication_error" and error["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


def test_bearer_is_case_insensitive(client_of: Any) -> None:
    assert client_of(FakeEngine(api_key="u")).get("/v1/models", headers={"authorization": "bearer u"}).status_code == 200


@pytest.mark.parametrize(
    ("allowed", "origin", "answer"), [([], "https://a.b", None), (["https://a.b"], "https://a.b", "https://a.b"), (["*"], "https://c.d", "*")]
)
def test_pages_of_allowed_origins_may_call_from_a_browser(client_of: Any, allowed: list[str], origin: str, answer: str | None) -> None:
    client, url = client_of(FakeEngine(api_key="u", allowed_origins=allowed)), "/v1/completions"
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    assert client.options(url, headers=asked).status_code == (200 if answer else 401)  # a preflight request carries no key
    body = {"prompt": "x", "max_tokens": 2}
    for more in ({}, {"stream": True}):
        got = client.post(url, json=body | more, headers={"Origin": origin, "Authorization": "Bearer u"})
        assert got.status_code == 200 and got.headers.get("access-control-allow-origin") == answer
    assert client.post(url, json=body, headers={"Origin": origin}).status_code == 401
