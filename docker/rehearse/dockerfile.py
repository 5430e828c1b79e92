"""A Dockerfile as stages of instructions, and what `.dockerignore` keeps out."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath


class RehearsalError(Exception):
    """A Dockerfile that cannot be carried out, or a service that did not do what it should."""


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of a Dockerfile, continuations joined."""

    keyword: str
    """In upper case: `RUN`, `COPY`, …"""
    flags: Mapping[str, str]
    """`--from=packages` as `{"from": "packages"}`."""
    rest: str
    """What follows the flags."""

    def words(self) -> list[str]:
        """The rest as words: a JSON list where it is one, else split as a shell would."""
        if self.rest.startswith("["):
            return [str(word) for word in json.loads(self.rest)]
        return shlex.split(self.rest)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What stands between one FROM and the next."""

    name: str
    """After AS."""
    base: str
    """An image, or an earlier stage's name."""
    instructions: tuple[Instruction, ...]
    """In order, without the FROM."""


def parse(text: str, arguments: Mapping[str, str] | None = None) -> dict[str, Stage]:
    """The stages of a Dockerfile by name, in order.

    Args:
        text: The Dockerfile.
        arguments: Values for ARGs, as `--build-arg` gives them.

    Raises:
        RehearsalError: a stage has no name, or a variable has no value.
    """
    values: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for instruction in _instructions(text):
        if instruction.keyword == "FROM":
            words = expand(instruction.rest, values).split()
            if len(words) != 3 or words[1].upper() != "AS":
                raise RehearsalError(f"'FROM {instruction.rest}' is not 'FROM image AS name'")
            stages[words[2]] = Stage(name=words[2], base=words[0], instructions=())
        elif not stages:
            if instruction.keyword != "ARG":
                raise RehearsalError(f"{instruction.keyword} stands before the first FROM")
            name, _, default = instruction.rest.partition("=")
            values[name] = (arguments or {}).get(name, default)
        else:
            last = list(stages)[-1]
            done = (*stages[last].instructions, instruction)
            stages[last] = replace(stages[last], instructions=done)
    return stages


def _instructions(text: str) -> Iterator[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        keyword, _, rest = line.strip().partition(" ")
        flags = {}
        while match := re.match(r"--([a-z-]+)=(\S+)\s+", rest):
            flags[match[1]] = match[2]
            rest = rest[match.end() :]
        yield Instruction(keyword=keyword.upper(), flags=flags, rest=rest.strip())


def expand(text: str, values: Mapping[str, str]) -> str:
    """A text with its `$NAME` and `${NAME}` replaced.

    Raises:
        RehearsalError: a variable has no value.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in values:
            raise RehearsalError(f"'{text}' names ${name}, which has no value")
        return values[name]

    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, text)


class Ignore:
    """What `.dockerignore` keeps out: the last pattern counts that matches a path or its folder."""

    def __init__(self, text: str) -> None:
        lines = [line.strip() for line in text.splitlines()]
        self._rules = [
            (_pattern(line.lstrip("!").strip("/")), line.startswith("!"))
            for line in lines
            if line and not line.startswith("#")
        ]

    def keeps_out(self, path: PurePosixPath) -> bool:
        """Whether a path, relative to the checkout, is not sent to the builder."""
        parts = path.parts
        above = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
        kept_out = False
        for pattern, wanted in self._rules:
            if any(pattern.fullmatch(p) for p in above):
                kept_out = not wanted
        return kept_out


def _pattern(glob: str) -> re.Pattern[str]:
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    found = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    return re.compile("".join(pieces.get(piece, re.escape(piece)) for piece in found))
