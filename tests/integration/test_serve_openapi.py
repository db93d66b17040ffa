"""The OpenAPI document is true: a fuzzer that reads it gets no answer of which it does not tell."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from torchdlrm.serving.front.app import build_app
from torchdlrm.serving.front.openapi import document
from torchdlrm.serving.options import ServeOptions
from torchdlrm.serving.service.service import Service

CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("response_headers_conformance", "unsupported_method", "allow_header_conformance"),
)
NUM_OPERATIONS = 14
# How wrong data are refused: 413 is for too many rows, which a schema says too.
REFUSED = {"checks": {"negative_data_rejection": {"expected-statuses": ["400", "413", "415"]}}}


@pytest.fixture(scope="module")
def api(serve, small_bundle):
    import schemathesis  # takes seconds, which only the process that runs this module has to wait
    from schemathesis.config import SchemathesisConfig

    server = serve(small_bundle, "--log-level", "warning")
    yield schemathesis.openapi.from_url(f"{server.url}/openapi.json", config=SchemathesisConfig.from_dict(REFUSED))
    code, log = server.stop()
    assert code == 0
    assert [line for line in log if line["level"] == "error"] == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_a_fuzzer_finds_nothing_that_the_document_does_not_say(api, mode):
    operations = [found.ok() for found in api.get_all_operations()]
    assert len(operations) == NUM_OPERATIONS
    for operation in operations:
        takes_body = operation.method == "post" and "reload" not in operation.path
        if mode == "positive" or takes_body:  # elsewhere nothing could be wrong
            fuzz(operation, mode, num_examples=30 if takes_body else 3)


def fuzz(operation, mode, num_examples):
    from schemathesis.generation import GenerationMode

    @settings(
        max_examples=num_examples,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(case=operation.as_strategy(GenerationMode(mode)))
    def check(case):
        case.call_and_validate(checks=[*map(check_named, CHECKS), *map(check_named, exact_checks(case))], timeout=10)

    check()


def check_named(name):
    from schemathesis import checks
    from schemathesis.specs.openapi import checks as of_openapi

    return getattr(of_openapi, name, None) or getattr(checks, name)


def exact_checks(case):
    """That data are taken exactly when they are as the document says: where a schema can say how they must be.

    It cannot say that the sizes of a tensor and the number of its values belong together, nor that two objects have no
    key in common.
    """
    if case.path != "/predict":
        return []
    body = case.body if isinstance(case.body, dict) else {}
    shared, candidates = body.get("shared"), body.get("candidates")
    objects = candidates if isinstance(shared, dict) and isinstance(candidates, list) else []
    if any(isinstance(candidate, dict) and shared.keys() & candidate for candidate in objects):
        return ["negative_data_rejection"]
    return ["negative_data_rejection", "positive_data_acceptance"]


def test_every_route_but_the_page_stands_in_the_document(small_bundle):
    service = Service(small_bundle, ServeOptions(), lambda: None)
    routes = {
        route.path: {method.lower() for method in route.methods - {"HEAD"}} for route in build_app(service)._app.routes
    }
    of_the_page = {path for path in routes if path == "/" or path.startswith("/page/")}
    described = {path: set(item) - {"parameters"} for path, item in document(service)["paths"].items()} | {
        "/openapi.json": {"get"}
    }
    service.close()
    assert {path: methods for path, methods in routes.items() if path not in of_the_page} == described
