"""What the interface says of itself: every answer it may give, and its page, plain HTML without a script."""

from __future__ import annotations

from html import escape
from typing import Any

from .guard import COOKIE, OPEN
from .schemas import Failure

CODES = {
    400: "The request cannot be used",
    401: "The token is missing or another one",
    403: "A page of another site asks",
    404: "No such image",
    408: "The body took too long to arrive",
    413: "The body is too long",
    415: "The body is not JSON",
    421: "Host is not a name of this server",
    422: "A field is wrong",
    429: "Too many requests wait",
    503: "Not now: no memory, no time, no encoder, or the server is starting or stopping",
}
POSTED = (400, 408, 413, 415, 422, 429)  # may be said to whoever sends a body
SCHEMES = {"token": {"type": "http", "scheme": "bearer"}, "cookie": {"type": "apiKey", "in": "cookie", "name": COOKIE}}


def failing(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route, as FastAPI takes them."""
    return {code: {"model": Failure, "description": CODES[code]} for code in codes}


def complete(app: Any, token: bool) -> None:
    """Add to the OpenAPI description of an application what the guard may answer before a route is reached."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            api = plain()
            for path, methods in api["paths"].items():
                for method, entry in methods.items():
                    closed = token and path not in OPEN
                    codes = {403, 421, *(POSTED if method == "post" else ()), *((401,) if closed else ())}
                    given = entry["responses"] | {str(code): _answer(code) for code in codes}
                    entry["responses"] = dict(sorted(given.items()))
                    if closed:
                        entry["security"] = [{name: []} for name in SCHEMES]
            if token:
                api["components"]["securitySchemes"] = SCHEMES
            for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's form, which is never sent
                api["components"]["schemas"].pop(name, None)
        return app.openapi_schema

    app.openapi = openapi


def _answer(code: int) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Failure"}
    return {"description": CODES[code], "content": {"application/json": {"schema": schema}}}


def page(api: dict[str, Any]) -> str:
    """HTML of an OpenAPI description."""
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
             "<title>clipworks: interface</title><link rel=stylesheet href=/style.css><body class=docs><main>",
             f"<h1>{escape(api['info']['title'])} {escape(api['info']['version'])}</h1>",
             f"<p>{escape(api['info'].get('description', ''))} The description for programs is ",
             "<a href=/openapi.json>openapi.json</a>; <a href=/>back to the page</a>.</p>"]  # fmt: skip
    schemas = api.get("components", {}).get("schemas", {})
    for path, methods in api["paths"].items():
        for method, entry in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(entry.get('description', ''))}</p>")
            body = entry.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if body:
                parts += ["<h3>Request</h3>", _table(_resolved(body, schemas))]
            for code, answer in entry.get("responses", {}).items():
                found = answer.get("content", {}).get("application/json", {}).get("schema")
                if code == "200" and found and "$ref" in found:
                    parts += ["<h3>Answer</h3>", _table(_resolved(found, schemas))]
            codes = [f"{code} {escape(a.get('description', ''))}" for code, a in entry.get("responses", {}).items()]
            parts.append(f"<p class=quiet>{'; '.join(codes)}</p>")
    return "\n".join([*parts, "</main></body></html>"])


def _resolved(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    return schemas.get(schema.get("$ref", "").rsplit("/", 1)[-1], schema)


def _table(schema: dict[str, Any]) -> str:
    rows = []
    for name, field in schema.get("properties", {}).items():
        must = "required" if name in schema.get("required", []) else ""
        limits = ", ".join(_limits(field))
        cells = (f"<code>{escape(name)}</code>", escape(_type(field)), must, escape(limits),
                 escape(field.get("description", "")))  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return field["$ref"].rsplit("/", 1)[-1]
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(part) for part in field["anyOf"]))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return {"null": "nothing", "object": "table"}.get(field.get("type", ""), field.get("type", "anything"))


def _limits(field: dict[str, Any]) -> list[str]:
    names = {"minimum": "at least", "maximum": "at most", "maxLength": "characters at most", "minItems": "entries from",
             "maxItems": "entries at most", "pattern": "form"}  # fmt: skip
    options = [field, *field.get("anyOf", [])]
    return list(dict.fromkeys(f"{text} {part[key]}" for part in options for key, text in names.items() if key in part))
