"""Who calls, and for which user: an API key or a verified token, then the header or the body."""

import hashlib
from dataclasses import dataclass

import jwt
from fastapi import Request

from service.api.headers import header
from service.errors import AuthenticationFailed, InvalidRequest, PermissionDenied
from service.keys import ApiKey, Keys, Role
from service.settings import Settings

MAX_USER_CHARS = 256


@dataclass(frozen=True)
class Caller:
    """An authenticated caller. `user` is set where a token names one, and nothing overrides it."""

    tenant: str
    role: Role
    label: str
    """For the audit: what kind of caller, and enough of its key to tell it from others."""
    user: str | None = None


class Authenticator:
    """Knows the API keys by their hashes, and verifies tokens where a key for them is configured."""

    def __init__(self, keys: Keys, settings: Settings) -> None:
        self._by_hash = {_hash(key.key): _key_caller(key) for key in keys.api_keys}
        self._jwt_key = settings.jwt_key.get_secret_value()
        self._algorithms = list(settings.jwt_algorithms)
        self._audience = settings.jwt_audience

    def caller(self, request: Request) -> Caller:
        """The caller of a request.

        Raises:
            AuthenticationFailed: no key or token, or one that is not valid.
        """
        scheme, _, credential = (header(request.scope, b"authorization") or "").partition(" ")
        credential = credential.strip()
        if scheme.lower() != "bearer" or not credential:
            raise AuthenticationFailed(
                "No API key: send the header 'Authorization: Bearer <key>'.", code="missing_api_key"
            )
        caller = self._by_hash.get(_hash(credential))
        if caller is not None:
            return caller
        if self._jwt_key and credential.count(".") == 2:
            return self._token_caller(credential)
        raise AuthenticationFailed("The API key is not valid: check it, or ask this service's admin for one.")

    def _token_caller(self, token: str) -> Caller:
        try:
            claims = jwt.decode(
                token,
                self._jwt_key,
                algorithms=self._algorithms,
                audience=self._audience,
                options={"require": ["exp", "sub", "aud"]},
            )
        except jwt.PyJWTError as error:
            raise AuthenticationFailed(f"The token is not valid: {error}.", code="invalid_token") from error
        tenant, user = claims.get("tenant"), claims["sub"]
        if not isinstance(tenant, str) or not tenant:
            raise AuthenticationFailed("The token has no claim 'tenant'.", code="invalid_token")
        return Caller(tenant=tenant, role="client", label="token", user=checked_user(user, "sub"))


def _hash(credential: str) -> str:
    return hashlib.sha256(credential.encode()).hexdigest()


def _key_caller(key: ApiKey) -> Caller:
    return Caller(tenant=key.tenant, role=key.role, label=f"{key.role} …{key.key[-4:]}")


async def authenticated(request: Request) -> Caller:
    """FastAPI dependency: any valid caller."""
    authenticator: Authenticator = request.app.state["authenticator"]
    return authenticator.caller(request)


async def admin(request: Request) -> Caller:
    """FastAPI dependency: a caller with an admin's key.

    Raises:
        PermissionDenied: the key is a client's.
    """
    caller = await authenticated(request)
    if caller.role != "admin":
        raise PermissionDenied("This call needs an admin's key.")
    return caller


def user_of(request: Request, caller: Caller, named: str | None) -> str | None:
    """The user a request is for: the token's, else the header's, else the body's (`named`); None if none says."""
    if caller.user is not None:
        return caller.user
    told = header(request.scope, b"x-user-id")
    if told is not None:
        return checked_user(_decoded(told), "X-User-ID")
    return checked_user(named, "user") if named is not None else None


def _decoded(told: str) -> str:
    """A header's text as UTF-8, which clients send, where it is that; Starlette takes each byte for a character."""
    try:
        return told.encode("latin-1").decode()
    except UnicodeDecodeError:
        return told


def path_user(request: Request, caller: Caller, user: str) -> str:
    """The user named in a path; a token reaches its own user alone.

    Raises:
        PermissionDenied: the token is another user's.
    """
    if caller.user not in (None, user):
        raise PermissionDenied("This token is another user's.", code="other_user")
    return checked_user(user, "user")


def checked_user(user: str, param: str) -> str:
    """A user's id as it may be stored and logged.

    Raises:
        InvalidRequest: empty, too long, or with characters that don't print.
    """
    if not user or len(user) > MAX_USER_CHARS or not user.isprintable():
        raise InvalidRequest(
            f"A user's id has 1 to {MAX_USER_CHARS} printable characters.", param=param, code="invalid_user"
        )
    return user
