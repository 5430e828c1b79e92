"""Spans, as a receiver of OTLP over HTTP gets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.kits.client import Received

PROTOBUF = {"Content-Type": "application/x-protobuf"}


class Spans:
    """The spans that a receiver got."""

    def __init__(self, received: Sequence[Received]) -> None:
        self.paths = {one.path for one in received}
        self.resources: list[dict[str, Any]] = []
        self.all: list[Span] = []
        for one in received:
            export = ExportTraceServiceRequest.FromString(one.body)
            for resource in export.resource_spans:
                self.resources.append(attributes(resource.resource))
                self.all += [span for scope in resource.scope_spans for span in scope.spans]

    def named(self, name: str, within: Span | None = None) -> list[Span]:
        """The spans of a name, directly below another one or anywhere."""
        found = [one for one in self.all if one.name == name]
        return found if within is None else [s for s in found if s.parent_span_id == within.span_id]

    def one(self, name: str, within: Span | None = None) -> Span:
        """The only span of a name."""
        (found,) = self.named(name, within)
        return found


def attributes(holder: Any) -> dict[str, Any]:
    """Attributes of a span or a resource."""
    return {
        one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in holder.attributes
    }
