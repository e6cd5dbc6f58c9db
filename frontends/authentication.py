"""Tenants' keys for vLLM's own authentication, which answers strangers on every route.

vLLM's middleware is replaced by a sub-class in the same place, or put there if vLLM has no key of
its own. Which paths it guards and what it answers stay vLLM's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tenants import TenantFile


_AUTHORIZATION = b"authorization"


def shown(scope: Any) -> bytes | None:
    """Return the `Authorization` header of a request, None where there is none."""
    for name, value in scope["headers"]:
        if name == _AUTHORIZATION:
            found: bytes = value
            return found
    return None


def install(app: Any, keys: list[str], tenants: TenantFile) -> None:
    """Have vLLM's authentication take tenants' keys, on every route that it guards.

    `app`: vLLM's application, before it serves; `keys`: its own `--api-key`s.
    """
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    class TenantAuthentication(AuthenticationMiddleware):  # type: ignore[misc]
        def verify_token(self, headers: Any) -> bool:
            given = headers.get("authorization")
            key = None if given is None else given.encode("latin-1")
            return tenants.book.of(key) is not None

    # Where vLLM puts its own when there are keys: around CORS, within all others.
    layers = app.user_middleware
    ours = Middleware(TenantAuthentication, tokens=keys)
    place = next((n for n, one in enumerate(layers) if one.cls is CORSMiddleware), len(layers))
    layers[:] = [
        one
        for one in (*layers[:place], ours, *layers[place:])
        if one.cls is not AuthenticationMiddleware
    ]
    if app.middleware_stack is not None:
        # A part of vLLM for SageMaker has built it already. Nothing is served yet.
        app.middleware_stack = app.build_middleware_stack()
