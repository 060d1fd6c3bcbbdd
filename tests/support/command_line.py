"""The command as a person types it, in the process of the tests."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from launch.cli import main
from launch.process import ProcessEnd

SECRET = "hf_" + "plantedsecret" * 3


def stillhouse(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as its entry point runs it, in this process: a new one would take most of a test's time."""
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setattr(sys, "argv", ["stillhouse", *arguments])
        patch.setattr(ProcessEnd, "_leave", lambda end: None)  # else it ends the process of the tests, too
        for name, value in {"HF_TOKEN": SECRET, **environment}.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main()
    return subprocess.CompletedProcess(arguments, ended.value.code or 0, output.getvalue(), errors.getvalue())
