"""A Django site with one view, behind the standard library's WSGI server and mTLS; run as a process.

Arguments: the folder with `views.py`, the listening socket's descriptor, certificate, key, clients' CA.
"""

from __future__ import annotations

import socket
import ssl
import sys
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    context: ssl.SSLContext

    def get_request(self) -> tuple[socket.socket, Any]:
        sock, address = self.socket.accept()
        # the handshake runs in the thread of the request, so that a slow client does not delay the others
        return self.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False), address


def _main(folder: str, fd: str, cert: str, key: str, client_ca: str) -> None:
    sys.path.insert(0, folder)
    from django.conf import settings  # type: ignore[import-untyped]  # noqa: PLC0415
    from django.core.wsgi import get_wsgi_application  # type: ignore[import-untyped]  # noqa: PLC0415

    settings.configure(
        ROOT_URLCONF="urls",
        ALLOWED_HOSTS=["localhost"],
        SECRET_KEY="for tests alone",
        MIDDLEWARE=[
            "django.middleware.common.CommonMiddleware",
            "django.middleware.csrf.CsrfViewMiddleware",
        ],
    )
    server = _Server(("127.0.0.1", 0), WSGIRequestHandler, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=int(fd))
    server.server_name, server.server_port = "localhost", server.socket.getsockname()[1]
    server.setup_environ()
    server.set_app(get_wsgi_application())
    server.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.context.load_cert_chain(cert, key)
    server.context.load_verify_locations(client_ca)
    server.context.verify_mode = ssl.CERT_REQUIRED
    server.serve_forever()


if __name__ == "__main__":
    _main(*sys.argv[1:])
