"""What the service refuses, and that every refusal is a problem document without secrets."""

from __future__ import annotations

import hmac
import logging
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from service_world import CONFIGS, DONE, LIVE, client_of, make_root, settings_of

from api import deps as security
from api.deps import Scope, TokenStore
from api.main import create_app
from asyncopd.errors import ConfigError

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAVERYSECRETID",
    "AWS_SECRET_ACCESS_KEY": "very/secret+key",
    "AWS_SESSION_TOKEN": "very-secret-session",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secure")
    make_root(folder / "runs")
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> TestClient:
    return client_of(settings_of(str(folder / "runs"), folder), raise_server_exceptions=False)


def is_problem(response: object, status: int, kind: str) -> None:
    assert response.status_code == status, response.text  # type: ignore[attr-defined]
    assert response.headers["content-type"] == "application/problem+json"  # type: ignore[attr-defined]
    body = response.json()  # type: ignore[attr-defined]
    assert (body["status"], body["type"]) == (status, f"urn:asyncopd:problem:{kind}")
    assert len(body["detail"]) > 10


def test_every_error_is_a_problem_document(client: TestClient, folder: Path) -> None:
    is_problem(client.get("/v1/nothing"), 404, "no-such-resource")
    is_problem(client.get("/static/nothing.js"), 404, "no-such-resource")
    is_problem(client.get("/v1/runs/nobody"), 404, "no-such-run")
    refused = client.delete(f"/v1/runs/{DONE}")
    is_problem(refused, 405, "no-such-method")
    assert refused.headers["allow"] == "GET"
    both = client.put("/v1/runs")
    is_problem(both, 405, "no-such-method")
    assert both.headers["allow"] == "GET, POST"
    is_problem(client.get("/v1/runs", params={"statuss": "failed"}), 422, "unknown-parameter")
    is_problem(client.get("/v1/runs", params={"limit": 0}), 422, "not-valid")
    is_problem(client.post("/v1/runs", json={"unknown": 1}), 422, "not-valid")
    unlabelled = client.post("/v1/runs", content=b'{"config_name": "quickstart"}')  # as `curl -d` sends it
    is_problem(unlabelled, 422, "not-valid")
    assert "Content-Type: application/json" in unlabelled.json()["detail"]
    is_problem(client.post("/v1/sql", content=b"{", headers={"content-type": "application/json"}), 400, "not-json")
    is_problem(
        client.post("/v1/sql", content=b"\xff\xfe", headers={"content-type": "application/json"}), 400, "not-json"
    )


def test_large_bodies_are_refused_by_header_and_by_count(client: TestClient) -> None:
    big = b'{"sql": "' + b"x" * 1_100_000 + b'"}'
    is_problem(client.post("/v1/sql", content=big), 413, "body-too-large")
    chunks = (big[start : start + 100_000] for start in range(0, len(big), 100_000))
    streamed = client.post("/v1/sql", content=chunks, headers={"content-type": "application/json"})
    assert streamed.status_code == 413
    assert streamed.headers["content-type"] == "application/problem+json"


def test_a_client_that_asks_too_often_is_told_when_to_come_back(folder: Path) -> None:
    client = client_of(settings_of(str(folder / "runs"), folder, requests_per_s=2.0))
    answers = [client.get("/healthz") for _ in range(8)]
    assert [answer.status_code for answer in answers[:4]] == [200] * 4
    is_problem(answers[-1], 429, "too-many-requests")
    assert int(answers[-1].headers["retry-after"]) >= 1


def test_a_bug_says_nothing_about_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(settings_of(str(folder / "runs"), folder))
    monkeypatch.setattr(app.state.reader, "ids", lambda: 1 / 0)
    response = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False).get("/v1/runs")
    is_problem(response, 500, "internal")
    assert "ZeroDivision" not in response.text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_foreign_host_is_refused_on_loopback(client: TestClient, host: str) -> None:
    is_problem(client.get("/v1/runs", headers={"host": host}), 403, "foreign-host")


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"origin": "http://127.0.0.1:9999"},
    ],
)
def test_pages_of_other_sites_change_nothing(client: TestClient, headers: dict[str, str]) -> None:
    is_problem(client.post(f"/v1/runs/{LIVE}/cancel", headers=headers), 403, "foreign-page")
    assert client.get(f"/v1/runs/{LIVE}").json()["status"] == "running"
    assert "access-control-allow-origin" not in client.get("/v1/runs", headers=headers).headers


@pytest.mark.parametrize("path", ["/", "/v1/runs", "/v1/nothing", "/static/app.js", "/healthz", "/openapi.json"])
def test_every_answer_has_the_protective_headers(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "script-src" not in policy  # scripts fall under default-src: no inline ones
    assert "http" not in policy  # nobody else's assets
    assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
    assert headers["referrer-policy"] == "no-referrer"


TRAVERSALS = [
    "..",
    "../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e",
    ".hidden",
    "a/../../b",
    "a%00b",
    "%2fetc",
    "C:\\x",
    "x" * 101,
    "é",
    " ",
]


@pytest.mark.parametrize("name", TRAVERSALS)
def test_run_ids_cannot_leave_the_root(client: TestClient, name: str) -> None:
    rests = (
        "",
        "/config",
        "/events",
        "/events/stream",
        "/metrics",
        "/staleness",
        "/throughput",
        "/policies",
        "/checkpoints",
        "/evals",
        "/timeline",
        "/trajectories",
        "/trajectories/0",
    )
    answers = [client.get(f"/v1/runs/{name}{rest}") for rest in rests]
    answers += [
        client.post(f"/v1/runs/{name}/{verb}", json={}) for verb in ("cancel", "pause", "resume", "replay", "backfill")
    ]
    answers.append(client.post("/v1/sql", json={"sql": "SELECT 1", "runs": [name]}))
    answers.append(client.post("/v1/runs", json={"config_name": "quickstart", "run_id": name}))
    answers.append(client.get("/v1/runs", params={"after": name}))
    for answer in answers:
        # `..` is resolved by clients before it is sent, and then names another resource.
        assert answer.status_code in (404, 405, 422), (answer.request.url, answer.text)
        assert "root:" not in answer.text


@pytest.mark.parametrize("name", ["../pyproject", "..%2fpyproject", "/etc/passwd", "quickstart.yaml", "", "a/b", "*"])
def test_config_names_resolve_in_their_folder_only(client: TestClient, name: str) -> None:
    answer = client.post("/v1/runs", json={"config_name": name})
    assert answer.status_code == 422
    assert "[project]" not in answer.text


@pytest.mark.parametrize(
    "path", ["/static/../main.py", "/static/..%2fmain.py", "/static/%2e%2e/main.py", "/static//etc/passwd"]
)
def test_assets_come_from_their_folder_only(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


# -- tokens -------------------------------------------------------------------------------------------------------
def test_tokens_are_kept_hashed_in_a_file_of_their_owner(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tokens.json"
    token = TokenStore(path).create("ci", Scope.READ)
    assert path.stat().st_mode & 0o777 == 0o600
    assert token not in path.read_text()
    with pytest.raises(ConfigError, match="already"):
        TokenStore(path).create("ci", Scope.ADMIN)


def test_a_service_others_can_reach_does_not_start_without_a_token(tmp_path: Path) -> None:
    settings = settings_of(str(tmp_path / "runs"), tmp_path, host="0.0.0.0")
    with pytest.raises(ConfigError, match="asyncopd token create"):
        create_app(settings)
    TokenStore(settings.tokens).create("ci", Scope.READ)
    create_app(settings)


def test_tokens_are_required_checked_and_revoked_at_once(tmp_path: Path) -> None:
    settings = settings_of(make_root(tmp_path / "runs"), tmp_path, host="0.0.0.0")
    store = TokenStore(settings.tokens)
    reading, launching = store.create("reader", Scope.READ), store.create("launcher", Scope.LAUNCH)
    client = client_of(settings)

    def asked(token: str | None, method: str = "GET", path: str = "/v1/runs") -> object:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        return client.request(method, path, headers=headers, json={} if method == "POST" else None)

    missing = asked(None)
    is_problem(missing, 401, "token-missing")
    assert missing.headers["www-authenticate"] == "Bearer"  # type: ignore[attr-defined]
    is_problem(asked("aopd_wrong"), 401, "token-unknown")
    is_problem(asked(reading[:-1]), 401, "token-unknown")
    assert asked(reading).status_code == 200  # type: ignore[attr-defined]
    is_problem(asked(reading, "POST", f"/v1/runs/{DONE}/cancel"), 403, "scope-missing")
    is_problem(asked(reading, "POST", f"/v1/runs/{DONE}/replay"), 403, "scope-missing")
    is_problem(asked(launching, "POST", f"/v1/runs/{DONE}/cancel"), 409, "run-is-over")
    store.revoke("reader")
    is_problem(asked(reading), 401, "token-unknown")


def test_every_resource_but_health_needs_a_token_where_others_can_reach_it(tmp_path: Path) -> None:
    settings = settings_of(make_root(tmp_path / "runs"), tmp_path, host="0.0.0.0")
    TokenStore(settings.tokens).create("ci", Scope.READ)
    client = client_of(settings)
    paths = client.get("/openapi.json").json()["paths"]
    for path, methods in paths.items():
        for method in methods:
            answer = client.request(method, path.replace("{run_id}", DONE).replace("{index}", "0"))
            is_open = path in ("/healthz", "/readyz")
            assert (answer.status_code == 401) != is_open, (method, path, answer.status_code)


def test_a_wrong_token_is_refused_on_loopback_too(client: TestClient) -> None:
    assert client.get("/v1/runs", headers={"authorization": "Bearer nonsense"}).status_code == 401


def test_tokens_are_compared_in_constant_time_with_every_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TokenStore(tmp_path / "tokens.json")
    tokens = [store.create(f"t{number}", Scope.READ) for number in range(3)]
    compared = []

    def compare(a: str, b: str) -> bool:
        compared.append((a, b))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(security, "hmac", type("Recorded", (), {"compare_digest": staticmethod(compare)}))
    assert store.client_of(tokens[0]) is not None
    assert len(compared) == 3  # the first match does not end it


def test_secrets_of_the_environment_are_in_no_answer_and_no_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PREFECT_API_URL", "http://user:hunter2@127.0.0.1:9/api")
    client = client_of(settings_of(str(folder / "runs"), folder), raise_server_exceptions=False)
    with caplog.at_level(logging.DEBUG):
        texts = [
            client.get(path).text
            for path in (
                "/v1/configs",
                "/readyz",
                "/metrics",
                "/v1/runs",
                "/openapi.json",
                f"/v1/runs/{DONE}/config",
                "/v1/nothing",
            )
        ]
        texts.append(client.post("/v1/runs", json={"config_name": "quickstart"}).text)
        body = {"config_name": "quickstart", "overrides": {"name": "$AWS_SECRET_ACCESS_KEY"}}
        texts.append(client.post("/v1/runs", json=body).text)
        for sql in (
            "SELECT getenv('AWS_SECRET_ACCESS_KEY')",
            "FROM duckdb_secrets()",
            "FROM duckdb_settings()",
            "SELECT current_setting('s3_secret_access_key')",
            "FROM read_text('/proc/self/environ')",
        ):
            texts.append(client.post("/v1/sql", json={"sql": sql}).text)
    for secret in (*SECRETS.values(), "hunter2"):
        assert not [text for text in (*texts, caplog.text) if secret in text]


def test_configurations_folder_is_what_is_served(client: TestClient) -> None:
    listed = {config["name"] for config in client.get("/v1/configs").json()["data"]}
    assert listed == {path.stem for path in CONFIGS.glob("*.yaml")}
