"""What members and roster say to each other: JSON objects, one per line, on TCP; both sides prove that they know the token.

The token never travels: each side sends a nonce and answers the other's with HMAC-SHA256(token, role + nonce) (as RFC 2104).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
from typing import Any

MEMBER, BEAT, ROSTER = "member", "beat", "roster"  # roles; an answer of one role is no answer of another
LIMIT = 4 << 20  # bytes of a line, at most


class Refused(ConnectionError):
    """The other side does not know the token, or does not speak this language."""


def pack(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def nonce() -> str:
    return secrets.token_hex(16)


def answer(token: str, role: str, challenge: str) -> str:
    """The proof of knowing the token."""
    return hmac.new(token.encode(), f"{role}:{challenge}".encode(), hashlib.sha256).hexdigest()


def proves(token: str, role: str, challenge: str, proof: Any) -> bool:
    return isinstance(proof, str) and hmac.compare_digest(answer(token, role, challenge), proof)


def connect(address: tuple[str, int], token: str, role: str, hello: dict[str, Any], timeout_s: float) -> socket.socket:
    """A connection to the roster on which both have proved themselves; Refused or OSError."""
    line = socket.create_connection(address, timeout=timeout_s)
    try:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        challenge, mine = json.loads(_line(line))["nonce"], nonce()
        line.sendall(pack({**hello, "role": role, "proof": answer(token, role, challenge), "nonce": mine}))
        reply = json.loads(_line(line))
        if not proves(token, ROSTER, mine, reply.get("proof")):
            raise Refused(f"{address[0]}:{address[1]} is not this run's roster, or the token is another one")
        line.settimeout(None)
    except (ValueError, KeyError, TypeError) as error:
        line.close()
        raise Refused(f"{address[0]}:{address[1]} does not speak as a roster does: {error}") from None
    except BaseException:
        line.close()
        raise
    return line


def _line(line: socket.socket) -> bytes:
    """The next line, read byte by byte so that nothing after it is taken."""
    found = bytearray()
    while not found.endswith(b"\n"):
        byte = line.recv(1)
        if not byte or len(found) > 65536:
            raise Refused("the connection was closed during the greeting")
        found += byte
    return bytes(found)
