"""Whether a server answers: one short request, for kinds of trackers that have one."""

from __future__ import annotations

import http.client
import ssl
import urllib.error
import urllib.request

TIMEOUT_S = 5.0


def answers(url: str) -> None:
    """Raises OSError, in words, unless there is an answer that is no failure of the server. That it asks who is there,
    knows no such page, or shows a certificate that only the tracker's library may be told to trust, is an answer."""
    try:
        urllib.request.urlopen(url, timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise OSError(f"{url} answers {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return
        words = "no answer within 5 s" if isinstance(reason, TimeoutError) else f"{reason}"
        raise OSError(f"{url} cannot be reached: {words}") from None
