"""What a tenant's entry in the file makes of its requests on their way to the engine.

Pure: imports neither vLLM nor torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scalellm_plugins.scheduling import terms

if TYPE_CHECKING:
    from .tenants import Tenant

_SALT = "scalellm."
"""How salts of ours begin."""


class Bound:
    """One tenant's, put together once for all requests."""

    __slots__ = ("_fixed", "_isolated", "_name", "extra", "key", "priority")

    def __init__(self, tenant: Tenant) -> None:
        given = {
            terms.TENANT: tenant.name,
            terms.WEIGHT: tenant.weight,
            terms.MAX_RUNNING: tenant.max_running,
            terms.KV_FLOOR: tenant.kv_floor,
            terms.KV_CEILING: tenant.kv_ceiling,
            terms.TOKENS_PER_MINUTE: tenant.tokens_per_minute,
        }
        self._fixed = {name: value for name, value in given.items() if value is not None}
        targets = {terms.TTFT: tenant.ttft_ms, terms.TPOT: tenant.tpot_ms}
        asked = {name: value for name, value in targets.items() if value is not None}
        self.extra: dict[str, Any] = {**asked, **self._fixed}
        """Extra arguments of a request that says nothing itself."""
        self.key = tuple(self.extra.items())
        self.priority = tenant.priority
        """Of a request that says none."""
        self._isolated = tenant.isolate_prefix
        self._name = tenant.name

    def own(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of a request's terms that it may choose itself."""
        return {name: value for name, value in said.items() if name not in self._fixed}

    def salted(self, salt: str | None) -> str | None:
        """Return the cache salt for a request with this one: prefixes are shared within a salt.

        Nobody else can name an isolated tenant's salts: what looks like one, from a client of
        another tenant, becomes a third. Hashed, so that it is a valid salt to caches outside of
        the engine.
        """
        if self._isolated:
            return _hashed_salt(self._name, salt or "")
        if salt is not None and salt.startswith(_SALT):
            return _hashed_salt("", salt)
        return salt


def _hashed_salt(name: str, salt: str) -> str:
    # A name has no slash, so the text says where it ends.
    text = f"{name}/{salt}".encode("utf-8", "surrogatepass")
    return _SALT + hashlib.sha256(text).hexdigest()
