"""Checks that RAY_ADDRESS names a Ray that answers. Ray itself would wait for minutes in silence."""

from __future__ import annotations

import socket
import threading

from unet_ray.config import UserError, first_line
from unet_ray.ray_backend import internals

CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 30.0
"""How long the port may take to accept a connection, and the head of the cluster to answer."""
OWN = "or unset RAY_ADDRESS: then a Ray of its own is started on this machine"


def check_address(address: str) -> None:
    """Raises UserError, which names what to type instead, if no Ray answers at RAY_ADDRESS."""
    host_and_port = _found_here() if address == "auto" else _host_and_port(address)
    host, _, port = host_and_port.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"RAY_ADDRESS={address}: nothing answers at {host_and_port} ({reason}). Is the cluster running, and is this"
            f" its head? Correct it, {OWN}"
        ) from None
    _ask(host_and_port, address)


def _found_here() -> str:
    found = internals.running_here()
    if found is None:
        raise UserError(f"RAY_ADDRESS=auto: no Ray runs on this machine. Start one with `ray start --head`, {OWN}")
    return found


def _host_and_port(address: str) -> str:
    scheme, separator, rest = address.rpartition("://")
    host, colon, port = rest.rstrip("/").rpartition(":")
    if scheme == "ray":
        raise UserError(
            f"RAY_ADDRESS={address}: Ray Client can't run this command. Submit it as a job, which runs in the cluster:"
            f" ray job submit --address http://{host or port}:8265 -- unet-ray …"
        )
    if separator:
        raise UserError(
            f"RAY_ADDRESS={address}: this is no address of a cluster's head, such as {host or port}:6379. To run the"
            f" command as a job: ray job submit --address http://{rest} -- unet-ray …"
        )
    if not colon or not host or not port.isdecimal():
        raise UserError(f"RAY_ADDRESS={address}: it takes a host and a port, such as {(host or rest).strip(':')}:6379")
    return f"{host}:{port}"


def _ask(host_and_port: str, address: str) -> None:
    """Asks the head for the cluster's name. The question runs in a thread of its own, since Ray repeats it for long."""
    failed: list[Exception] = []
    answered = threading.Event()

    def ask() -> None:
        try:
            internals.ask_head(host_and_port)
        except Exception as error:
            failed.append(error)
        answered.set()

    threading.Thread(target=ask, name="unet_ray: asks the cluster's head", daemon=True).start()
    if not answered.wait(ANSWER_SECONDS):
        failed.append(TimeoutError(f"no answer within {ANSWER_SECONDS:.0f} s"))
    if failed:
        raise refused(address, failed[0])


def refused(address: str, error: BaseException) -> UserError:
    """Returns the error for a Ray that was found but doesn't let us in."""
    reason = first_line(error).partition(". ")[0]  # Ray goes on for a page
    if any(word in str(error).lower() for word in ("token", "unauthenticated", "authentication")):
        return UserError(
            f"RAY_ADDRESS={address}: the cluster refuses this machine's token ({reason}). Set"
            " RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` prints on its head"
        )
    return UserError(f"RAY_ADDRESS={address}: no Ray answers there ({reason}). Correct it, {OWN}")
