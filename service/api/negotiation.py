"""Content negotiation: `Accept` and `Prefer` (RFC 9110, RFC 7240)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from service.errors import NotAcceptable


@dataclass(frozen=True, kw_only=True)
class MediaRange:
    """One element of an `Accept` header, or a media type on offer."""

    type: str
    subtype: str
    parameters: frozenset[tuple[str, str]]
    quality: float = 1.0

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
        """Specificity with which the range matches an offer: 0 for no match."""
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
    """The offer with the highest quality; the first of equals.

    Args:
        accept: the `Accept` header; empty accepts anything.
        offers: media types, the preferred one first. A single offer is used whatever `Accept`
            is, as RFC 9110 (12.4.1) allows: an error would not help the client.
        lenient: whether the first offer is used if none is accepted, too.

    Raises:
        NotAcceptable: none of several offers is accepted.
    """
    if len(offers) == 1:
        return offers[0]
    ranges = [found for text in accept.split(",") if (found := MediaRange.parse(text))]
    if not ranges:
        return offers[0]
    liked = {offer: _liking(offer, ranges) for offer in offers}
    best = max(offers, key=lambda offer: liked[offer])
    if liked[best] == 0 and lenient:
        return offers[0]
    if liked[best] == 0:
        raise NotAcceptable(f"Accept is '{accept}', but the response types are {', '.join(offers)}")
    return best


ASYNC = "respond-async"
"""The preference for a job (RFC 7240, section 4.1)."""
UPGRADE = "model-upgrade"
"""The preference that a job runs with a later version of its model if there is one by then."""


def prefers(values: Sequence[str], name: str = ASYNC) -> bool:
    """Whether `Prefer` headers contain a preference.

    Args:
        values: of each such header: comma-separated names with optional values and parameters.
        name: of the preference, lower case.
    """
    preferences = [one for value in values for one in value.split(",")]
    return any(re.split("[;=]", one)[0].strip().lower() == name for one in preferences)


def _liking(offer: str, ranges: Sequence[MediaRange]) -> float:
    parsed = MediaRange.parse(offer)
    if parsed is None:
        raise ValueError(f"'{offer}' is not a media type")
    # The most specific range counts, also if it excludes: "image/tiff;q=0, */*" means no TIFF.
    closest = max(ranges, key=lambda found: found.match(parsed))
    return closest.quality if closest.match(parsed) else 0.0
