"""Where object stores are and whose they are, from the variables and files that their own tools read."""

from __future__ import annotations

import configparser
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from adapters_store.sources.guard import Refused, check_literal, origin_of

if TYPE_CHECKING:
    from obstore.store import S3Credential

CREDENTIALS_S = 300.0
"""A credentials file is read again after so long: other programs renew it."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A store's URL, and the hosts that may be spoken to: its own and those that give it credentials."""

    url: str
    hosts: tuple[str, ...]

    @property
    def is_http(self) -> bool:
        return self.url.startswith("http://")


def s3_endpoint(bucket: str) -> Endpoint:
    """AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, else that of AWS_REGION. ValueError for one that is no safe URL."""
    region = _variable("AWS_REGION", "AWS_DEFAULT_REGION") or "us-east-1"
    given = _variable("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    url = given or f"https://s3.{region}.amazonaws.com"
    further = [] if given else [f"{bucket}.s3.{region}.amazonaws.com"]
    sts = _variable("AWS_ENDPOINT_URL_STS", "AWS_STS_ENDPOINT")
    further += [_host(sts) if sts else f"sts.{region}.amazonaws.com", "169.254.169.254", "169.254.170.2"]
    further += ["169.254.170.23", "fd00:ec2::254", "fd00:ec2::23"]
    return Endpoint(url, (_host(url), *further))


def google_endpoint(bucket: str) -> Endpoint:
    """GOOGLE_BASE_URL, else Google's."""
    url = _variable("GOOGLE_BASE_URL") or "https://storage.googleapis.com"
    further = ("oauth2.googleapis.com", "sts.googleapis.com", "iamcredentials.googleapis.com")
    return Endpoint(url, (_host(url), *further, "metadata.google.internal", "metadata", "169.254.169.254"))


def azure_endpoint(container: str) -> Endpoint:
    """AZURE_STORAGE_ENDPOINT, else that of AZURE_STORAGE_ACCOUNT_NAME."""
    account = _variable("AZURE_STORAGE_ACCOUNT_NAME")
    url = _variable("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
    if not url and not account:
        raise ValueError("AZURE_STORAGE_ACCOUNT_NAME is not set")
    url = url or f"https://{account}.blob.core.windows.net"
    authority = _variable("AZURE_AUTHORITY_HOST", "AZURE_STORAGE_AUTHORITY_HOST") or "login.microsoftonline.com"
    identity = _variable("AZURE_IDENTITY_ENDPOINT", "AZURE_MSI_ENDPOINT")
    hosts = [_host(url), urlsplit(authority).hostname or authority, "169.254.169.254"]
    return Endpoint(url, (*hosts, urlsplit(identity).hostname or "") if identity else tuple(hosts))


def s3_credentials() -> Callable[[], S3Credential] | None:
    """The keys in the shared credentials file, where AWS_PROFILE or no other way names some.

    None where the environment has keys or a role, or there is no such file: obstore's own order then, which ends
    at the machine's role. ValueError for a profile that is named but not there.
    """
    profile = os.environ.get("AWS_PROFILE")
    roles = ("AWS_WEB_IDENTITY_TOKEN_FILE", *(f"AWS_CONTAINER_CREDENTIALS_{kind}_URI" for kind in ("RELATIVE", "FULL")))
    if _variable("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE") or (not profile and _variable(*roles)):
        return None
    try:
        path = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    except RuntimeError:
        if not profile:
            return None
        raise ValueError("no home folder with .aws/credentials in it: set AWS_SHARED_CREDENTIALS_FILE") from None
    if not profile and not path.is_file():
        return None

    def read() -> S3Credential:
        found = configparser.ConfigParser(interpolation=None)
        try:
            found.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):  # their text quotes the line
            raise ValueError(f"{path} is no file of profiles and keys") from None
        name = profile or "default"
        if not found.has_option(name, "aws_access_key_id") or not found.has_option(name, "aws_secret_access_key"):
            raise ValueError(f"{path} has no keys for the profile {name}")
        return {
            "access_key_id": found[name]["aws_access_key_id"],
            "secret_access_key": found[name]["aws_secret_access_key"],
            "token": found[name].get("aws_session_token"),
            "expires_at": datetime.now(UTC) + timedelta(seconds=CREDENTIALS_S),
        }

    read()
    return read


def _variable(*names: str) -> str | None:
    """The first of these environment variables that is set to something."""
    return next((value for name in names if (value := os.environ.get(name))), None)


def _host(url: str) -> str:
    """The host of a URL in the environment; ValueError for one that is no safe URL, or leads to a metadata address."""
    try:
        host = origin_of(url, allow_http=True).host
        check_literal(host, allow_private=True)
    except Refused as refused:
        raise ValueError(f"an endpoint in the environment: {refused}") from None
    return host
