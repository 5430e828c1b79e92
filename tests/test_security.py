"""Who is let in: keys, callers, addresses."""

from __future__ import annotations

import hashlib

import pytest
from starlette.datastructures import Headers

from service.errors import Unauthorized
from service.security import Keys
from service.settings import Settings


def keys(*plain: str) -> Keys:
    return Keys(key.get_secret_value() for key in Settings(api_keys=plain).api_keys)


def bearer(key: str) -> Headers:
    return Headers({"authorization": f"Bearer {key}"})


class TestKeys:
    def test_without_keys_everybody_may_ask_and_nobody_has_a_name(self) -> None:
        assert keys().check(Headers()) is None
        assert keys().check(bearer("anything")) is None

    def test_a_caller_is_the_same_however_the_key_comes(self) -> None:
        first = keys("key-of-one", "key-of-two").check(bearer("key-of-one"))
        again = keys("key-of-two", "key-of-one").check(Headers({"x-api-key": "key-of-one"}))
        digest = hashlib.sha256(b"key-of-one").hexdigest()
        hashed = keys(f"sha256:{digest}").check(bearer("key-of-one"))
        assert first == again == hashed is not None

    def test_two_keys_are_two_callers(self) -> None:
        both = keys("key-of-one", "key-of-two")
        assert both.check(bearer("key-of-one")) != both.check(bearer("key-of-two"))

    def test_a_caller_tells_neither_the_key_nor_its_hash(self) -> None:
        caller = keys("key-of-one").check(bearer("key-of-one"))
        assert caller is not None
        assert len(caller) == 16
        assert caller not in "key-of-one"
        assert caller not in hashlib.sha256(b"key-of-one").hexdigest()

    @pytest.mark.parametrize("given", ["", "key-of-on", "key-of-one ", "KEY-OF-ONE", "clé"])
    def test_anything_else_is_refused(self, given: str) -> None:
        with pytest.raises(Unauthorized):
            keys("key-of-one").check(Headers({"x-api-key": given}))
        with pytest.raises(Unauthorized):
            keys("key-of-one").check(Headers())

    def test_the_hash_opens_nothing(self) -> None:
        digest = hashlib.sha256(b"key-of-one").hexdigest()
        for given in (digest, f"sha256:{digest}"):
            with pytest.raises(Unauthorized):
                keys("key-of-one").check(bearer(given))
