"""Identity tokens for a tracking server behind Google IAP or on Cloud Run.

Google asks for an OpenID Connect token that names the server as its audience; `google-auth` gets one for a service
account. It stays in this process: MLflow's client asks for it with every request, and it goes to the tracking server
alone. See https://cloud.google.com/iap/docs/authentication-howto and
https://cloud.google.com/run/docs/authenticating/service-to-service.
"""

from __future__ import annotations

import os
import threading
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urljoin, urlsplit

from beam_pipeline.errors import ConfigError
from beam_pipeline.tracking.client import store_uri

_VARIABLE = "MLFLOW_TRACKING_AUTH"
_NAME = "beam-pipeline-identity-token"

# Longer than google-auth's own margin (under four minutes), so that a token outlives a request that is retried.
_MARGIN = timedelta(minutes=5)

# Where MLflow's own credentials take Authorization, IAP reads the first of these and Cloud Run the second.
_HEADERS_BESIDE = ("Proxy-Authorization", "X-Serverless-Authorization")


def authorize(tracking_uri: str | None, audience: str | None) -> None:
    """Lets MLflow's client send identity tokens to the tracking server; without an audience it sends none.

    Args:
        tracking_uri: the server; MLFLOW_TRACKING_URI unless it is named.
        audience: IAP's client id, or the service's URL on Cloud Run.

    Raises:
        ConfigError: no token is available here, or the connection would expose it.
    """
    if os.environ.get(_VARIABLE) == _NAME:  # of an earlier job in this process
        del os.environ[_VARIABLE]
    if not audience:
        return
    uri = urlsplit(store_uri(tracking_uri))
    if uri.scheme != "https" and (uri.scheme, uri.hostname) not in (("http", "127.0.0.1"), ("http", "localhost")):
        raise ConfigError(
            f"--tracking_audience is for a tracking server at https://, not at {uri.scheme or 'a folder'}; name it "
            "with --tracking_uri or leave the audience out"
        )
    if uri.password:
        raise ConfigError(
            "--tracking_audience and a password in --tracking_uri cannot be combined; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        )
    if os.environ.get(_VARIABLE):
        raise ConfigError(f"--tracking_audience and {_VARIABLE} cannot be combined; unset one")
    auth = _Auth(_origin(uri.geturl()), audience)
    auth.token()  # Here the message stays whole; MLflow would wrap it.
    _register(auth)
    os.environ[_VARIABLE] = _NAME


class _Auth:
    """Adds the token to requests; called by `requests`, from several threads."""

    def __init__(self, origin: tuple[str, str | None, int | None], audience: str) -> None:
        self._origin = origin
        self._audience = audience
        self._credentials: Any = None
        self._lock = threading.Lock()

    def token(self) -> str:
        """Returns a token that is good for some minutes.

        Raises:
            ConfigError: no token is available.
        """
        from google.auth.exceptions import GoogleAuthError
        from google.auth.transport.requests import Request

        with self._lock:
            try:
                if self._credentials is None:
                    self._credentials = _token_source(self._audience)
                expiry = self._credentials.expiry  # in UTC, without saying so
                if not expiry or expiry.replace(tzinfo=UTC) - datetime.now(UTC) < _MARGIN:
                    self._credentials.refresh(Request())
            except (GoogleAuthError, ValueError) as error:
                # The rest of the arguments can be a response with another token in it.
                reason = " ".join(str(error.args[0] if error.args else type(error).__name__).split())
                raise ConfigError(
                    f"no identity token for --tracking_audience={self._audience}: {reason}; point "
                    "GOOGLE_APPLICATION_CREDENTIALS to a service account's key or to the file that `gcloud auth "
                    "application-default login --impersonate-service-account=ACCOUNT` writes, or run on Google Cloud: "
                    "a user login has none, unless --impersonate_service_account is given"
                ) from None
            return str(self._credentials.token)

    def __call__(self, request: Any) -> Any:
        if _origin(request.url) == self._origin:
            bearer = f"Bearer {self.token()}"
            names = _HEADERS_BESIDE if "Authorization" in request.headers else ("Authorization",)
            request.headers.update(dict.fromkeys(names, bearer))
            request.register_hook("response", self._keep_home)
        return request

    def _keep_home(self, response: Any, **_options: Any) -> None:
        """Removes the token from a request that is redirected to another server."""
        target = response.headers.get("Location")
        if target and _origin(urljoin(response.url, target)) != self._origin:
            for name in ("Authorization", *_HEADERS_BESIDE):
                response.request.headers.pop(name, None)


def _token_source(audience: str) -> Any:
    """Returns google-auth's credentials for an audience: of the account that is impersonated, or the default one's."""
    from google.auth.impersonated_credentials import IDTokenCredentials
    from google.auth.transport.requests import Request
    from google.oauth2.id_token import fetch_id_token_credentials

    from beam_pipeline import credentials

    if account := credentials.impersonated():
        return IDTokenCredentials(account, audience, include_email=True)  # IAP knows accounts by their address.
    return fetch_id_token_credentials(audience, request=Request())


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def _register(auth: _Auth) -> None:
    """Registers the token's source with MLflow, whose plugins would otherwise have to be installed as packages."""
    from mlflow.tracking.request_auth import registry
    from mlflow.tracking.request_auth.abstract_request_auth_provider import RequestAuthProvider

    class Provider(RequestAuthProvider):
        def get_name(self) -> str:
            return _NAME

        def get_auth(self) -> _Auth:
            return auth

    known = registry._request_auth_provider_registry
    known._registry = [provider for provider in known if provider.get_name() != _NAME]
    known.register(Provider)
