"""Where the commands that serve listen."""

import socket

from .values import number


def add_address_options(group, port: int, others: str):
    """The options `--host` and `--port`, with the default port, and what holds where other machines reach the address."""
    group.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help=f"where to listen; other machines reach it with 0.0.0.0, {others} (default: %(default)s)",
    )
    valid = number(int, at_least=0, at_most=65535)
    group.add_argument("--port", type=valid, default=port, metavar="N", help="0 takes a free one (default: %(default)s)")


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address; nothing is answered on it yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}.") from None
    return listener
