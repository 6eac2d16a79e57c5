"""Components and forms supervised like commands: private parts of discord.py 2.7.1 that need it are here.

discord.py only logs what a view, a form or a dynamic item raises, and forgets who pressed. Its store of views is
replaced by one that watches each callback, and gives views without an `on_error` of their own one that answers.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import discord
from discord.ui.modal import Modal
from discord.ui.view import BaseView
from discord.ui.view import ViewStore as _ViewStore

from utils.bot.invocations import Invocation

if TYPE_CHECKING:
    from utils.bot.client import Guildbook


def install(bot: Guildbook) -> None:
    """Replace the store of views of a bot that has none yet."""
    state = bot._connection
    state._view_store = ViewStore(state, bot)


class ViewStore(_ViewStore):
    """discord.py's store of views, which watches every callback."""

    def __init__(self, state: Any, bot: Guildbook) -> None:
        super().__init__(state)
        self._bot = bot
        #: The run of the interaction that is being dispatched.
        self._starting: Invocation | None = None
        self._running: dict[int, Invocation] = {}

    def add_view(self, view: Any, message_id: int | None = None) -> None:
        """Listen for a view or form; its errors are answered unless it has an `on_error` of its own."""
        if getattr(view.on_error, "__func__", None) in (BaseView.on_error, Modal.on_error):
            view.on_error = functools.partial(self._on_error, view)
        super().add_view(view, message_id)

    def dispatch_view(self, component_type: int, custom_id: str, interaction: discord.Interaction[Any]) -> None:
        """Run the callback of a component."""
        with self._dispatching(interaction) as invocation:
            item = self._find_item(component_type, custom_id, interaction)
            if item is not None:
                what = type(item).__name__.lower() if type(item).__module__.startswith("discord.") else "component"
                label = getattr(item, "label", None) or getattr(item, "placeholder", None) or custom_id
                self._name(invocation, f"{what} {label!r}", item.view, item.callback)
            super().dispatch_view(component_type, custom_id, interaction)

    def dispatch_modal(self, custom_id: str, interaction: discord.Interaction[Any], *args: Any) -> None:
        """Run the callback of a form."""
        with self._dispatching(interaction) as invocation:
            if (modal := self._modals.get(custom_id)) is not None:
                self._name(invocation, f"form {modal.title!r}", modal, modal.on_submit)
            super().dispatch_modal(custom_id, interaction, *args)

    def add_task(self, task: asyncio.Task[None]) -> None:
        """Keep a task of a callback, and watch it."""
        super().add_task(task)
        invocation, self._starting = self._starting, None
        if invocation is not None:
            self._bot.invocations.watch(invocation, task)

    async def schedule_dynamic_item_call(
        self,
        component_type: int,
        factory: Any,
        interaction: discord.Interaction[Any],
        custom_id: str,
        match: re.Match[str],
    ) -> None:
        """Run the callback of a dynamic item. discord.py swallows its errors, so they are caught inside."""
        invocation = self._running.get(interaction.id)
        if invocation is not None:
            invocation.describe(f"{factory.__name__} {custom_id!r}", factory.callback)
            invocation.log = logging.getLogger(factory.__module__)
            factory = _Watched(factory, invocation)
        await super().schedule_dynamic_item_call(component_type, factory, interaction, custom_id, match)

    @contextmanager
    def _dispatching(self, interaction: discord.Interaction[Any]) -> Iterator[Invocation]:
        invocations = self._bot.invocations
        with invocations.starting(interaction) as invocation:
            self._starting = self._running[interaction.id] = invocation
            try:
                yield invocation
            finally:
                if self._starting is not None:
                    self._starting = None
                    invocations.watch(invocation, None)
        task = invocation.deadline.task
        if task is None:
            self._running.pop(interaction.id, None)
        else:
            task.add_done_callback(lambda _: self._running.pop(interaction.id, None))

    def _find_item(self, kind: int, custom_id: str, interaction: discord.Interaction[Any]) -> Any:
        message = interaction.message
        found = None if message is None else self._views.get(message.id, {}).get((kind, custom_id))
        return found or self._views.get(None, {}).get((kind, custom_id))

    def _name(self, invocation: Invocation, what: str, view: Any, callback: Any) -> None:
        """Say in log lines whose callback runs: the author's class is the name that they know."""
        invocation.describe(f"{what} of {type(view).__name__}", callback)
        invocation.log = logging.getLogger(type(view).__module__)

    async def _on_error(
        self, view: Any, interaction: discord.Interaction[Any], error: Exception, item: Any = None
    ) -> None:
        """Take the place of the `on_error` of discord.py's classes, which only log."""
        invocation = self._running.get(interaction.id)
        if invocation is not None:
            await invocation.report(error)


class _Watched:
    """A class of dynamic items whose errors are reported."""

    def __init__(self, factory: Any, invocation: Invocation) -> None:
        self._factory = factory
        self._invocation = invocation

    async def from_custom_id(self, *args: Any) -> Any:
        """Return the item, with callbacks that report their errors."""
        try:
            item = await self._factory.from_custom_id(*args)
        except Exception as exc:
            await self._invocation.report(exc)
            raise
        item.callback = self._reporting(item.callback, None)
        item.interaction_check = self._reporting(item.interaction_check, False)
        return item

    def _reporting(self, function: Callable[..., Awaitable[Any]], failed: Any) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any) -> Any:
            try:
                return await function(*args)
            except Exception as exc:
                await self._invocation.report(exc)
                return failed

        return call
