"""`python -m service`: bind, serve, and say clearly why not."""

from __future__ import annotations

import logging.config
import sys

import uvicorn

from service.app import create_app
from service.security import check_binding
from service.settings import Settings, SettingsError, read_settings, unknown_variables
from service.telemetry import log_config

# A run that is going on may end; after that it is cut off.
_GRACE_SECONDS = 30
_MISUSE = 2


def main() -> None:
    """Serve until told to stop."""
    try:
        settings = read_settings()
        check_binding(settings)
    except SettingsError as error:
        sys.exit(_refusal(error))
    serve(settings)


def serve(settings: Settings) -> None:
    """Serve with settings already checked."""
    config = log_config(settings.log_level)
    logging.config.dictConfig(config)
    for name in unknown_variables():
        logging.getLogger("service").warning("%s is no setting of this service", name)
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=config,
        access_log=False,  # each request has its own line, with its id
        server_header=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )


def _refusal(error: SettingsError) -> int:
    sys.stderr.write(f"{error}\n")
    return _MISUSE


if __name__ == "__main__":
    main()
