"""A join token: one line to paste that carries the secret, where to go, and whom to trust there.

The CA certificate travels in the token, so that an agent verifies the collector before it says its secret.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

import msgspec

PREFIX = "wb1."
MAX_TOKEN_CHARACTERS = 16_384
MAX_TENANTS = 64
"""Named in a token, so that it stays within its bound; a longer list is left to the registry alone."""


class TokenError(ValueError):
    """Not a token; the message says what to paste instead."""


class JoinToken(msgspec.Struct, frozen=True, array_like=True):
    secret: Annotated[str, msgspec.Meta(min_length=16, max_length=128)]
    addresses: Annotated[list[str], msgspec.Meta(min_length=1, max_length=16)]
    """Enrolment doors, "host:port"."""
    ca_pem: str
    tenants: list[str] | None = None
    """Whom the agent may report, for a warning before the token is spent; the collector's registry decides.
    None: anybody.
    """

    def encode(self) -> str:
        packed = msgspec.msgpack.encode(self)
        check = binascii.crc32(packed).to_bytes(4, "big")
        return PREFIX + base64.urlsafe_b64encode(packed + check).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> JoinToken:
        text = "".join(text.split())
        if not text.startswith(PREFIX) or len(text) > MAX_TOKEN_CHARACTERS:
            raise TokenError(
                f"a join token begins with `{PREFIX}`: paste the whole line `token create` printed"
            )
        body = text.removeprefix(PREFIX)
        try:
            data = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
            packed, check = data[:-4], data[-4:]
            if binascii.crc32(packed).to_bytes(4, "big") != check:
                raise TokenError(
                    "the join token is cut or mistyped: paste the whole line `token create` printed"
                )
            return msgspec.msgpack.decode(packed, type=cls)
        except (binascii.Error, msgspec.MsgspecError, ValueError) as error:
            if isinstance(error, TokenError):
                raise
            raise TokenError(
                "the join token is cut or mistyped: paste the whole line `token create` printed"
            ) from None
