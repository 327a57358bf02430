"""Try many families of Transformers with tiny random models, and write the table of the documentation.

Run with `python benchmarks/families.py` (all) or `python benchmarks/families.py CLIP SigLIP`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import transformers
from families.catalogue import FAMILIES
from families.checks import check_family, settings
from families.zoo import Family
from transformers.utils import logging


def tried(family: Family, recipe: str) -> dict[str, object]:
    """Return what came of a family: a result by check, or the reason why there is none."""
    if not family.exists:
        return {"absent": True}
    start = time.perf_counter()
    try:
        found = check_family(family, settings(recipe=recipe))
    except ImportError as error:
        return {"absent": True, "reason": str(error).split(".")[0]}
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        refused = family.refused is not None and family.refused in reason
        return {"refused" if refused else "compress": reason}
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    """Try families and print a line for each; `--record` writes the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="FAMILY")
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    results = {}
    for name in args.names or FAMILIES:
        results[name] = tried(FAMILIES[name], args.recipe)
        print(name, results[name], flush=True)
    tested = [each for each in results.values() if "absent" not in each]
    works = [
        each
        for each in tested
        if "refused" in each or all(each.get(k) == "yes" for k in ("compress", "reload", "dense", "train"))
    ]
    compressed = [each for each in tested if "refused" in each or each.get("compress") == "yes"]
    print(f"{len(tested)} families, {len(compressed)} compressed or rightly refused, {len(works)} pass every check")
    if args.record is not None:
        record = {"transformers": transformers.__version__, "recipe": args.recipe, "families": results}
        args.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
