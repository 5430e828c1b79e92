"""JSON Schema by the library `jsonschema`, without its grammar of addresses.

The library checks `iri` and `iri-reference` by a general parser, which takes seconds to import and
some hundredths of a second for each address. Here both are the URIs of RFC 3986, by a regular
expression: addresses of other characters than ASCII, which are IRIs, are errors.
"""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType

from rfc3986_validator import validate_rfc3986


@cache
def json_schema() -> ModuleType:
    """The module `jsonschema`; to be called before other libraries import it."""
    grammar = ModuleType("rfc3987_syntax")
    rules = {"iri": "URI", "iri_reference": "URI_reference"}
    vars(grammar)["is_valid_syntax"] = lambda term, text: bool(
        validate_rfc3986(text, rule=rules[term])
    )
    sys.modules.setdefault(grammar.__name__, grammar)
    import jsonschema

    return jsonschema
