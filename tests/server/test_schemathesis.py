"""Requests made from the server's own description: nothing crashes, and answers are what the description promises.

Schemathesis makes requests that fit the description and others that do not, for every operation, and compares each
answer's status, content type and body with the document at `/openapi.json`. A request that fits may still be refused
with 400 (a picture that is none, parts that cancel), but never with 422, which says that a field does not fit.
"""

import pytest
from hypothesis import HealthCheck, given, settings

from clipworks.server.app import create_app

schemathesis = pytest.importorskip("schemathesis")
ignored_auth = pytest.importorskip("schemathesis.specs.openapi.checks").ignored_auth
GenerationMode = pytest.importorskip("schemathesis.generation").GenerationMode

TOKEN = "a-token-of-some-letters"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
TAKING = ["/search", "/embed", "/classify", "/segment", "/inspect", "/compare", "/login", "/images/{item}"]
PLAIN = ["/map", "/collection", "/healthz", "/readyz", "/metrics"]


@pytest.fixture(scope="module")
def described(place):
    guard = create_app(place / "kept", token=TOKEN, hosts=["testserver"])

    async def app(scope, receive, send):
        if scope["type"] == "http":  # every call would start the server and stop it
            await guard(scope, receive, send)

    loaded = schemathesis.openapi.from_asgi("/openapi.json", app, headers=HEADERS)
    loaded.config.checks.positive_data_acceptance.expected_statuses = ["2xx", "400", "401", "404"]
    return loaded


def ask(described, path, mode, count):
    """Send up to so many requests to an operation, check every answer, and return how many were sent."""
    operation = described[path]["GET" if path in PLAIN or "{" in path else "POST"]

    sent = []

    @settings(max_examples=count, deadline=None, database=None, derandomize=count < 100,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(operation.as_strategy(generation_mode=mode))
    def test(case):
        case.call_and_validate(headers=HEADERS, excluded_checks=[ignored_auth])  # it takes our header for none
        sent.append(case)

    test()
    return len(sent)


def test_every_operation_is_asked_and_says_whether_it_needs_the_token(described):
    paths = described.raw_schema["paths"]
    assert set(paths) == {*TAKING, *PLAIN}
    for path, methods in paths.items():
        for method, entry in methods.items():
            operation = described[path][method]
            case = operation.Case(body={}) if method == "post" else operation.Case(path_parameters={"item": "0" * 16})
            closed = "security" in entry
            for headers in (None, {"authorization": "Bearer of-another-server"}):
                assert (case.call(headers=headers).status_code == 401) is closed, path
            assert closed is (path not in ("/healthz", "/readyz", "/login"))
            assert closed <= ("401" in entry["responses"])


@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
@pytest.mark.parametrize("path", TAKING)
def test_answers_are_as_described(described, path, mode):
    assert ask(described, path, mode, 10)


@pytest.mark.parametrize("path", PLAIN)
def test_answers_to_requests_without_fields(described, path):
    assert ask(described, path, GenerationMode.POSITIVE, 2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
@pytest.mark.parametrize("path", TAKING)
def test_many_answers_are_as_described(described, path, mode):
    assert ask(described, path, mode, 1000)
