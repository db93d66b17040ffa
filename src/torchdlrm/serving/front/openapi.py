"""Writes the OpenAPI document of a server, with the columns of the model that it serves.

In: a `Service`.  Out: the document.  It is written by hand, because what a row may hold depends on the bundle; a fuzzer
holds the server to it.
"""

from typing import Any

from torchdlrm import __version__
from torchdlrm.features.columns import Feature, SparseColumn
from torchdlrm.prediction.explain import METHOD
from torchdlrm.prediction.json_rows import RowNames
from torchdlrm.serving.front.open_inference.columns import OUTPUT
from torchdlrm.serving.front.open_inference.tensors import DATATYPES
from torchdlrm.serving.service.service import Service

Json = dict[str, Any]


def document(service: Service) -> Json:
    """Make the document for the bundle that is served now."""
    served = service.bundles.current
    names = RowNames(served.schema)
    row = {
        "type": "object",
        "description": "Cells by column name; a column that is left out, null or empty is a missing value.",
        "properties": {key: _cell(column) for column in served.schema.features for key in names.keys(column)},
        "additionalProperties": False,
    }
    secured = bool(service.options.api_keys)
    return {
        "openapi": "3.1.0",
        "info": {"title": f"torchdlrm: {service.name}", "version": __version__},
        "paths": _paths(service, secured=secured),
        "components": {
            "schemas": {"Row": row, **_schemas(service)},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
        **({"security": [{"bearer": []}, {"key": []}]} if secured else {}),
    }


def _cell(column: Feature) -> Json:
    cell = column.value_kind.openapi
    kinds = [cell, {"type": "null"}]
    if isinstance(column, SparseColumn) and column.weight_separator is not None:
        # A value may stand with its weight behind it, as a text.
        kinds += [{"type": "string"}, {"type": "array", "items": {"anyOf": [cell, {"type": "string"}]}}]
        kinds.append({"type": "object", "additionalProperties": {"type": "number"}})
    elif isinstance(column, SparseColumn) and column.is_multi_valued:
        kinds.append({"type": "array", "items": cell})
    return {"anyOf": kinds}


def _schemas(service: Service) -> Json:
    rows: Json = {"type": "array", "items": _ref("Row"), "maxItems": service.options.max_rows_per_request}
    names = [column.name for column in service.bundles.current.schema.columns]
    tensor: Json = {
        "type": "object",
        "required": ["name", "datatype", "shape"],
        "properties": {
            "name": {"enum": sorted({*names, "dense", "sparse"})},
            "datatype": {"enum": list(DATATYPES)},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1, "maxItems": 2},
            "parameters": {"type": "object"},
            "data": {"type": "array"},
        },
    }
    number = {"type": "number"}
    probability = number | {"minimum": 0, "maximum": 1}
    adds = {"type": "object", "additionalProperties": number}
    explanation: Json = {"prediction": probability, "logit": number, "contributions": adds}
    others: Json = {}
    output: Json = {"const": OUTPUT}
    if len(labels := service.bundles.current.labels) > 1:
        explanation |= {"labels": _object(dict.fromkeys(labels, probability)), "label": {"enum": labels}}
        others["labels"] = _object({name: {"type": "array", "items": probability} for name in labels})
        output = {"enum": service.bundles.current.schema.label_columns(OUTPUT)}
    return {
        "Rows": rows,
        "PredictRequest": {
            "anyOf": [
                _ref("Rows"),
                _object({"rows": _ref("Rows")}),
                {
                    **_object({"shared": _ref("Row"), "candidates": {**rows, "minItems": 1}}),
                    "description": "Rows that share columns; a candidate has none of the shared ones.",
                },
            ]
        },
        "Predictions": _answers("predictions", probability, others),
        "Explanations": _answers("explanations", _object(explanation), {"method": {"const": METHOD}}),
        "InferRequest": {
            "type": "object",
            "required": ["inputs"],
            "properties": {
                "id": {"type": "string", "maxLength": 256},
                "parameters": {"type": "object"},
                "inputs": {"type": "array", "items": tensor, "minItems": 1},
                "outputs": {"type": "array", "items": {"type": "object", "properties": {"name": output}}},
            },
        },
        "InferResponse": {
            "type": "object",
            "required": ["model_name", "model_version", "outputs"],
            "properties": {
                "model_name": {"type": "string"},
                "model_version": {"type": "string"},
                "id": {"type": "string"},
                "parameters": {"type": "object", "properties": {"period": {"type": "integer", "minimum": 0}}},
                "outputs": {"type": "array", "items": {"type": "object"}},
            },
        },
        "Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}},
        "Object": {"type": "object"},
    }


def _paths(service: Service, *, secured: bool) -> Json:
    paths: Json = {
        "/predict": {"post": _operation("Probabilities of rows", "Predictions", "PredictRequest", *_REFUSED)},
        "/explain": {"post": _operation("What features add to logits", "Explanations", "PredictRequest", *_REFUSED)},
        "/schema": {"get": _operation("The model's columns, and example rows", "Object")},
        "/metrics": {"get": _operation("Metrics for Prometheus", None)},
        "/admin/reload": {"post": _operation("Serve what the bundle's path holds now", "Object", None, 403, 409)},
        "/v2": {"get": _operation("The server", "Object")},
        "/v2/health/live": {"get": {**_operation("Whether it runs", "Object", None, 503), "security": []}},
        "/v2/health/ready": {"get": {**_operation("Whether it takes requests", "Object", None, 503), "security": []}},
    }
    if len(labels := service.bundles.current.labels) > 1:
        paths["/explain"]["parameters"] = [{"name": "label", "in": "query", "schema": {"enum": labels}}]
    model = _parameter("name", service.name)
    version = _parameter("version", service.bundles.current.version)
    for path, parameters in (
        ("/v2/models/{name}", [model]),
        ("/v2/models/{name}/versions/{version}", [model, version]),
    ):
        paths[path] = {"parameters": parameters, "get": _operation("The model's tensors", "Object", None, 404)}
        ready = _operation("Whether the model takes requests", "Object", None, 404, 503)
        paths[f"{path}/ready"] = {"parameters": parameters, "get": ready}
        infer = _operation("Probabilities of rows, as tensors", "InferResponse", "InferRequest", 404, *_REFUSED)
        # The bytes of tensors may follow the JSON; their sizes stand in it, which no schema can say.
        infer["responses"]["200"]["content"]["application/octet-stream"] = {}
        paths[f"{path}/infer"] = {"parameters": parameters, "post": infer}
    code, reason = "403", "asked by a name that is not the server's, or by a page of another site"
    if secured:
        code, reason = "401", "no API key, or another one"
    for item in paths.values():
        for method in ("get", "post"):
            if method in item and item[method].get("security") != []:
                item[method]["responses"].setdefault(code, _answer("Error", reason))
    return paths


_REASONS = {
    400: "the body is not what is taken; the message says which row and column",
    403: "the server has no API key, without which there is no swap over HTTP",
    404: "there is no such model, or no such version",
    408: "the body did not come in time",
    409: "the new bundle cannot be served; the old one is, as before",
    413: "too many bytes, or too many rows",
    415: "the body is compressed",
    500: "the server failed",
    503: "too much to do; Retry-After says when to ask again",
    504: "the deadline passed",
}
_REFUSED = (400, 408, 413, 415, 500, 503, 504)


def _operation(summary: str, answer: str | None, request: str | None = None, *errors: int) -> Json:
    responses = {str(code): _answer("Error", _REASONS[code]) for code in errors}
    if 503 in errors:
        responses["503"]["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "s"}}
    else:
        responses["503"] = _answer("Error", _REASONS[503])  # the middleware refuses what is one too many
    operation: Json = {"summary": summary, "responses": {"200": _answer(answer, "done"), **responses}}
    if request is not None:
        content = {"application/json": {"schema": _ref(request)}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _answer(schema: str | None, description: str) -> Json:
    content = {"text/plain": {}} if schema is None else {"application/json": {"schema": _ref(schema)}}
    return {"description": description, "content": content}


def _answers(name: str, item: Json, others: Json | None = None) -> Json:
    text = {"type": "string"}
    about = {"model": text, "version": text, **(others or {})}
    return _object({name: {"type": "array", "items": item}, **about}, {"period": {"type": "integer", "minimum": 0}})


def _object(required: Json, others: Json | None = None) -> Json:
    return {
        "type": "object",
        "required": list(required),
        "properties": required | (others or {}),
        "additionalProperties": False,
    }


def _parameter(name: str, value: str) -> Json:
    schema = {"type": "string", "minLength": 1, "examples": [value]}
    return {"name": name, "in": "path", "required": True, "schema": schema, "example": value}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}
