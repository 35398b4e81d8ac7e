"""A Redis over TLS, behind a password, and one that sentinels watch."""

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from service.errors import StoreUnavailable
from service.settings import Settings
from service.stack.probes import redis_answers
from service.store import open_store
from service.tokens import Tokens
from tests.conftest import gateway_client
from tests.dialogue import chat, say, texts_of
from tests.fakes import RecordedJobs
from tests.redis_servers import replicated, server, watched
from tests.waiting import until

PASSWORD = "p@ss/word"


def certificate(folder: Path) -> tuple[Path, Path]:
    """Files of a certificate for 127.0.0.1 that has signed itself, and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "redis")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    chain, secret = folder / "redis.pem", folder / "redis.key"
    chain.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return chain, secret


@asynccontextmanager
async def behind_tls(port: int, *, chain: Path, key: Path) -> AsyncIterator[int]:
    """A port that speaks TLS for a server that does not."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, to_server), pump(from_server, writer), return_exceptions=True)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with listener:
        yield listener.sockets[0].getsockname()[1]


async def answered(url: str) -> None:
    """Wait until the probe of `fastslow up` is content."""

    async def answers() -> bool:
        return await redis_answers(url)() == ""

    await until(answers, what="an answer of Redis")


async def test_a_url_has_tls_its_own_authority_and_a_password(settings: Settings, tmp_path: Path) -> None:
    chain, key = certificate(tmp_path)
    async with (
        server(tmp_path, {"requirepass": PASSWORD}, password=PASSWORD) as redis,
        behind_tls(redis.port, chain=chain, key=key) as port,
    ):
        secure = f"rediss://:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/0?ssl_ca_certs={chain}"
        store = open_store(settings.model_copy(update={"redis_url": secure}))
        await store.users.set_cohort("poets", tenant="acme", user="alice")
        assert await store.users.cohort(tenant="acme", user="alice") == "poets"
        await store.close()
        await answered(secure)
        for bad, said in (
            (secure.replace(quote(PASSWORD, safe=""), "wrong"), "refuses the credentials"),
            (secure.partition("?")[0], "certificate"),
        ):
            store = open_store(settings.model_copy(update={"redis_url": bad}))
            with pytest.raises(StoreUnavailable, match=f"(?i){said}"):
                await store.users.cohort(tenant="acme", user="alice")
            await store.close()


async def test_a_dead_primarys_replica_serves_once_the_sentinels_say_so(
    settings: Settings, tokens: Tokens, jobs: RecordedJobs, tmp_path: Path
) -> None:
    async with watched(tmp_path, password=PASSWORD) as ([primary, replica], sentinel):
        url = f"redis+sentinel://:{quote(PASSWORD, safe='')}@127.0.0.1:{sentinel.port}/main/0"
        await answered(url)
        async with gateway_client(settings.model_copy(update={"redis_url": url}), tokens, jobs) as client:
            await say(client, comment="Use rhymes.")
            await replicated(primary, replica)
            primary.process.kill()

            async def promoted() -> bool:
                return (await replica.client.info("replication"))["role"] == "master"

            await until(promoted, what="the replica's promotion")

            async def seen() -> bool:
                reply = await client.get("/v1/users/alice/context")
                return reply.status_code == 200

            await until(seen, what="the new primary")
            assert await texts_of(client) == ["Use rhymes."]
            await chat(client)
            await say(client, comment="Be brief.")
            assert await texts_of(client) == ["Use rhymes.", "Be brief."]
