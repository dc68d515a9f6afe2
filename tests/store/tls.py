"""Certificates for servers in tests, made by the openssl command."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]


@dataclass
class Authority:
    """A certificate authority in a folder; clients trust it when SSL_CERT_FILE is its `certificate`."""

    folder: Path
    asked: list[str | None] = field(default_factory=list)
    """the server names that clients asked for"""

    def __post_init__(self) -> None:
        self._request("ca", ["-subj", "/CN=a test's authority", "-addext", "keyUsage=critical,keyCertSign"])

    @property
    def certificate(self) -> Path:
        return self.folder / "ca.pem"

    def server(self, names: str) -> ssl.SSLContext:
        """A server's side with a certificate for subject names, such as "DNS:store.example,IP:127.0.0.1"."""
        signed = ["-CA", str(self.certificate), "-CAkey", str(self.folder / "ca.key")]
        extensions = ["-addext", "basicConstraints=critical,CA:FALSE", "-addext", f"subjectAltName={names}"]
        self._request("server", ["-subj", "/CN=a test's server", *signed, *extensions])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "server.pem", self.folder / "server.key")
        context.sni_callback = lambda _, name, __: self.asked.append(name)
        return context

    def _request(self, name: str, options: list[str]) -> None:
        made = ["-keyout", str(self.folder / f"{name}.key"), "-out", str(self.folder / f"{name}.pem")]
        subprocess.run(["openssl", "req", "-x509", *KEY, *options, *made], check=True, capture_output=True)
