"""How the local Hub speaks HTTP, and how it breaks on demand."""

import json
import os
import socket
import struct
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlsplit


if TYPE_CHECKING:
    from hub.server import Fault, HubServer


@dataclass
class Request:
    """One line of the server's log; `status` is an HTTP status or "reset", None while it is being answered."""

    method: str
    path: str
    authorised: bool
    status: int | Literal["reset"] | None = None


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = extra.pop("headers", {})
        self.extra = extra


class ConnectionCut(Exception):
    """The connection has been reset, so there is nobody to answer."""


class Exchange(BaseHTTPRequestHandler):
    """One connection: reads requests, lets the faults happen that were asked for, and sends what `route` answers."""

    hub: "HubServer"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self) -> None:
        """Answers a request, or refuses it, or lets the fault happen that was asked for."""
        self.raw_path = urlsplit(self.path).path
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.log = Request(self.command, self.path, self.token in self.hub.users)
        self.hub.requests.append(self.log)
        self.body, self.cut = b"", False
        self.pending = -1 if self.headers.get("Transfer-Encoding") else int(self.headers.get("Content-Length", 0))
        try:
            try:
                self.suffer(self.hub.fault_for(self.command, unquote(self.path)))
                self.body = self.read_body()
                self.route()
            except Refused as refusal:
                self.refuse(refusal)
        except (ConnectionCut, ConnectionError):
            self.log.status = self.log.status or "reset"
            self.close_connection = True
        except Exception:  # noted, and raised in the test when it leaves the server
            self.hub.errors.append(f"{self.command} {self.path}\n{traceback.format_exc()}")
            self.refuse(Refused(500, "the local Hub failed"))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def route(self) -> None:
        """Answers a request with `reply` or `send`, or raises `Refused`."""
        raise NotImplementedError

    def details_of(self, status: int) -> dict[str, str]:
        """Returns what clients expect in the body of a refusal besides its reason."""
        raise NotImplementedError

    # Faults

    def suffer(self, fault: "Fault | None") -> None:
        if fault is None:
            return
        if fault.what == "slow":
            self.hub.stopping.wait(fault.seconds)
        elif fault.what == "reset" and self.pending:
            self.rfile.read(max(self.pending // 2, 1))
            self.reset()
        elif fault.what == "reset":
            self.cut = True
        else:
            self.body = self.read_body()
            headers = {"Retry-After": str(round(fault.seconds))} if fault.what == 429 else {}
            raise Refused(int(fault.what), "this fault was asked for", headers=headers, **self.details_of(fault.what))

    def reset(self) -> None:
        """Closes the connection with RST instead of FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.log.status = "reset"
        os.close(self.connection.detach())
        raise ConnectionCut

    # Reading and replying

    def read_body(self) -> bytes:
        pending, self.pending = self.pending, 0
        if pending >= 0:
            return self.rfile.read(pending)
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def send(self, status: int, body: bytes, headers: Mapping[str, str], length: int | None = None) -> None:
        self.log.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body) if length is None else length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.cut:
            self.wfile.write(body[: len(body) // 2])
            self.reset()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def refuse(self, refusal: Refused) -> None:
        headers = {"X-Error-Message": refusal.message.replace("\n", " "), **refusal.headers}
        if refusal.code:
            headers["X-Error-Code"] = refusal.code
        self.reply({"error": refusal.message, **refusal.extra}, refusal.status, headers)
