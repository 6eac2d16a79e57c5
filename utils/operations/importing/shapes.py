"""Recognizes what the entries of a file are about: a member, a user, a guild, a message, or nothing of Discord's.

docs/how-to/importing.md shows the shapes. `Outline` decides which values are split into entries, and where an entry is
stored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from utils.documents.codec import MAX_BYTES
from utils.operations.importing import repair
from utils.operations.importing.reader import Entry, Unread, is_same
from utils.operations.importing.repair import UnusableValue

#: What the ids that are keys of a container, or the `id` of its elements, belong to. "red" are the scopes of Red.
Holds = Literal["unknown", "users", "guilds", "others", "red"]

#: Names of containers of users, guilds and others, spelled as `_plain` does.
_USERS = frozenset(("users", "members", "players", "userdata", "memberdata", "profiles", "leaderboard", "accounts"))
_GUILDS = frozenset(("guilds", "servers", "guilddata", "serverdata"))
_OTHERS = frozenset(
    ("channels", "textchannels", "voicechannels", "categories", "threads", "roles", "messages", "emojis", "stickers",
     "reactionroles", "tickets", "giveaways", "polls", "starboard")
)  # fmt: skip
#: Red's scopes (redbot.core.config), and the ids that are their keys.
_RED: Mapping[str, Holds | None] = {
    "GLOBAL": None, "GUILD": "guilds", "MEMBER": "users", "USER": "users", "ROLE": "others", "TEXTCHANNEL": "others",
    "CHANNEL": "others", "VOICECHANNEL": "others", "CUSTOM": None,
}  # fmt: skip
#: Fields that identify the guild and the user of an entry. The short names may also be names of people.
_GUILD_FIELDS = ("guildid", "serverid", "guild", "server", "gid")
_USER_FIELDS = ("userid", "memberid", "discordid", "user", "member", "uid", "authorid")
_SHORT_NAMES = frozenset(("guild", "server", "user", "member", "gid", "uid"))
#: Fields of which one suffices as the key, in order of preference.
_OWN_FIELDS = ("id", "messageid", "channelid", "roleid")
#: Fields that only entries about people have.
_PERSONAL = frozenset(
    ("username", "discriminator", "avatar", "globalname", "nick", "nickname", "xp", "exp", "level", "detailedxp",
     "messagecount", "lastactive", "balance", "wallet", "bank", "coins", "cash", "credits", "warns", "warnings",
     "statistics", "preferences", "joindate")
)  # fmt: skip
_SETTINGS = re.compile(r"(?:config|configuration|conf|settings?|options|prefs)\Z")
_ID_INSIDE = re.compile(r"(?<![0-9])[0-9]{15,20}(?![0-9])")
_OBJECT_ID = re.compile(r"[0-9a-f]{24}")
_NUMBER = re.compile(r"\s*(?:<@!?)?([0-9]{1,20})>?\s*")
#: How many containers deep users are looked for in one that can be a document.
NESTED_DEPTH = 4
#: Fields of the value in a record of a key and a value.
_VALUE_FIELDS = ("data", "value", "json")
#: The fields of a line in our own export.
EXPORT_FIELDS = frozenset(("guild_id", "key", "value"))
LATE_GUILD = "the guild is stated after its users, which have none: import the file with --guild"
NO_KEY = "the entry has no key, id, _id or user_id"


@dataclass(frozen=True, eq=False, slots=True)
class Scope:
    """A container whose entries are read one by one."""

    holds: Holds = "unknown"
    #: Names of the containers around its entries; they become part of the keys.
    words: tuple[str, ...] = ()
    #: The guild and the user that its entries belong to; None if unknown.
    guild_id: int | None = None
    user_id: int | None = None
    #: Whether `guild_id` is only certain for entries about users.
    is_guild_of_users: bool = False
    #: Whether `guild_id` is that of entries which do not say theirs.
    is_default_guild: bool = False
    #: Whether its values are entries even if they contain ids.
    is_leaf: bool = False
    #: Entries without a recognized key become one document with this key; None: a document each.
    rest_key: str | None = None
    #: The scope of the value in a record of a key and a value, such as quick.db's; None for other containers.
    record: Scope | None = None


@dataclass(slots=True)
class _Rest:
    """What a container holds besides members: the entries so far, and their size in bytes."""

    entries: list[Entry] = field(default_factory=list)
    size: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where an entry is stored, and whom it is about."""

    guild_id: int
    key: str
    #: The user whom the entry is about; None if unknown or none.
    user_id: int | None = None
    #: Whether it contains the statistics and preferences of this user in this guild.
    is_member: bool = False
    #: Whether several entries of this file may have this key without replacing each other.
    is_record: bool = False
    #: The repair of the key, and why it does not identify a member as it should; None if there is nothing to report.
    repaired: str | None = None
    problem: str | None = None


class Outline:
    """The outline of one file; implements `reader.Outline`."""

    def __init__(self, kind: str, stem: str, *, guild_id: int | None = None, is_forced: bool = False) -> None:
        """
        kind: the kind of file: members, users, emojis, shop, settings or documents.
        stem: the file's name without its suffix.
        guild_id: the guild of entries that do not say theirs; None if unknown.
        is_forced: the operator chose the kind, so that documents are not examined further.
        """
        self._kind = kind
        self._stem = stem
        self._guild_id = guild_id
        #: Whether ids have a meaning at all; otherwise each entry is a document under its own key.
        self._is_about_people = kind in ("members", "users") or (kind == "documents" and not is_forced)
        digits = 1 if kind in ("members", "users") else 15
        one = rf"(?:<@!?)?(?<![0-9])([0-9]{{{digits},20}})(?![0-9])>?"
        self._id = re.compile(rf"\s*{one}\s*")
        self._pair = re.compile(rf"\s*{one}\s*[-_:;/.,| ]\s*{one}\s*")
        #: The first container of users and of guilds, whose name is not part of the keys.
        self._first: dict[Holds, tuple[str, ...]] = {}
        self._rest: dict[Scope, _Rest] = {}
        self._is_single = False
        #: Whether users were placed without a guild, although their file may state it further on.
        self._has_guildless_users = False

    # What is split into entries

    def root(self, value: Any) -> Scope | None:
        """Return the scope of the file; None if it is one document."""
        scope = Scope(guild_id=self._guild_id, is_default_guild=self._guild_id is not None)
        if self._kind == "settings":
            self._is_single = isinstance(value, dict)
            return None if self._is_single else scope
        if not self._is_about_people:
            return scope
        word = _plain(self._stem)
        holds: Holds = "others" if word in _OTHERS else "guilds" if word in _GUILDS else "unknown"
        if isinstance(value, Unread):
            fields = _fields(value.fields)
            is_mixed = bool(fields) and value.inner is not None and self._holds(*value.inner) is not None
        else:
            fields = _fields(value) if isinstance(value, dict) else {}
            is_mixed = isinstance(value, dict) and any(self._holds(key, inner) for key, inner in value.items())
        own = self._id.fullmatch(self._stem)
        if own and self._guild_id is None and (is_mixed or self._has_ids(value)):
            scope = replace(scope, guild_id=_number(own[1]), is_guild_of_users=True)
        if is_mixed:
            stated = self._number(fields, _GUILD_FIELDS)
            is_default = scope.is_default_guild and stated is None
            return replace(
                scope, guild_id=stated or scope.guild_id, is_default_guild=is_default, rest_key=self._stem
            )  # fmt: skip
        self._is_single = self._kind == "documents" and self._is_settings(value)
        return None if self._is_single else replace(scope, holds=holds)

    def descend(self, scope: Scope, key: str | None, value: Any) -> Scope | None:
        """Return the scope of a value's entries; None if the value is one entry."""
        if not self._is_about_people or scope.is_leaf:
            return None
        if scope.record is not None:
            return scope.record if key is not None and _plain(key) in _VALUE_FIELDS else None
        if key is None:
            return self._descend_element(scope, value)
        words = (*scope.words, key)
        if scope.holds == "red":
            holds = "guilds" if key == "MEMBER" else _RED.get(key)
            if holds is not None:  # only `MEMBER` nests ids: guild, then user
                return replace(scope, holds=holds, words=words, is_leaf=key != "MEMBER")
            return replace(scope, holds="others", words=words) if isinstance(value, Unread) else None
        if not scope.words and key.isdecimal() and _is_red(value):
            return replace(scope, holds="red", words=words, rest_key=None)
        own = self._id.fullmatch(key)
        if own is not None:
            return self._descend_id(scope, own, value)
        if self._pair.fullmatch(key):
            return None
        holds = self._holds(key, value)
        if holds is None and isinstance(value, Unread) and value.has_entries:  # too long for one document
            holds = "others" if scope.holds == "others" or _plain(key) in _OTHERS else "unknown"
        return None if holds is None else replace(scope, holds=holds, words=words, rest_key=None)

    def _descend_id(self, scope: Scope, own: re.Match[str], value: Any) -> Scope | None:
        """Return the scope of a value under an id: a guild's users, or a user's guilds."""
        number = _number(own[1])
        if scope.holds == "others":
            return replace(scope, words=(*scope.words, own[1])) if isinstance(value, Unread) else None
        has_ids = self._has_ids(value, len(own[1]))
        if number is None or (scope.guild_id is not None and not scope.is_guild_of_users):
            # The guild that an operator names is that of entries which do not say theirs.
            is_guild = scope.is_default_guild and has_ids and (number == scope.guild_id or _has_objects(value))
            if number is None or not is_guild:
                return None
        if has_ids and scope.holds == "users":
            return replace(scope, holds="guilds", user_id=number, is_leaf=True, rest_key=None)
        guild = replace(scope, guild_id=number, is_guild_of_users=False, is_default_guild=False, rest_key=None)
        if has_ids or (isinstance(value, list) and self._is_list_of_users(value)):
            return replace(guild, holds="users")
        if isinstance(value, Unread) and value.brackets.startswith("[{") and scope.holds != "users":
            return guild
        is_large = isinstance(value, Unread) and value.brackets.startswith("{") and scope.holds != "users"
        depth = 0 if _is_person(value) else NESTED_DEPTH
        if is_large or (
            isinstance(value, dict) and any(self._holds(name, item, depth) for name, item in value.items())
        ):
            return replace(guild, holds="unknown", rest_key=own[1])
        return None

    def _descend_element(self, scope: Scope, value: Any) -> Scope | None:
        """Return the scope of an array's element: a guild with its users, or a key and a value that is split.

        Also of an element that is itself an object of guilds or users.
        """
        if self._has_ids(value):
            return scope
        if isinstance(value, Unread):
            members = dict(value.fields) | dict([value.inner] if value.inner is not None else [])
        elif isinstance(value, dict):
            members = value
        else:
            return None
        if members.keys() == EXPORT_FIELDS or not any(
            isinstance(item, dict | list | Unread) for item in members.values()
        ):
            return None
        fields = _fields(members)
        own = _scalar(members.get("key")) or _scalar(fields.get("id"))
        inner = next((fields[name] for name in _VALUE_FIELDS if name in fields), None)
        if own is not None and len(members) == 2 and inner is not None:
            record = self.descend(scope, own, inner)
            return None if record is None else Scope(record=record)
        number = self._number(fields, _GUILD_FIELDS) or self._snowflake(own)
        is_split = isinstance(value, Unread) or any(self._holds(key, item) for key, item in members.items())
        return Scope("unknown", scope.words, number, rest_key=str(number)) if number is not None and is_split else None

    def absorbs(self, entry: Entry) -> bool:
        """Return whether an entry becomes part of the document of what its container holds besides members."""
        scope: Scope = entry.scope
        if scope.record is not None:
            return True  # the key of a record is part of the scope
        if scope.rest_key is None or entry.problem or entry.key is None or self._is_id(entry.key):
            return False
        rest = self._rest.setdefault(scope, _Rest())
        if rest.size > MAX_BYTES:
            return False
        rest.size += len(entry.text.encode("utf-8", "surrogatepass")) + len(json.dumps(entry.key)) + len(": , ")
        rest.entries.append(entry)
        return True

    def close(self, scope: Scope) -> Iterator[Entry]:
        """Return the document of what a container held besides members; several if it would be too long."""
        rest = self._rest.pop(scope, None)
        if rest is None or scope.rest_key is None:
            return
        entries = rest.entries
        if rest.size > MAX_BYTES:
            yield from entries
            return
        text = "{" + ", ".join(f"{json.dumps(entry.key)}: {entry.text}" for entry in entries) + "}"
        value = {entry.key: entry.value for entry in entries}
        replaced = sum(entry.replaced + (not is_same(value[entry.key], entry.value)) for entry in entries)
        outer = replace(scope, holds="guilds" if scope.guild_id else "others", rest_key=None)
        yield Entry(scope.rest_key, value, text, entries[0].line, entries[0].column, None, outer, replaced)

    def _holds(self, name: str, value: Any, depth: int = NESTED_DEPTH) -> Holds | None:
        """Return what a container with a name, such as `users`, holds; None if it is not split.

        It is split if it holds users or guilds, or a container in it does, up to a depth.
        """
        word = _plain(name)
        if (word in _USERS or word in _GUILDS) and (self._has_any_id(value) or self._is_list_of_records(value)):
            return "users" if word in _USERS else "guilds"
        if word in _OTHERS:
            return None
        if self._has_ids(value):
            if word in _PERSONAL or isinstance(value, Unread):
                return "unknown"
            return "unknown" if all(_is_personal(item) or self._has_ids(item) for item in value.values()) else None
        if isinstance(value, dict) and depth > 0 and not _is_person(value):
            return "unknown" if any(self._holds(key, item, depth - 1) for key, item in value.items()) else None
        return None

    def _is_list_of_records(self, value: Any) -> bool:
        if isinstance(value, Unread):
            return value.brackets.startswith("[{")
        return isinstance(value, list) and bool(value) and all(self._by_fields(Scope(), item) for item in value)

    def _is_list_of_users(self, value: list[Any]) -> bool:
        return bool(value) and all(isinstance(item, dict) and self._is_user(item) for item in value)

    def _is_user(self, value: dict[str, Any]) -> bool:
        fields = _fields(value)
        return bool(
            self._number(fields, _USER_FIELDS) or (_is_personal(value) and self._snowflake(_scalar(fields.get("id"))))
        )

    def _has_any_id(self, value: Any) -> bool:
        """Return whether a key of an object is an id; of a long one, whether it may be."""
        if isinstance(value, Unread):
            return value.brackets.startswith("{")
        return isinstance(value, dict) and any(map(self._is_id, value))

    def _has_ids(self, value: Any, digits: int = 1) -> bool:
        """Return whether most keys of an object are ids, with at least so many digits if these are fewer than 15."""
        if isinstance(value, Unread):
            return value.brackets.startswith("{") and bool(value.keys) and self._is_id(value.keys[0], digits)
        if not isinstance(value, dict) or not value:
            return False
        return 2 * sum(self._is_id(key, digits) for key in value) > len(value)

    def _is_id(self, key: str, digits: int = 1) -> bool:
        own = self._id.fullmatch(key)
        return len(own[1]) >= min(digits, 15) if own else self._pair.fullmatch(key) is not None

    def _is_settings(self, value: Any) -> bool:
        """Return whether a file is one object of settings, rather than an object of entries of the same type."""
        if not isinstance(value, dict) or not value or value.keys() == {self._stem}:
            return False
        if any(_ID_INSIDE.search(key) for key in value):
            return False
        if _SETTINGS.search(_plain(self._stem)):
            return True
        types = {float if type(item) is int else type(item) for item in value.values() if item is not None}
        return len(types) > 1

    # Where an entry is stored

    def place(self, entry: Entry) -> Place:
        """Return where an entry is stored. Raises `UnusableValue` if nothing in it can be the key."""
        scope = entry.scope if entry.scope is not None else Scope(guild_id=self._guild_id)
        if entry.key is None and self._is_single:
            return Place(0, self._stem)
        if entry.key is not None:
            place = self._by_key(scope, entry.key, entry.value)
        else:
            found = self._by_fields(scope, entry.value)
            if found is None:
                raise UnusableValue(NO_KEY)
            place = replace(found, key=self._named(scope, found.key))
        if place.user_id is not None and place.guild_id == 0:
            self._has_guildless_users = True
        elif self._has_guildless_users and scope.guild_id is None and not scope.words and entry.key is not None:
            word = _plain(entry.key)
            if word in _GUILD_FIELDS and self._number({word: entry.value}, _GUILD_FIELDS):
                return replace(place, problem=LATE_GUILD)
        return place

    def _by_key(self, scope: Scope, key: str, value: Any) -> Place:
        if not self._is_about_people:
            return Place(scope.guild_id or 0, key)
        pair = self._pair.fullmatch(key)
        own = self._id.fullmatch(key)
        try:
            if pair is not None:
                stated, user = repair.snowflake(pair[1]), repair.snowflake(pair[2])
                usual = f"{pair[1]}_{pair[2]}"
                name = self._named(scope, usual if "@" in key else key)
                repaired = None if key == usual else "key not spelled guild_user"
                return Place(stated, name, user, is_member=True, repaired=repaired)
            if own is not None:
                return self._by_id(scope, key, repair.snowflake(own[1]), value)
        except UnusableValue as exc:
            return Place(0, self._named(scope, key), problem=str(exc) if self._kind != "documents" else None)
        inside = _ids_inside(key)
        user_id = inside[-1] if inside else None
        if scope.guild_id is not None and not scope.is_guild_of_users:
            return Place(scope.guild_id, self._named(scope, f"{scope.guild_id}_{key}"), user_id)
        problem = None
        if not scope.words and scope.holds not in ("others", "guilds"):
            problem = {"members": "the key is not guild_user", "users": "the id is not an integer"}.get(self._kind)
        return Place(0, self._named(scope, key), user_id, problem=problem)

    def _by_id(self, scope: Scope, key: str, number: int, value: Any) -> Place:
        repaired = "key is a mention" if "@" in key else None

        def member(guild_id: int, user_id: int) -> Place:
            name = self._named(scope, f"{guild_id}_{user_id}")
            return Place(guild_id, name, user_id, is_member=True, repaired=repaired)

        if scope.user_id is not None:
            return member(number, scope.user_id)
        if scope.holds == "guilds":
            return Place(number, self._named(scope, str(number)))
        if scope.holds == "others":
            name = f"{scope.guild_id}_{number}" if scope.guild_id else key
            return Place(scope.guild_id or 0, self._named(scope, name))
        guild_id = scope.guild_id
        if guild_id is None and isinstance(value, dict):
            guild_id = self._number(_fields(value), _GUILD_FIELDS)
        if guild_id is not None and guild_id != number:
            return member(guild_id, number)
        problem = None
        if self._kind == "members":
            problem = "the key is not guild_user, and the guild is unknown: use --guild"
        return Place(
            0, self._named(scope, str(number) if repaired else key), number, repaired=repaired, problem=problem
        )

    def _by_fields(self, scope: Scope, value: Any) -> Place | None:
        """Return the place of an element of an array or of a line; None if no field identifies it."""
        if not isinstance(value, dict):
            return None
        fields = _fields(value)
        key = _scalar(value.get("key"))
        own = key or next(filter(None, (_scalar(fields.get(name)) for name in _OWN_FIELDS)), None)
        if not self._is_about_people:
            own = own or _scalar(fields.get("userid"))
            return Place(scope.guild_id or 0, own, is_record=True) if own else None
        guild_id = self._number(fields, _GUILD_FIELDS)
        user_id = self._number(fields, _USER_FIELDS)
        ids = _scalars(fields.get("redprimarykey"))
        if ids and own is None:
            own = "_".join(ids)
        if own is not None and self._pair.fullmatch(own):
            return replace(self._by_key(scope, own, value), is_record=True)
        guild_id = guild_id or scope.guild_id
        user_id = user_id or scope.user_id
        is_message = "messageid" in fields and key is None
        is_user = scope.holds == "users" or self._kind in ("members", "users") or _is_personal(value)
        if user_id is None and is_user and not is_message and scope.holds not in ("guilds", "others"):
            user_id = self._snowflake(own)
        if is_message and self._kind != "members":
            own = _scalar(fields["messageid"]) or own
        elif guild_id and user_id and (key is None or self._kind == "members"):
            return Place(guild_id, f"{guild_id}_{user_id}", user_id, is_member=True, is_record=True)
        if own is None or (_OBJECT_ID.fullmatch(own) and (user_id or guild_id)):
            own = str(user_id) if user_id else str(guild_id) if guild_id else None
        if own is None:
            return None
        inside = _ids_inside(own)
        if user_id is None and guild_id is None and inside and scope.holds not in ("guilds", "others"):
            user_id = inside[-1]
        is_in_guild = guild_id is not None and key is None and own != str(guild_id)
        problem = "the key is not guild_user" if self._kind == "members" else None
        name = f"{guild_id}_{own}" if is_in_guild else own
        return Place(guild_id or 0, name, user_id, is_record=True, problem=problem)

    def _named(self, scope: Scope, key: str) -> str:
        """Return a key with the names of the containers around it, but without the first of users and of guilds."""
        words = scope.words
        word = _plain(words[0]) if len(words) == 1 else ""
        if word in _USERS or word in _GUILDS:
            holds: Holds = "users" if word in _USERS else "guilds"
            if self._first.setdefault(holds, words) == words:
                return key
        return ".".join((*words, key))

    def _number(self, fields: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
        """Return the id in the first of these fields that has one."""
        for name in names:
            item = fields.get(name)
            text = _scalar(item.get("id") if isinstance(item, dict) and "id" in item else item)
            number = self._snowflake(text) if name in _SHORT_NAMES else _number(text)
            if number is not None:
                return number
        return None

    def _snowflake(self, text: str | None) -> int | None:
        match = self._id.fullmatch(text) if text is not None else None
        return _number(match[1]) if match else None


def _number(text: str | None) -> int | None:
    match = _NUMBER.fullmatch(text) if text is not None else None
    try:
        return repair.snowflake(match[1]) if match else None
    except UnusableValue:
        return None


def _plain(name: str) -> str:
    """Return a name in lower case without separators: `guildID`, `guild_id` and `GuildId` are the same field."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _fields(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an entry by their plain names, with those of an `_id` that is an object."""
    fields: dict[str, Any] = {}
    for name in sorted(value, key=lambda name: (name != "id", name.startswith("_"))):
        fields.setdefault(_plain(name), value[name])
    if isinstance(inner := value.get("_id"), dict) and _scalar(inner) is None:
        for name, item in inner.items():
            fields.setdefault(_plain(name), item)
    return fields


def _scalar(value: Any) -> str | None:
    """Return an id as text: a text, an integer, or one of MongoDB's `{"$oid": …}` and `{"$numberLong": …}`."""
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in ("$oid", "$numberLong"):
        value = next(iter(value.values()))
    if isinstance(value, str):
        return value or None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _scalars(value: Any) -> list[str]:
    return [text for item in value if (text := _scalar(item)) is not None] if isinstance(value, list) else []


def _is_personal(value: Any) -> bool:
    return isinstance(value, dict) and not _PERSONAL.isdisjoint(map(_plain, value))


def _is_person(value: Any) -> bool:
    """Return whether an object has a field of a person's that is not itself a container, as those of guilds are."""
    return isinstance(value, dict) and any(
        _plain(name) in _PERSONAL and not isinstance(item, dict | list) for name, item in value.items()
    )


def _has_objects(value: Any) -> bool:
    """Return whether the values of an object are objects; those of a long one are taken to be."""
    return isinstance(value, Unread) or all(isinstance(item, dict) for item in value.values())


def _is_red(value: Any) -> bool:
    """Return whether an object consists of Red's scopes: those of all cogs, and a cog's own, in capitals."""
    keys = value.keys[:1] if isinstance(value, Unread) else tuple(value) if isinstance(value, dict) else ()
    return any(key in _RED for key in keys) and all(key.isupper() for key in keys)


def _ids_inside(key: str) -> list[int]:
    return [number for text in _ID_INSIDE.findall(key) if (number := _number(text)) is not None]
