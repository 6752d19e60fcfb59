"""The TCP connection to the first of a host's addresses that accepts (RFC 8305, "Happy Eyeballs")."""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import httpx

from backupd.upload.http.limits import AttemptLimits

Address = tuple[int, int, int, str, Any]
"""An address as `socket.getaddrinfo` returns it: family, type, protocol, canonical name, address."""

_HEAD_START = 0.25
"""Seconds for which an address is tried before the next one is, too; source: RFC 8305 section 8."""

_MAX_UNSENT_BYTES = 512 * 1024
"""Bytes in the socket's send buffer: enough for every network, and few after an early refusal."""

_SOCKET_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MAX_UNSENT_BYTES),
    # firewalls forget a connection that is silent for some minutes, such as while a server stores an archive
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 45),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 8),
)

_LOCAL_ERRORS = (errno.EAFNOSUPPORT, errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE)
"""Errors of this host, such as that it has no IPv6 or no free descriptor."""

Failure = httpx.ConnectError | httpx.ConnectTimeout


@dataclass(slots=True)
class _Dial:
    """A connection that is being established, and when it has taken too long, by the monotonic clock."""

    sock: socket.socket
    address: Any
    until: float

    def result(self) -> Failure | None:
        """Return the failure; None if the connection is established."""
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return failure_of(OSError(code, f"{os.strerror(code)} ({self.name})")) if code else None

    @property
    def name(self) -> str:
        """Return the address in words."""
        return f"{self.address[0]} port {self.address[1]}"


def dial(
    addresses: Sequence[Address], timeout: float | None, limits: AttemptLimits, local_address: str
) -> socket.socket:
    """Connect to the first address that accepts; `timeout` is for each address, in seconds.

    The next address is tried as soon as one fails, or has not answered for 250 ms. Raises ConnectError,
    ConnectTimeout or AttemptEndedError.
    """
    waiting = deque(_alternating(addresses))
    dials: dict[int, _Dial] = {}
    failures: list[Failure] = []
    next_at = 0.0
    try:
        with closing(select.epoll()) as epoll:
            while waiting or dials:
                now = time.monotonic()
                if waiting and (now >= next_at or not dials):
                    next_at = now + _HEAD_START
                    try:
                        new = _start(waiting.popleft(), now, timeout, local_address)
                    except OSError as error:
                        failures.append(failure_of(error))
                        next_at = now
                        continue
                    dials[new.sock.fileno()] = new
                    epoll.register(new.sock.fileno(), select.EPOLLOUT)
                ends = [each.until for each in dials.values()] + ([next_at] if waiting else [])
                limits.wait(epoll.fileno(), select.POLLIN, max(min(ends) - time.monotonic(), 0))
                ready = {fd for fd, _ in epoll.poll(0)}
                now = time.monotonic()
                for fd in [fd for fd, each in dials.items() if fd in ready or now >= each.until]:
                    each = dials[fd]
                    failure = each.result() if fd in ready else _timed_out(each)
                    del dials[fd]
                    if failure is None:
                        return each.sock
                    each.sock.close()  # epoll forgets it
                    failures.append(failure)
                    next_at = now
    except OSError as error:  # no free descriptor
        failures.append(failure_of(error))
    finally:
        for each in dials.values():
            each.sock.close()
    # a failure at another address explains more than that this host has no IPv6
    raise min(failures, key=_is_local, default=httpx.ConnectError("the name has no address"))


def failure_of(cause: OSError) -> httpx.ConnectError:
    """Return an error of the socket or the name service as one of httpx."""
    error = httpx.ConnectError(cause.strerror or str(cause))
    error.__cause__ = cause
    return error


def _alternating(addresses: Sequence[Address]) -> Iterable[Address]:
    """Return the addresses in their order, but with each other one from another family, if there is one."""
    left = list(addresses)
    while left:
        yield (first := left.pop(0))
        other = next((each for each in left if each[0] != first[0]), None)
        if other is not None:
            left.remove(other)
            yield other


def _start(address: Address, now: float, timeout: float | None, local_address: str) -> _Dial:
    family, kind, protocol, _, target = address
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        for option in _SOCKET_OPTIONS:
            sock.setsockopt(*option)
        if local_address:
            try:
                sock.bind((local_address, 0))
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror} (local_address {local_address})") from error
        dialled = _Dial(sock, target, now + timeout if timeout is not None else float("inf"))
        code = sock.connect_ex(target)
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, f"{os.strerror(code)} ({dialled.name})")
    except BaseException:
        sock.close()
        raise
    return dialled


def _timed_out(each: _Dial) -> httpx.ConnectTimeout:
    return httpx.ConnectTimeout(f"no response from {each.name}")


def _is_local(failure: Failure) -> bool:
    """Return whether a failure to connect is caused by this host."""
    cause = failure.__cause__
    return isinstance(cause, OSError) and cause.errno in _LOCAL_ERRORS
