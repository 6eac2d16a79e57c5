"""The private parts of discord.py that utils/bot uses exist and have not changed.

If an upgrade of discord.py fails a test here: read the changed code, adapt the module that is named, then update the
digest below.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import discord
import pytest
from discord import app_commands
from discord.ext import commands, tasks
from discord.interactions import InteractionResponse
from discord.state import ConnectionState
from discord.ui.modal import Modal
from discord.ui.view import BaseView, ViewStore

from tests.mirror.discord.test_private_hooks import digest_of
from utils.bot import command_tree, periodic, responses, view_store

#: SHA-256 of the source of what is replaced or copied, and of what calls it; by the module that does that.
REVIEWED: dict[str, tuple[str, tuple[Callable[..., Any], ...]]] = {
    command_tree.__name__: (
        "7da0c44540621028816edcd1a99673561408412b35bdbb7f0de71c2f9d8cb401",
        (app_commands.CommandTree._from_interaction, app_commands.CommandTree._call,
         app_commands.CommandTree._dispatch_error, app_commands.Command._invoke_autocomplete),
    ),
    view_store.__name__: (
        "b759182709763ce823f7561a7228852a4e533d26274a8fc6fb21e5b48d778383",
        (ViewStore.add_view, ViewStore.add_task, ViewStore.dispatch_view, ViewStore.dispatch_modal,
         ViewStore.dispatch_dynamic_items, ViewStore.schedule_dynamic_item_call, BaseView._scheduled_task,
         BaseView._dispatch_item, Modal._scheduled_task, Modal._dispatch_submit,
         ConnectionState.parse_interaction_create),
    ),
    periodic.__name__: (
        "843e164cf1fb1e27ff76d1de77db783c028bf25d870f7a4791398afbf45584e8",
        (tasks.Loop._loop, tasks.Loop._call_loop_function, tasks.Loop.__get__, tasks.Loop.start, tasks.Loop._error),
    ),
    responses.__name__: (
        "f45167058e979a793058b2bb95d42dd95d5dc0944f7d73e169349835e217a4d1",
        (InteractionResponse.defer, InteractionResponse.send_message, InteractionResponse.edit_message,
         InteractionResponse.send_modal, InteractionResponse.autocomplete, InteractionResponse.launch_activity,
         discord.Webhook.from_state.__func__),  # type: ignore[attr-defined]
    ),
}  # fmt: skip


@pytest.mark.parametrize("module", REVIEWED)
def test_what_a_module_relies_on_is_unchanged(module: str) -> None:
    digest, functions = REVIEWED[module]
    assert digest_of(*functions) == digest


def test_an_interaction_takes_its_response_from_the_slots_that_are_set() -> None:
    assert {"_cs_response", "_cs_followup", "_cs_command", "_cs_namespace"} <= set(discord.Interaction.__slots__)
    assert "_view_store" in inspect.getsource(ConnectionState.clear)


def test_the_store_of_views_is_replaced_in_time() -> None:
    bot = commands.Bot("!", intents=discord.Intents.none())
    view_store.install(bot)  # type: ignore[arg-type]
    bot._connection.clear(views=False)  # as READY does
    assert isinstance(bot._connection._view_store, view_store.ViewStore)
