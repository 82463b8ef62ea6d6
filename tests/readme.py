"""The commands that README shows, for the tests that run them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line]


def command(start):
    """The words of the one command that begins with `start`."""
    (found,) = (line for line in COMMANDS if line.startswith(start))
    return shlex.split(found)
