"""Draw the pictures of the documentation: those that are named, or all.

python docs/pictures/draw.py [NAME ...]
"""

from __future__ import annotations

import importlib
import sys

from svg import save

from optimum_mixrank.reporting.inline_svg import picture_style


PICTURES = ("factorization", "pivoted", "allocation", "budgets", "compensation", "results")


def main() -> None:
    for name in sys.argv[1:] or PICTURES:
        picture = importlib.import_module(name)
        with picture_style():
            print(save(picture.draw(), name, picture.TITLE, picture.DESCRIPTION))


if __name__ == "__main__":
    main()
