"""Passwords in the URL of a database: found, and kept out of every text.

SQLAlchemy hides ``user:password@``, but neither ``?password=`` nor what is left of a password in which
an ``@`` was not written as ``%40``.
"""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Iterable, Iterator

import sqlalchemy as sa
from sqlalchemy.engine import URL

MASK = "***"
_SECRET_KEY = re.compile(r"pass|pwd|secret|token|credential|api_?key|access_?key|odbc", re.I)
_AUTHORITY = re.compile(r"[^/:@\s]*:.*@", re.S)
"""The beginning of a URL whose scheme was forgotten."""
_SHORT = 4


def without_password(url: str | URL) -> str:
    """The URL with ``***`` for every secret in it; for nearly all of it where it is ambiguous."""
    text = _text(url)
    parsed = _parse(text)
    if parsed is None:
        scheme, found, _ = text.partition("://")
        return f"{scheme}://{MASK}" if found else MASK
    query = {k: MASK if _SECRET_KEY.search(k) else v for k, v in parsed.query.items()}
    shown = parsed.set(query=query).render_as_string(hide_password=True)
    return shown.replace(urllib.parse.quote_plus(MASK), MASK)


class Secrets:
    """The passwords of some URLs.

    Args:
        urls: Any texts; those with neither ``://`` nor a beginning like ``user:password@`` have no secrets.
    """

    def __init__(self, *urls: str | URL) -> None:
        spelled = {s for url in urls for secret in _secrets_of(url) for s in _spellings(secret)} - {
            ""
        }
        patterns = [_pattern(s) for s in sorted(spelled, key=len, reverse=True)]
        self._pattern = re.compile("|".join(patterns)) if patterns else None

    def hide(self, text: str) -> str:
        """``text`` with ``***`` for every secret in it, however it is quoted there."""
        return text if self._pattern is None else self._pattern.sub(MASK, text)


def _text(url: str | URL) -> str:
    return url if isinstance(url, str) else url.render_as_string(hide_password=False)


def _parse(text: str) -> URL | None:
    """``None`` where a part of a password may have come to stand elsewhere than as the password."""
    has_authority = not text.partition("://")[2].startswith("/")
    if has_authority and text.count("@") > 1:
        return None
    try:
        return sa.engine.make_url(text)
    except (sa.exc.ArgumentError, ValueError):  # the latter for a port that is not a number
        return None


def _secrets_of(url: str | URL) -> Iterator[str]:
    text = _text(url)
    _, found, rest = text.partition("://")
    if not found and not _AUTHORITY.match(text):
        return
    rest = rest if found else text
    parsed = _parse(text)
    if parsed is None:
        yield rest
        yield from (part for part in re.split(r"[@:/?#&=\s]+", rest) if len(part) > 1)
        return
    if parsed.password is not None:
        yield str(parsed.password)
        yield rest.partition("@")[0].partition(":")[2]  # as it was written
    for key, value in parsed.query.items():
        if _SECRET_KEY.search(key):
            yield from (value,) if isinstance(value, str) else value


def _spellings(secret: str) -> Iterable[str]:
    plain = {secret, urllib.parse.unquote(secret), urllib.parse.unquote_plus(secret)}
    for text in plain:
        quoted = urllib.parse.quote(text, safe="", errors="replace")
        quoted_plus = urllib.parse.quote_plus(text, errors="replace")
        rendered = urllib.parse.quote(text, safe=" +", errors="replace")  # by SQLAlchemy
        yield from (text, quoted, quoted_plus, rendered, repr(text)[1:-1], json.dumps(text)[1:-1])


def _pattern(secret: str) -> str:
    """A short secret counts only where it stands alone: "a" is no reason to print no "a"."""
    pattern = re.escape(secret)
    return pattern if len(secret) >= _SHORT else rf"(?<![0-9A-Za-z]){pattern}(?![0-9A-Za-z])"
