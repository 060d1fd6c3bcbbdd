"""Secrets in texts: found and masked. A configuration is written to many places (config.yaml, report, model card, the
terminal), so one with a secret is refused when it is read, and messages mask them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

MASK = "***"
MIN_SECRET_CHARACTERS = 8  # shorter values of the environment are words such as "token", not secrets

_PASSWORD_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]*:[^/\s@'\"]*(?=@)")
_KEY_IN_QUERY = re.compile(
    r"(?<=[?&])((?:[\w.-]*(?:token|secret|password|signature|credential|api[_-]?key))|sig)=[^&\s'\"]+", re.IGNORECASE
)
_KNOWN_KEY = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})\b"
)
_WEBHOOK = re.compile(  # whoever knows the address may write there
    r"(?<=://hooks\.slack\.com/)[^\s'\"]+"
    r"|(?<=/api/webhooks/)\d+/[^\s'\"]+"  # Discord
    r"|(?<=\.webhook\.office\.com/)[^\s'\"]+"
    r"|(?<=://hooks\.zapier\.com/)[^\s'\"]+"
)
_NAMES = r"(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(?:API_?|ACCESS_|PRIVATE_)KEY)"
_SECRET_NAME = re.compile(f"{_NAMES}$", re.IGNORECASE)
_NAMED_VALUE = re.compile(rf"({_NAMES}[\"']?\s*[:=]\s*)(?:\"[^\"]*\"|'[^']*'|[^\s,\[\]{{}}\"']+)", re.IGNORECASE)


def find_secret(text: str) -> str | None:
    """The kind of secret in a configuration value, as words for a message, never the secret itself; None for none."""
    if _PASSWORD_IN_URL.search(text):
        return "a URL with a user name and password"
    if _KEY_IN_QUERY.search(text):
        return "a URL with a key in its query"
    if _WEBHOOK.search(text):
        return "the address of a webhook, which is its key"
    return "an access key" if _KNOWN_KEY.search(text) else None


def without_secrets(text: str, *, environment: Mapping[str, str] | None = None) -> str:
    """The text with passwords of URLs, keys in queries, known kinds of keys and, where an environment is given, the
    values of its variables whose names say secret, replaced by `***`."""
    text = _PASSWORD_IN_URL.sub(MASK, text)
    text = _KEY_IN_QUERY.sub(rf"\1={MASK}", text)
    text = _KNOWN_KEY.sub(MASK, text)
    text = _WEBHOOK.sub(MASK, text)
    for value in secret_values(environment or {}):
        text = text.replace(value, MASK)
    return text


def says_secret(name: str) -> bool:
    """Whether a key of this name holds a secret: `api_key`, `HF_TOKEN`."""
    return _SECRET_NAME.search(name) is not None


def without_named_secrets(setting: str) -> str:
    """A setting as it was typed, `trackers=[{kind: wandb, api_key: ...}]`, with `***` for what such keys hold."""
    return _NAMED_VALUE.sub(rf"\1{MASK}", without_secrets(setting))


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """Values of the variables whose names say secret, longest first, so that no part of one is left behind."""
    found = {v for name, v in environment.items() if says_secret(name) and len(v) >= MIN_SECRET_CHARACTERS}
    return sorted(found, key=lambda value: (-len(value), value))
