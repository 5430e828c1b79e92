"""Memory of JSON: what parsing a document takes, estimated from its characters.

A value of two bytes of text takes up to a hundred bytes once parsed: in the parser's tree, as a
Python object, and in the list that holds it. The estimate is an upper bound for documents of any
content, measured with the parsers of the service (pydantic-core and `json`).
"""

from __future__ import annotations

_TEXT_BYTES = 8
"""Memory per byte of the document: the body in copies, its texts in the tree, as Python texts, and
in the error that an invalid one causes."""
_VALUE_BYTES = 128
"""Memory per value of a list."""
_LIST_BYTES = 500
"""Memory per list, with the error that an invalid one causes."""
_OBJECT_BYTES = 1000
"""Memory per object, with the errors that one causes which lacks its entries."""
_KEY_BYTES = 300
"""Memory per entry of an object."""


def parsed_bytes(text: bytes) -> int:
    """Memory that parsing and validating a JSON document takes at most, bytes.

    Args:
        text: the document, not parsed. Commas, brackets and colons within its texts count too.
    """
    return (
        _TEXT_BYTES * len(text)
        + _VALUE_BYTES * text.count(b",")
        + _LIST_BYTES * text.count(b"[")
        + _OBJECT_BYTES * text.count(b"{")
        + _KEY_BYTES * text.count(b":")
    )
