"""The environment of a Python process that is to find what this one finds."""

import os
import sys
from pathlib import Path


def as_from_here(more: dict[str, str]) -> dict[str, str]:
    """This process's environment variables and `more`, with the module path and the tools of this Python.

    The tools beside this Python come first in `PATH`, activated or not: another ninja has DeepSpeed build its operators
    again.
    """
    variables = {**os.environ, **more}
    modules = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    tools = os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", "")])
    return {**variables, "PYTHONPATH": modules, "PATH": tools}
