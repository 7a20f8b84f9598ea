"""How a Ray job finds the gateway of its cluster: a named actor that knows one address. From there on it is HTTP."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from polytrace.errors import KeyRefusedError, NotFoundError

NAMESPACE = "polytrace"
ACTOR = "polytrace-gateway"
TOKEN_HINT = (
    "set RAY_AUTH_TOKEN_PATH to the file that holds it (`polytrace serve` prints its own), "
    "or RAY_AUTH_MODE=disabled where the cluster takes none"
)
_TIMEOUT_S = 30.0

_log = logging.getLogger(__name__)


class GatewayAddress:
    """Holds the address for whoever asks; lives as long as the controller's job."""

    def __init__(self, url: str) -> None:
        self._url = url

    def url(self) -> str:
        return self._url


def publish(url: str) -> Any:
    """Makes the address known in the cluster that this process is connected to.

    Returns the actor's handle: the address is known while it is held. When another service has the name already, the
    first one keeps it.
    """
    actor = ray.remote(GatewayAddress).options(name=ACTOR, namespace=NAMESPACE, num_cpus=0)
    try:
        return actor.remote(url)
    except ValueError:
        _log.warning("another polytrace service is known in this cluster; ray://auto leads to that one, not to %s", url)
        return None


def find_gateway() -> str:
    """The gateway's URL, from inside a Ray job or a program that may join its cluster.

    Raises NotFoundError when there is no cluster or it has no service, KeyRefusedError without the cluster's token.
    """
    if not ray.is_initialized():
        try:
            ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False)
        except AuthenticationError as error:
            raise KeyRefusedError(f"the Ray cluster asks for its token: {TOKEN_HINT}") from error
        except ConnectionError as error:
            raise NotFoundError(f"no Ray cluster runs here: {error}") from error
    try:
        actor = ray.get_actor(ACTOR, namespace=NAMESPACE)
    except ValueError:
        raise NotFoundError(
            "no polytrace service is known in this Ray cluster; start one with `polytrace serve`"
        ) from None
    return str(ray.get(actor.url.remote(), timeout=_TIMEOUT_S))
