"""The keys file: who may call, and the service's own secrets. Made once, readable by its owner alone."""

import os
import secrets
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from service.domain.rate_limits import RateLimits
from service.errors import FastslowError
from service.settings import Settings

Role = Literal["client", "admin"]


class KeysFileInvalid(FastslowError):
    """The keys file is missing or is not one."""


class ApiKey(BaseModel):
    """One API key. An admin's also opens `/v1/admin`, inside its own tenant."""

    model_config = ConfigDict(frozen=True)

    key: str = Field(min_length=16)
    # Part of Redis keys and metric labels.
    tenant: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    role: Role = "client"


class Keys(BaseModel):
    """The contents of the keys file."""

    model_config = ConfigDict(frozen=True)

    api_keys: tuple[ApiKey, ...]
    cache_salt_secret: str
    """HMAC key of the salts that keep users apart in vLLM's prefix cache."""
    vllm_api_key: str
    """What a local stack's gateway and workers send to its vLLM."""
    limits: dict[str, RateLimits] = {}
    """Rate limits of tenants that differ from the settings'; what is left out of one is the settings'."""

    def first(self, role: Role) -> str:
        """The first key of a role, to show to the owner; empty if there is none."""
        return next((k.key for k in self.api_keys if k.role == role), "")


def new_keys(tenant: str = "default") -> Keys:
    """A client key and an admin key for one tenant, and fresh secrets."""
    return Keys(
        api_keys=(
            ApiKey(key=f"fsk-{secrets.token_urlsafe(24)}", tenant=tenant, role="client"),
            ApiKey(key=f"fsa-{secrets.token_urlsafe(24)}", tenant=tenant, role="admin"),
        ),
        cache_salt_secret=secrets.token_hex(32),
        vllm_api_key=secrets.token_urlsafe(24),
    )


def load_keys(path: Path) -> Keys:
    """Read the keys file.

    Raises:
        KeysFileInvalid: it is missing or malformed; the message says how to make one.
    """
    try:
        return Keys.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise KeysFileInvalid(f"No keys file at {path}: make one with `fastslow keys`.") from None
    except ValidationError as error:
        raise KeysFileInvalid(f"The keys file {path} is not valid: {error.errors()[0]['msg']}.") from None


def with_own_vllm_key(settings: Settings) -> Settings:
    """The settings with the key of a local stack's vLLM, where they name none and there is a keys file.

    Raises:
        KeysFileInvalid: it is malformed.
    """
    if settings.vllm_api_key.get_secret_value() or not settings.keys_path.exists():
        return settings
    return settings.model_copy(update={"vllm_api_key": SecretStr(load_keys(settings.keys_path).vllm_api_key)})


def ensure_keys(path: Path) -> Keys:
    """The keys of the file, which is made first if there is none (mode 0600, never overwritten)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return load_keys(path)
    keys = new_keys()
    with os.fdopen(descriptor, "w") as file:
        file.write(keys.model_dump_json(indent=2))
        file.flush()
        os.fsync(file.fileno())
    return keys
