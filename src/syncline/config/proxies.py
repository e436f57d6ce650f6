"""Which servers are asked past the proxies of the environment (`http_proxy`, …): those a proxy reaches another way, or
not at all, because they are this machine's or its network's. Everything else is as the environment says, `no_proxy`
too."""

from ipaddress import ip_address
from urllib.parse import urlsplit


def is_near(url: str) -> bool:
    """A loopback, private or link-local address, or a name without a dot. Nobody is asked what a name resolves to."""
    host = urlsplit(url).hostname or ""
    try:
        return not ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith(".localhost")
