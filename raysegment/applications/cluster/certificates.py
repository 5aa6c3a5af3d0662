"""Self-signed certificates for a cluster of one's own: an authority for it alone, and one certificate for all its nodes.

Ray asks both ends of a connection for a certificate of the authority (`RAY_USE_TLS`, `RAY_TLS_SERVER_CERT`,
`RAY_TLS_SERVER_KEY`, `RAY_TLS_CA_CERT`), so a client needs the same files. The authority's own key is written nowhere: nobody
can make further certificates.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID = timedelta(days=30)
_Key = ec.EllipticCurvePrivateKey


def make_certificates(folder: Path, names: Sequence[str], now: datetime | None = None) -> None:
    """`authority.crt`, `node.crt` and `node.key` (mode 600) in `folder`, for hosts with these names or addresses and for
    this machine's own; valid for `VALID`."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    began = (now or datetime.now(UTC)) - timedelta(minutes=5)  # clocks differ
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = _authority(authority_key, began)
    certificate = _node(key, list(dict.fromkeys([*names, "localhost", "127.0.0.1"])), authority, authority_key, began)
    (folder / "authority.crt").write_bytes(authority.public_bytes(Encoding.PEM))
    (folder / "node.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    _write_secret(folder / "node.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _authority(key: _Key, began: datetime) -> x509.Certificate:
    name = _name("raysegment's own authority")
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # signs certificates and revocations
    return (
        _builder(name, name, key, began)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )


def _node(key: _Key, names: Sequence[str], authority: x509.Certificate, signer: _Key, began: datetime) -> x509.Certificate:
    ends = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return (
        _builder(_name("raysegment"), authority.subject, key, began)
        .add_extension(x509.SubjectAlternativeName([_alternative(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(ends), critical=False)
        .sign(signer, hashes.SHA256())
    )


def _builder(subject: x509.Name, issuer: x509.Name, key: _Key, began: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(began)
        .not_valid_after(began + VALID)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write_secret(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
