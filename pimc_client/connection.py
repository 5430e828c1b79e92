"""What both clients say of themselves, and where to."""

from __future__ import annotations

__version__ = "0.1.0"


def base_url_of(url: str) -> str:
    """A base URL that paths can be put behind.

    Raises:
        ValueError: not an absolute http or https URL.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"'{url}' is no base URL: give one like http://127.0.0.1:8000")
    return url.rstrip("/") + "/"


def client_headers(api_key: str | None) -> dict[str, str]:
    """What goes with every request."""
    said = {"User-Agent": f"pimc-client/{__version__}"}
    return {**said, "Authorization": f"Bearer {api_key}"} if api_key else said
