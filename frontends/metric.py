"""Metrics of this package in Prometheus's default registry."""

from __future__ import annotations

from typing import Any

import prometheus_client


def metric(kind: Any, name: str, text: str, labels: tuple[str, ...] = (), **options: Any) -> Any:
    """Make a metric of a kind of prometheus_client, or find the one of that name.

    A process may build its application more than once, and the registry takes a name only once.
    """
    try:
        return kind(name, text, labels, **options)
    except ValueError:
        return prometheus_client.REGISTRY._names_to_collectors[name]
