"""A scripted endpoint that speaks HTTP/2."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
from hyperframe.frame import Frame

from tests.pki import Pki
from tests.scripted import Peer, Request, receipt_for, server_context


def http2_context(pki: Pki) -> ssl.SSLContext:
    context = server_context(pki)
    context.set_alpn_protocols(["h2"])
    return context


@dataclass
class Exchange:
    """A connection from the point of view of an endpoint, and the request on it."""

    peer: Peer
    connection: h2.connection.H2Connection
    stream: int = 0
    head: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)

    def flush(self) -> None:
        self.peer.send(self.connection.data_to_send())

    def send(self, *frames: Frame) -> None:
        """Send frames that the library would refuse to send."""
        self.flush()
        self.peer.send(b"".join(frame.serialize() for frame in frames))

    def respond(self, *fields: tuple[str, str], end: bool = False) -> None:
        self.connection.send_headers(self.stream, fields, end_stream=end)

    @property
    def archive(self) -> bytes:
        head = f"POST / HTTP/1.1\r\nContent-Type: {self.head['content-type']}"
        return Request(head.encode(), bytes(self.body)).archive


class Http2Server:
    """A script that stores archives over HTTP/2; subclasses override single steps."""

    def __init__(self) -> None:
        self.archives: list[bytes] = []
        self.heads: list[dict[str, str]] = []
        self.connections = 0

    def __call__(self, peer: Peer) -> None:
        self.connections += 1
        config = h2.config.H2Configuration(client_side=False, validate_outbound_headers=False)
        exchange = Exchange(peer, h2.connection.H2Connection(config))
        exchange.connection.initiate_connection()
        self.connected(exchange)
        while True:
            exchange.flush()
            for event in exchange.connection.receive_data(peer._piece()):
                self.received(exchange, event)

    def connected(self, exchange: Exchange) -> None:
        """Do nothing."""

    def received(self, exchange: Exchange, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            exchange.stream, exchange.body = event.stream_id, bytearray()
            exchange.head = {name.decode(): value.decode() for name, value in event.headers}
            self.heads.append(exchange.head)
            self.request_started(exchange)
        elif isinstance(event, h2.events.DataReceived):
            exchange.body += event.data
            self.data_received(exchange, event.flow_controlled_length)
        elif isinstance(event, h2.events.StreamEnded):
            self.archives.append(exchange.archive)
            self.request_complete(exchange)

    def request_started(self, exchange: Exchange) -> None:
        """Do nothing."""

    def data_received(self, exchange: Exchange, size: int) -> None:
        exchange.connection.acknowledge_received_data(size, exchange.stream)

    def request_complete(self, exchange: Exchange) -> None:
        receipt = receipt_for(self.archives[-1]).partition(b"\r\n\r\n")[2]
        exchange.respond((":status", "201"), ("content-length", str(len(receipt))))
        exchange.connection.send_data(exchange.stream, receipt, end_stream=True)
