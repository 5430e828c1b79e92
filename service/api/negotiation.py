"""Content negotiation: `Accept` and `Prefer` (RFC 9110, RFC 7240)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from service.errors import NotAcceptable, shown


@dataclass(frozen=True, kw_only=True)
class MediaRange:
    """One element of an `Accept` header, or one media type that is available."""

    type: str
    subtype: str
    parameters: frozenset[tuple[str, str]]
    quality: float = 1.0
    """The client's preference, 0 (rejected) to 1."""

    @classmethod
    def parse(cls, text: str) -> MediaRange | None:
        """Parse a media range; None if the text is not one."""
        name, *rest = (part.strip().lower() for part in text.split(";"))
        main, slash, subtype = name.partition("/")
        if not (main and slash and subtype):
            return None
        pairs = [part.partition("=") for part in rest if part]
        values = {key.strip(): value.strip().strip('"') for key, _, value in pairs}
        return cls(
            type=main,
            subtype=subtype,
            quality=_quality(values.pop("q", "1")),
            parameters=frozenset(values.items()),
        )

    def match(self, offer: MediaRange) -> int:
        """Specificity with which this range matches an available type; 0 if it does not."""
        if self.type not in {"*", offer.type} or self.subtype not in {"*", offer.subtype}:
            return 0
        if not self.parameters <= offer.parameters:
            return 0
        return 1 + (self.type != "*") + (self.subtype != "*") + len(self.parameters)


def _quality(text: str) -> float:
    try:
        return min(max(float(text), 0.0), 1.0)
    except ValueError:
        return 0.0


def negotiate(accept: str, offers: Sequence[str], *, lenient: bool = False) -> str:
    """Choose the media type of a response: the one with the highest quality, of equals the first.

    A client that accepts none of the types but `application/json` gets one whose syntax is JSON,
    such as `application/geo+json` (RFC 6839): such a client can read it.

    Args:
        accept: the `Accept` header; empty accepts any type.
        offers: available media types, the preferred one first. If there is only one, it is used
            whatever `Accept` is, as RFC 9110 (12.4.1) allows: an error would not help the client.
        lenient: whether to use the first type if the client accepts none.

    Returns:
        One of `offers`.

    Raises:
        NotAcceptable: there are several offers, and the client accepts none of them.
    """
    if len(offers) == 1:
        return offers[0]
    ranges = [found for text in accept.split(",") if (found := MediaRange.parse(text))]
    if not ranges:
        return offers[0]
    qualities = {offer: _quality_of(offer, ranges) for offer in offers}
    best = max(offers, key=lambda offer: qualities[offer])
    if qualities[best] > 0:
        return best
    as_json = [offer for offer in offers if _is_accepted_as_json(offer, ranges)]
    if as_json or lenient:
        return [*as_json, *offers][0]
    raise NotAcceptable(
        f"Accept is '{shown(accept)}', but this request has a response only as "
        f"{', '.join(offers)}: accept one of these types"
    )


ASYNC = "respond-async"
"""The preference for a job (RFC 7240, section 4.1)."""
UPGRADE = "model-upgrade"
"""The preference that a later version of the model may run the job."""


def prefers(values: Sequence[str], name: str = ASYNC) -> bool:
    """Whether `Prefer` headers contain a preference.

    Args:
        values: value of each `Prefer` header: comma-separated preferences with optional values and
            parameters.
        name: name of the preference, lower case.
    """
    preferences = [one for value in values for one in value.split(",")]
    return any(re.split("[;=]", one)[0].strip().lower() == name for one in preferences)


def _is_accepted_as_json(offer: str, ranges: Sequence[MediaRange]) -> bool:
    """Whether a type has JSON's syntax, and a client accepts JSON but does not name the type."""
    named = any(f"{one.type}/{one.subtype}" == offer for one in ranges)
    return offer.endswith("+json") and not named and _quality_of("application/json", ranges) > 0


def _quality_of(offer: str, ranges: Sequence[MediaRange]) -> float:
    """Quality of an available type by the media ranges that a client accepts, 0 to 1."""
    parsed = MediaRange.parse(offer)
    if parsed is None:
        raise ValueError(f"'{offer}' is not a media type")
    # The most specific range decides, even if it rejects: "image/tiff;q=0, */*" means no TIFF.
    closest = max(ranges, key=lambda found: found.match(parsed))
    return closest.quality if closest.match(parsed) else 0.0
