"""The fenced blocks of the documentation."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parent.parent.parent
PAGES = {
    path.name: path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_PYTHON, _SHELL = ("python", "py"), ("bash", "sh", "shell", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line where its text begins, whether it is Python, and its text."""

    page: str
    line: int
    is_python: bool
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of every command of a shell block."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [shlex.split(line, comments=True) for line in lines if shlex.split(line, comments=True)]


def blocks_of(page: str) -> list[Block]:
    """Return the Python and shell blocks of a page, in order."""
    text = PAGES[page].read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language = match[2].lower()
        if language in (*_PYTHON, *_SHELL):
            line = text.count("\n", 0, match.start(3)) + 1
            found.append(Block(page, line, language in _PYTHON, match[3]))
    return found
