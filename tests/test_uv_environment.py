"""`make setup` installs with uv what pip would find: uv is told what pip is told."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "requirements/uv_environment.py"
EXPORTS = runpy.run_path(str(SCRIPT))

LISTING = """\
:env:.cert='/env.pem'
global.cert='/global.pem'
global.proxy='http://proxy:3128'
global.trusted-host='a.example b.example'
install.index-url='https://mirror/simple'
global.index-url='https://elsewhere/simple'
global.extra-index-url='file:///local/simple https://extra/simple'
global.find-links='/wheels /more wheels'
"""


def test_what_pip_is_told_is_said_in_uvs_words_the_environment_first() -> None:
    assert EXPORTS["exports"](EXPORTS["told"](LISTING), {"UV_FIND_LINKS": "mine"}) == {
        "SSL_CERT_FILE": "/env.pem",
        "HTTPS_PROXY": "http://proxy:3128",
        "HTTP_PROXY": "http://proxy:3128",
        "UV_INSECURE_HOST": "a.example b.example",
        "UV_DEFAULT_INDEX": "https://mirror/simple",
        "UV_INDEX": "https://extra/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    assert EXPORTS["exports"]({}, {}) == {}


@pytest.mark.parametrize("certificate", ["/ca.pem", "/with space/and 'quote'.pem"])
def test_a_shell_takes_what_it_prints(tmp_path: Path, certificate: str) -> None:
    (tmp_path / "pip.conf").write_text(f"[global]\ncert = {certificate}\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "SSL_", "UV_"))}
    environment = {**kept, "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "HOME": str(tmp_path)}
    shell = f'eval "$({sys.executable} {SCRIPT})"; printf %s "$SSL_CERT_FILE"'
    done = subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == certificate
