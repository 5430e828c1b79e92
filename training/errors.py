"""Errors that a user of the training package can correct."""

from __future__ import annotations


class TrainingError(Exception):
    """A user's mistake; its message is one sentence that states what was given and what to do.

    The command line prints the message and ends with status 2, without a traceback.
    """
