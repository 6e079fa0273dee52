"""Cron expressions and time zones: what is valid, and which seconds, minutes ... weekdays are meant.

Not a scheduler; jobs/schedule.py hands the numbers to one. They are read here because schedulers disagree on
weekdays (0 is Monday for APScheduler 3, Sunday for cron and Kubernetes), and so that a wrong expression is
refused at once, with what would be right.
"""

import difflib
import zoneinfo
from dataclasses import dataclass

WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
LONGEST = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
NAMES = {
    "month": {name: i for i, name in enumerate(MONTHS, 1)},
    "weekday": {name: i for i, name in enumerate(WEEKDAYS)},
}
# The order of an expression; 7 is Sunday, too (crontab(5)). Seconds are ours, for what cannot wait a minute.
BOUNDS = {
    "second": (0, 59),
    "minute": (0, 59),
    "hour": (0, 23),
    "day": (1, 31),
    "month": (1, 12),
    "weekday": (0, 7),
}


@dataclass(frozen=True, kw_only=True)
class Cron:
    """The values of each field, ascending; weekdays count from Sunday, 0 to 6."""

    second: tuple[int, ...]
    minute: tuple[int, ...]
    hour: tuple[int, ...]
    day: tuple[int, ...]
    month: tuple[int, ...]
    weekday: tuple[int, ...]


def parse(expression: str) -> Cron:
    """`minute hour day month weekday`, or six fields that begin with the second: `*`, `1,15`, `1-5`, `*/10`.

    Raises `ValueError` that names the field and what is valid there. Day and weekday together are refused:
    cron takes either, other schedulers both.
    """
    texts = expression.split()
    if len(texts) not in (5, 6):
        raise ValueError(
            f"cron {expression!r} has {len(texts)} fields; write five, minute hour day month weekday, "
            "e.g. '0 3 * * *' for every day at 3:00 (a sixth, in front, is the second)"
        )
    texts = texts if len(texts) == 6 else ["0", *texts]
    fields = {name: _field(name, text) for name, text in zip(BOUNDS, texts, strict=True)}
    fields["weekday"] = tuple(sorted({value % 7 for value in fields["weekday"]}))
    if not (_is_any("day", fields["day"]) or _is_any("weekday", fields["weekday"])):
        raise ValueError(
            f"cron {expression!r} names days and weekdays, which schedulers read differently: set one to *"
        )
    if fields["day"][0] > max(LONGEST[month - 1] for month in fields["month"]):
        raise ValueError(f"cron {expression!r}: no such month has a day {fields['day'][0]}")
    return Cron(**fields)


def is_time_zone(name: str) -> str:
    """The name of a time zone, as it is. Raises `ValueError` that names the nearest ones."""
    known = zoneinfo.available_timezones()
    if name not in known:
        lower = {zone.lower(): zone for zone in known}
        cities = {zone.rpartition("/")[2].lower(): zone for zone in sorted(known)}
        near = difflib.get_close_matches(name.lower(), [*lower, *cities], n=1)
        hint = f"; did you mean {(lower | cities)[near[0]]!r}?" if near else ""
        raise ValueError(f"no time zone {name!r}{hint} (names are such as 'UTC' or 'Europe/Berlin')")
    return name


def _field(name: str, text: str) -> tuple[int, ...]:
    """The values that one field means; a list joins them."""
    values: set[int] = set()
    for part in text.split(","):
        values.update(_part(name, part))
    return tuple(sorted(values))


def _part(name: str, part: str) -> range:
    """`*`, `7`, `1-5`, `*/10` or `1-5/2`."""
    span, slash, step = part.partition("/")
    low, high = BOUNDS[name]
    if span == "*":
        first, last = low, high if name != "weekday" else 6
    else:
        start, dash, end = span.partition("-")
        first = _value(name, start)
        last = _value(name, end) if dash else first
        if slash and not dash:
            raise ValueError(f"{name} {part!r}: a step needs a range, e.g. {span}-{high}/{step}")
    if last < first:
        raise ValueError(f"{name} {part!r}: the range ends before it begins")
    if slash and (not step.isdecimal() or int(step) == 0):
        raise ValueError(f"{name} {part!r}: the step is {step!r}; write a number from 1 on")
    return range(first, last + 1, int(step or 1))


def _value(name: str, text: str) -> int:
    low, high = BOUNDS[name]
    names = NAMES.get(name, {})
    value = names.get(text.lower(), int(text) if text.isdecimal() else -1)
    if not low <= value <= high:
        near = difflib.get_close_matches(text.lower(), list(names), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = f", or {', '.join(names)}" if names else ""
        raise ValueError(f"{name} {text!r}: it is {low} to {high}{known}{hint}")
    return value


def _is_any(name: str, values: tuple[int, ...]) -> bool:
    return len(values) == {"day": 31, "weekday": 7}[name]
