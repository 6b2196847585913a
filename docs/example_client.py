"""A client of the service in one file: launch a run, follow it live, ask the log. Needs httpx and nothing of AsyncOPD.

python docs/example_client.py http://127.0.0.1:8321 quickstart learner.num_steps=20
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import httpx


class Client:
    """The resources of openapi.json by their operation ids."""

    def __init__(self, url: str, token: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=60)
        document = self._http.get("/openapi.json").raise_for_status().json()
        self._operations = {
            operation["operationId"]: (method, path)
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
        }

    def call(
        self, operation_id: str, *, body: Any = None, headers: dict[str, str] | None = None, **parameters: Any
    ) -> Any:
        """One request; `parameters` fill the path, the rest becomes the query. Raises RuntimeError with the problem."""
        method, path = self._operations[operation_id]
        query = {name: value for name, value in parameters.items() if f"{{{name}}}" not in path}
        response = self._http.request(method, path.format(**parameters), params=query, json=body, headers=headers)
        if response.is_error:
            raise RuntimeError(response.json()["detail"])
        return response.json()

    def follow(self, run_id: str) -> Iterator[dict[str, Any]]:
        """Events of a run until its end; goes on where it left off when the service restarts."""
        seen = ""
        while True:
            try:
                with self._http.stream(
                    "GET", f"/v1/runs/{run_id}/events/stream", headers={"Last-Event-ID": seen}, timeout=None
                ) as response:
                    response.raise_for_status()
                    for line in response.iter_lines():
                        name, _, value = line.partition(": ")
                        if name == "id":
                            seen = value
                        elif name == "data":
                            event = json.loads(value)
                            yield event
                            if event["kind"] == "end":
                                return
            except httpx.TransportError:
                continue


def main(url: str, config_name: str, *assignments: str) -> None:
    client = Client(url, os.environ.get("ASYNCOPD_TOKEN"))
    overrides = {key: json.loads(value) for key, _, value in (text.partition("=") for text in assignments)}
    run = client.call(
        "create_run",
        body={"config_name": config_name, "overrides": overrides},
        headers={"Idempotency-Key": str(uuid.uuid4())},  # a repeat after a lost answer launches nothing new
    )
    for event in client.follow(run["id"]):
        print(event["message"])
    sql = "SELECT version, accuracy, kl_nats FROM evals ORDER BY version"
    result = client.call("run_sql", body={"sql": sql, "runs": [run["id"]]})
    print(*result["columns"], sep="\t")
    for row in result["rows"]:
        print(*row, sep="\t")


if __name__ == "__main__":
    main(*sys.argv[1:])
