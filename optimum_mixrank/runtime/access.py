"""How repositories on the Hub are reached: with which token and cache, and whether the Hub can be reached at all."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any


_TRIES, _PAUSE_SECONDS = 2, 1.0
"""A name server that is only busy answers the second time."""

_NO_ROUTE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN}

_ACCESS: ContextVar[Mapping[str, Any]] = ContextVar("access", default=MappingProxyType({}))

_NAMES = ("token", "cache_dir", "local_files_only", "proxies")
"""What holds for every repository; a revision belongs to one."""


def common_access(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the arguments of `from_pretrained` that hold for every repository."""
    # `token=False` says something: no token, though the machine has one.
    return {name: arguments[name] for name in _NAMES if arguments.get(name) is not None}


@contextmanager
def hub_reached_by(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Reach repositories in this context with those of the arguments of `from_pretrained` that hold for every one.

    What an outer context says holds on where the arguments say nothing.
    """
    before = _ACCESS.set({**_ACCESS.get(), **common_access(arguments)})
    try:
        yield
    finally:
        _ACCESS.reset(before)


def hub_access() -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that hold for every repository in this context."""
    return dict(_ACCESS.get())


def why_unreachable() -> str:
    """Return why the Hub cannot be reached from here, in a few words; empty if it answers, whatever it says.

    `huggingface_hub` repeats a request for about 25 seconds when there is no network. This asks once more if a name cannot
    be resolved, and gives up only if no connection comes about: a slow answer is left to the download itself.
    """
    # Not at the top, since the help of the commands has to appear at once.
    from huggingface_hub import constants, utils

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    reason = ""
    for attempt in range(_TRIES):
        try:
            utils.get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except Exception as error:
            # Which classes a missing network raises depends on the release of huggingface_hub.
            reason = _missing_connection(error)
            if attempt + 1 == _TRIES or not _is_name_error(error):
                break
        else:
            return ""
        time.sleep(_PAUSE_SECONDS)
    return reason


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_name_error(error: BaseException) -> bool:
    return any(isinstance(each, socket.gaierror) for each in _causes(error))


def _missing_connection(error: BaseException) -> str:
    """Return what the operating system says if an error comes from a connection that did not come about, else nothing."""
    for each in _causes(error):
        if isinstance(each, socket.gaierror) or (isinstance(each, OSError) and each.errno in _NO_ROUTE):
            return f"no network: {each.strerror}"
        if isinstance(each, ConnectionRefusedError):
            return "the connection is refused, perhaps by a proxy or a mirror"
        if type(each).__name__ == "ConnectTimeout":
            return "no network: the connection timed out"
    return ""
