"""A Discord stand-in on real localhost sockets: REST v10 and Gateway v10, written from Discord's documentation."""

from .faults import FaultInjector
from .interactions import InteractionResult
from .limits import Limits
from .server import Simulator
from .world import World

__all__ = ["FaultInjector", "InteractionResult", "Limits", "Simulator", "World"]
