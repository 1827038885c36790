"""The application: all endpoints, and what every request passes first."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from jaxengine import __version__
from jaxengine.engine.async_llm import AsyncLLM
from jaxengine.server import chat, completions, dev, page, responses, tokens
from jaxengine.server.errors import add_error_handlers
from jaxengine.server.generation import json_response
from jaxengine.server.metrics import FORMAT, make_registry, render
from jaxengine.server.middleware import LimitBody, NameRequests, RequireKey
from jaxengine.server.observe import Observer
from jaxengine.server.state import ServerSettings, ServerState

if TYPE_CHECKING:
    from jaxengine.server.tracing import RequestTracer


def make_app(llm: AsyncLLM, settings: ServerSettings, tracer: RequestTracer | None = None) -> FastAPI:
    """Makes the application of a model, which traces requests if it has a tracer."""
    # The pages that show the schema load scripts from elsewhere: there are none.
    app = FastAPI(title="jaxengine", version=__version__, docs_url=None, redoc_url=None)
    observer = Observer(llm.stats, log=settings.log_requests, tracer=tracer)
    server = app.state.server = ServerState(llm, settings, observer)
    add_error_handlers(app)
    app.add_middleware(LimitBody, max_body_size=settings.max_body_size)
    if settings.api_keys:
        app.add_middleware(RequireKey, api_keys=settings.api_keys)
    app.add_middleware(NameRequests)
    if settings.allowed_origins:  # outermost: a browser asks first without a key, and reads errors only if it may
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    for part in (completions, chat, responses, tokens, page):
        app.include_router(part.router)
    if settings.enable_dev_endpoints:
        app.include_router(dev.router)
    _add_models(app, server)
    _add_probes(app, server)
    return app


def _add_models(app: FastAPI, server: ServerState) -> None:
    created = int(time.time())

    def entry(name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "jaxengine",
            "root": server.settings.served_model_names[0],
            "parent": None,
            "max_model_len": server.llm.limits.max_model_len,
        }

    @app.get("/v1/models")
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [entry(name) for name in server.settings.served_model_names]})

    @app.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> Response:
        return json_response(entry(server.model_name(model)))


def _add_probes(app: FastAPI, server: ServerState) -> None:
    registry = make_registry(server)

    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    async def health(request: Request) -> Response:
        server.llm.check_alive(server.settings.health_timeout)
        return Response()

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(render(registry), media_type=FORMAT)
