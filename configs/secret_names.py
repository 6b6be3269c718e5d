"""What is a secret: the one rule for whatever goes into a script, a copy of settings, a manifest, or elsewhere.

A variable or key is told by the words of its name, a value by forms that only secrets have. It errs towards caution:
what is refused can be given by the environment, or in a file of variables that is never copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

HIDDEN = "***"
# Words of a name, between underscores and the like or as camelCase has them: TOKENIZERS, MONKEY and AUTHOR are others.
_WORDS = frozenset(
    """KEY KEYS PKEY TOKEN TOKENS SECRET SECRETS PASSWORD PASSWORDS PASSWD PASS PASSPHRASE PASSCODE PWD CREDENTIAL
    CREDENTIALS CRED CREDS AUTH AUTHORIZATION BEARER COOKIE COOKIES JWT NETRC OTP""".split()  # noqa: SIM905
)
_ENDS = re.compile(
    r"(PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIALS?|TOKEN|(API|APP|AUTH|ACCESS|PRIVATE|SSH|SIGNING)KEY)$"
)
# Names with such a word that hold no secret: folders of the shell, an index of InfiniBand's, a socket.
_PLAIN = re.compile(r"(OLD)?PWD|.*_IB_PKEY(_.*)?|SSH_AUTH_SOCK|.*PUBLIC_?KEYS?", re.IGNORECASE)
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_NUMBER = re.compile(r"-?\d*\.?\d*")

_NAMED = r"(?:password|passwd|pwd|secret|token|(?:api|access|private|auth)[_-]?key)"
_VALUE = re.compile(
    r"""(?P<url>\b[a-z][a-z0-9+.-]*://[^\s/@:]*:)(?!\*\*\*)[^\s/@]+(?=@)   # https://user:password@host
    |(?P<pair>(?<![A-Za-z0-9])"""
    + _NAMED
    + r"""=)(?![\s$`"']|\*\*\*)[^\s&;,]+                                          # ?token=…, password=… of a connection
    |(?P<bearer>\b(?:Bearer|Basic)\s+)[A-Za-z0-9+/._=-]{12,}               # of a header
    |(?P<form>)(?<![A-Za-z0-9_-])(?:
        sk-[A-Za-z0-9_-]{12,} | hf_[A-Za-z0-9]{12,} | api_org_[A-Za-z0-9]{12,}      # OpenAI and others, Hugging Face
        |gh[pousr]_[A-Za-z0-9]{16,} | github_pat_[A-Za-z0-9_]{16,} | glpat-[A-Za-z0-9_-]{12,}
        |xox[a-z]-[A-Za-z0-9-]{10,} | A(?:KIA|SIA)[A-Z0-9]{16} | AIza[A-Za-z0-9_-]{30,}
        |eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*                    # a JSON web token
    )
    |(?P<pem>-----BEGIN\ [A-Z\ ]*PRIVATE\ KEY-----)[\s\S]*
    """,
    re.VERBOSE | re.IGNORECASE,
)
_ASSIGNED = re.compile(r"""(?<![\w$])(?P<name>[A-Za-z_][A-Za-z0-9_.-]*)=(?P<value>"[^"]*"|'[^']*'|[^\s"';&|]*)""")


def names_secret(name: str) -> bool:
    """Whether a variable or key of this name holds a secret."""
    if _PLAIN.fullmatch(name):
        return False
    parts = [part.upper() for word in re.split(r"[^A-Za-z0-9]+", name) for part in _PART.findall(word)]
    words = [word.upper() for word in re.split(r"[^A-Za-z0-9]+", name)]
    return any(word in _WORDS for word in (*parts, *words)) or any(_ENDS.search(word) for word in words)


def is_secret(name: str, value: str) -> bool:
    """Whether a variable or key is secret, by its name or by what it holds. A count of tokens is none."""
    counts = re.search(r"TOKENS$", name, re.IGNORECASE) and _NUMBER.fullmatch(value)
    return (names_secret(name) and not counts) or holds_secret(value)


def holds_secret(text: str) -> bool:
    """Whether a text has something in it that has the form of a secret."""
    return _VALUE.search(text) is not None


def without_secrets(text: str) -> str:
    """A text with `***` for each secret that is seen by its form."""
    return _VALUE.sub(lambda found: f"{found[found.lastgroup] if found.lastgroup else ''}{HIDDEN}", text)


def assigned_secrets(line: str) -> Iterator[str]:
    """Names to which a line of shell or of options gives a secret in so many letters, not by $NAME or $(command)."""
    for found in _ASSIGNED.finditer(line):
        value = found["value"].strip("\"'")
        if value and value[0] not in "$`" and is_secret(found["name"], value):
            yield found["name"]


def shown_command(words: Iterable[str]) -> list[str]:
    """A command as it may be written down: `***` for what keys and options of secret names are given, and for secrets.

    A number that a setting is given stays, since fields of models are called pad_token_id and the like.
    """
    shown: list[str] = []
    hide_next = False
    for word in words:
        name, equals, value = word.partition("=")
        if hide_next and not word.startswith("-"):
            shown.append(HIDDEN)
        elif "." in name and _NUMBER.fullmatch(value):
            shown.append(word)
        elif equals and value and is_secret(name.lstrip("-"), value) and not holds_secret(value):
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(without_secrets(word))
        hide_next = word.startswith("--") and not equals and names_secret(word)
    return shown
