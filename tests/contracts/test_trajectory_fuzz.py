"""Whatever is sent to the trajectory server, by its own schema or against it: an answer, never a 5xx. Seeded."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from atropos_servers import AtroposServer, our_server, scored
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.core import NotSet
from schemathesis.generation import GenerationMode

NUM_EXAMPLES = 10
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
FUZZ = settings(
    max_examples=NUM_EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[AtroposServer]:
    """One server for all of them, in whatever state the others left it."""
    with our_server(tmp_path_factory.mktemp("fuzz")) as server:
        server.start()
        server.register_env()
        yield server


@pytest.fixture(scope="module")
def operations(server) -> dict[str, Any]:
    schema = schemathesis.openapi.from_dict(server.http.app.openapi())  # type: ignore[attr-defined]
    return {operation.ok().label: operation.ok() for operation in schema.get_all_operations()}


LABELS = [
    *("GET /", "GET /health", "GET /status", "GET /batch", "GET /latest_example", "GET /wandb_info", "GET /info"),
    *("GET /status-env", "POST /register", "POST /register-env"),
    *("POST /disconnect-env", "POST /scored_data", "POST /scored_data_list", "POST /permits", "POST /groups"),
    *("POST /permits/{permit_id}/give_back", "POST /start", "POST /lease", "POST /acknowledge", "POST /commit"),
    *("GET /reset_data", "GET /ui/run", "GET /ui/steps", "GET /ui/rollouts", "GET /metrics"),
]


def test_every_route_is_fuzzed(operations):
    assert set(operations) == set(LABELS)


def to_json(body: Any) -> bytes:
    if isinstance(body, bytes | NotSet):
        return body if isinstance(body, bytes) else b""
    return json.dumps(body, default=repr).encode()


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", LABELS)
def test_no_request_is_the_servers_fault(server, operations, label, mode):
    operation = operations[label]
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query or operation.path_parameters):
        return

    @FUZZ
    @given(operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("timeout_seconds"), int | float):
            case.body["timeout_seconds"] = 0.0
        raw = (
            case.body if isinstance(case.body, bytes) else b"" if isinstance(case.body, NotSet) else to_json(case.body)
        )
        query = {name: str(value) for name, value in (case.query or {}).items()}
        answer = server.http.request(case.method, case.formatted_path, params=query, content=raw, headers=JSON)
        assert answer.status_code < 500, (raw, answer.text)

    send()


@FUZZ
@given(data=st.data())
def test_no_mutation_of_a_group_is_the_servers_fault_and_what_it_takes_can_be_served(tmp_path_factory, data):
    """A field replaced by any JSON, deep or huge or not a number: refused, or stored and handed out again."""
    numbers = st.floats() | st.integers() | st.booleans() | st.none() | st.text(max_size=3)
    anything = st.recursive(numbers, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner))
    fields = data.draw(st.sets(st.sampled_from([*scored(0), "messages", "images", "overrides", "generation_params"])))
    group = scored(1) | {field: data.draw(anything) for field in fields}
    with our_server(tmp_path_factory.mktemp("mutated")) as server:
        server.start(batch_size=2)
        answer = server.http.post("/scored_data", content=to_json(group), headers=JSON)
        assert answer.status_code < 500, answer.text
        if answer.status_code == 200:
            assert server.get("/batch").json()["batch"][0]["tokens"] == group["tokens"]
