"""Whether the hub can be reached, found out once and quickly, and what to say where it cannot."""

import socket
from functools import cache
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

import huggingface_hub


@cache
def hub_answers(timeout: float = 3.0) -> bool:
    """Whether the hub can be reached: one connection attempt, once a process (a library's own try takes 25 s).

    Where a proxy stands before the hub, whether the proxy can be reached.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    target = urlparse(huggingface_hub.constants.ENDPOINT)
    proxies = {} if proxy_bypass(target.hostname or "") else getproxies()
    if proxy := proxies.get(target.scheme) or proxies.get("all"):
        target = urlparse(proxy if "//" in proxy else f"http://{proxy}")
    try:
        port = target.port or (443 if target.scheme == "https" else 80)
        socket.create_connection((target.hostname, port), timeout).close()
    except OSError:
        return False
    return True


def require_hub(what: str) -> None:
    """Raise where `what` would have to come from a hub that does not answer; with HF_HUB_OFFLINE=1 the cache may serve.

    Raises:
        ConnectionError: With the ways round.
    """
    if not huggingface_hub.constants.HF_HUB_OFFLINE and not hub_answers():
        raise ConnectionError(
            f"{what} is no local path, and the hub cannot be reached. Name a local path, use the built-in sample "
            "(--dataset sample), or set HF_HUB_OFFLINE=1 to use what is in the cache."
        )
