"""The settings: each field is a variable ECONOMY_…."""

from __future__ import annotations

from pydantic import Field

from utils.packs import PackSettings


class Settings(PackSettings):
    """The settings of this pack."""

    daily: int = Field(default=100, ge=1, le=1_000_000, description="Coins that /daily gives.")
