"""A Discord stand-in on real localhost sockets: REST v10 and Gateway v10, written from Discord's documentation."""

from .interactions import InteractionResult
from .lies import Lies
from .limits import Limits
from .server import Simulator
from .world import World

__all__ = ["InteractionResult", "Lies", "Limits", "Simulator", "World"]
