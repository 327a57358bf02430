"""`python -m optimum_mixrank …` is `optimum-cli mixrank …`."""

from __future__ import annotations

import sys

from optimum.commands.optimum_cli import main


if __name__ == "__main__":
    sys.argv[1:1] = ["mixrank"]
    main()
