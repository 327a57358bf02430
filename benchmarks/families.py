"""Try many families of Transformers with tiny random models, and write the table of the documentation.

Run with `python benchmarks/families.py` (all) or `python benchmarks/families.py CLIP SigLIP`, once in an environment with
each line of Transformers:

    python benchmarks/families.py --record --also compile export
    python benchmarks/families.py --render docs/families.md

and in an environment with timm `python benchmarks/families.py --timm --record`, for the models of timm.

What is in the record already is not tried again, unless `--again` is given.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

RECORDS = {"5.x": "families_5.json", "4.57": "families_4.57.json"}
"""The records by line of Transformers, the newest first."""

TIMM_RECORD = "families_timm.json"
"""The record of the models of timm."""

REFUSALS = {
    "text": "is a text model",
    "convolution": "is a convolutional network",
    "whole": "takes images is unknown",
}
"""What an error says of models that cannot be compressed, by why they cannot."""

CHECKS = ("compress", "reload", "dense", "train")
COSTLY = ("compile", "export")

WIDTH = 124
"""Characters of a line of the documentation."""


def tried(family: Any, recipe: str, also: list[str]) -> dict[str, Any]:
    """Return what came of a family: a result by check, or the reason why there is none."""
    from families.checks import check_family, settings

    if not family.exists:
        return {"absent": True}
    start = time.perf_counter()
    try:
        found = check_family(family, settings(recipe=recipe), also)
    except ImportError as error:
        return {"absent": True, "reason": str(error).strip().split(".")[0]}
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        refused = family.refused is not None and REFUSALS[family.refused] in reason
        return {"refused" if refused else "compress": reason}
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def works(found: Mapping[str, Any]) -> bool:
    """Return whether a family passes every check that is always made."""
    return all(found.get(name) == "yes" for name in CHECKS)


def _fails_as_the_original(found: Mapping[str, Any]) -> bool:
    """Return whether all that fails of what is always checked fails for the original model too."""
    failures = {name for name in CHECKS if found.get(name) not in (None, "yes")}
    return bool(failures) and failures <= set(found.get("original_fails", ()))


def _wanting(found: Mapping[str, Any] | None, also: list[str]) -> bool:
    """Return whether a family still has to be tried."""
    if found is None:
        return True
    return found.get("compress") == "yes" and not set(also) <= found.keys()


def record(path: Path | None, families: Mapping[str, Any], recipe: str, also: list[str], again: bool) -> None:
    """Try families, print a line for each, and write what came of them after each."""
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    known = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    results: dict[str, Any] = known.get("families", {})
    for name, family in families.items():
        if not again and not _wanting(results.get(name), also):
            continue
        results[name] = tried(family, recipe, also)
        print(name, results[name], flush=True)
        if path is not None:
            about = {"transformers": transformers.__version__, "torch": torch.__version__, "recipe": recipe}
            if path.name == TIMM_RECORD:
                import timm

                about["timm"] = timm.__version__
            path.write_text(json.dumps({**about, "families": results}, indent=1) + "\n")
    print(summary({"families": results}))


def summary(recorded: Mapping[str, Any]) -> str:
    """Return how many families pass what is always checked, and how many pass each check that is made on request."""
    tested = [each for each in recorded["families"].values() if "absent" not in each]
    refused = sum("refused" in each for each in tested)
    passed = sum(map(works, tested))
    failed = len(tested) - refused - passed
    alike = sum(_fails_as_the_original(each) for each in tested)
    as_the_original = f", {'as' if alike == failed else f'{alike} of them as'} the original does" if alike else ""
    always = (
        f"Of {_families(len(tested))}, {passed} {'passes' if passed == 1 else 'pass'} compress, reload, dense return and "
        f"training, {refused} {'is' if refused == 1 else 'are'} refused, and {failed} {'fails' if failed == 1 else 'fail'}"
        f"{as_the_original}."
    )
    on_request = []
    for check in COSTLY:
        found = [each[check] for each in tested if check in each]
        outcome = f"passes for {found.count('yes')} of {len(found)} tried" if found else "was not tried"
        alike = sum(check in each.get("original_fails", ()) for each in tested)
        if alike:
            rest = sum(each != "yes" for each in found)
            others = f"the other {rest}" if alike == rest else f"{alike} of the other {rest}"
            outcome += f" (for {others} it fails for the original model too)"
        on_request.append(f"*{check}* {outcome}")
    if not any(check in each for each in tested for check in COSTLY):
        return f"{always} {' and '.join(f'*{check}*' for check in COSTLY)} were not tried."
    return f"{always} {', '.join(on_request)}."


def _families(number: int) -> str:
    return f"{number} {'family' if number == 1 else 'families'}"


def render(records: Mapping[str, Mapping[str, Any]], of_timm: Mapping[str, Any] | None = None) -> str:
    """Return the page of the documentation.

    Args:
        records: By line of Transformers.
        of_timm: The record of the models of timm, if there is one.
    """
    lines = [_INTRODUCTION.rstrip("\n"), ""]
    for found in records.values():
        lines += _wrapped(f"- Transformers {found['transformers']}: {summary(found)}")
    lines += ["", *_table(records), "", *_remarks(records)]
    if of_timm is not None:
        about = f"timm {of_timm['timm']} under Transformers {of_timm['transformers']}: {summary(of_timm)}"
        lines += [
            _TIMM.rstrip("\n"),
            "",
            *_wrapped(f"- {about}"),
            "",
            *_table({"": of_timm}),
            "",
            *_remarks({"": of_timm}, "###"),
        ]
    return "\n".join(lines).rstrip("\n") + "\n"


_INTRODUCTION = """\
# Families that were tried

A tiny model of every family with random weights is compressed with `recipe="best"`, saved, reloaded bit by bit, made dense
again, and trained for a step. This says that the method applies, not how much a family loses: random weights have nothing
to lose. Of a model for images and text the whole is compressed, and saved as a whole; its vision part alone changes.

*Targeted* is the share of the tiny model's parameters that are weights of targeted layers, and in brackets the share of
what images reach; in a real model the layers are larger relative to the embeddings, and so are the shares. *Compared* is
what the compression keeps close to the original; see [what is compared](extending.md#a-measure). *compile* is
`torch.compile` up to the graphs of Inductor, *export* is `torch.export`, and a dot stands for what was not tried. The marks
of a check are those of the lines of Transformers, in the order of this list; ✓ passes, ✗ has its reason below the table,
and (✗) fails for the original model too.
"""

_TIMM = """\
## Models of timm

As Transformers opens them, by `TimmWrapperForImageClassification`; see [Extending](extending.md#models-of-timm). Those with
attention made of convolutions are refused as convolutional, and their convolutions of single pixels can be included.
"""

_COLUMNS = {
    "compress": "compress",
    "reload": "reload",
    "dense": "to dense",
    "train": "train",
    "compile": "compile",
    "export": "export",
}


def _table(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for found in records.values() for name in found["families"]))
    head = ["family", "targeted", "compared", *_COLUMNS.values()]
    rows = [head, ["---"] * len(head)]
    for name in names:
        found = [each["families"].get(name, {}) for each in records.values()]
        if not any("compress" in each for each in found):
            continue
        shown = next((each for each in found if "targeted" in each), {})
        marks = [" ".join(_mark(each, check) for each in found) for check in _COLUMNS]
        rows.append([name, _share(shown), _objective(shown), *marks])
    return [f"| {' | '.join(row)} |" for row in rows]


def _mark(found: Mapping[str, Any], check: str) -> str:
    if "absent" in found:
        return "–"
    value = found.get(check)
    if value is None:
        return "·"
    if value == "yes":
        return "✓"
    return "(✗)" if check in found.get("original_fails", ()) else "✗"


def _share(found: Mapping[str, Any]) -> str:
    if "targeted" not in found:
        return ""
    of_images = found.get("targeted_of_images")
    brackets = "" if of_images is None or abs(of_images - found["targeted"]) < 5e-4 else f" ({of_images:.0%})"
    return f"{found['targeted']:.0%}{brackets}"


def _objective(found: Mapping[str, Any]) -> str:
    if "objective" not in found:
        return ""
    part = found.get("part", "whole")
    return found["objective"] if part == "whole" else f"{found['objective']} of `{part}`"


def _remarks(records: Mapping[str, Mapping[str, Any]], level: str = "##") -> Iterator[str]:
    """Yield the reasons of what fails, of what is refused and of what is not there."""
    failures, refusals, absent = [], {}, []
    alike: dict[str, list[str]] = {}
    for found in records.values():
        version = found["transformers"]
        for name, each in found["families"].items():
            for check in _COLUMNS:
                reason = each.get(check)
                if reason in (None, "yes"):
                    continue
                if check in each.get("original_fails", ()):
                    kind = reason.partition(": ")[0]
                    alike.setdefault(f"{check}, Transformers {version}, {kind}", []).append(name)
                else:
                    failures.append(f"- {name}, {check}, Transformers {version}: {_plain(reason)}")
            if "refused" in each:
                refusals[name] = _plain(each["refused"])
            if "absent" in each:
                absent.append(f"{name} ({version}{'; ' + each['reason'] if 'reason' in each else ''})")
    if failures:
        yield from (f"{level} What fails", "")
        for each in failures:
            yield from _wrapped(each)
        yield ""
    if alike:
        yield from (f"{level} What fails for the original model too", "")
        for about, names in alike.items():
            yield from _wrapped(f"- {about}: {'; '.join(names)}")
        yield ""
    if refusals:
        yield from (f"{level} What is refused", "")
        for name, reason in refusals.items():
            yield from _wrapped(f"- {name}: {reason}")
        yield ""
    if absent:
        yield from (
            f"{level} What was not there",
            "",
            "A dash (–) in the table: the release does not have it, or it needs a package that was not installed.",
            "",
            *_wrapped(f"{', '.join(absent)}."),
        )


def _wrapped(text: str) -> list[str]:
    """Return a paragraph or an item of a list in lines as long as the documentation's."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _plain(reason: str) -> str:
    """Return an error without characters that mean something in Markdown."""
    return reason.partition(": ")[2].replace("|", "/").replace("<", "‹").replace(">", "›").replace("*", "∗") or reason


def read_records() -> dict[str, Any]:
    """Return the records that exist, by line of Transformers."""
    folder = ROOT / "benchmarks" / "results"
    found = {line: folder / name for line, name in RECORDS.items()}
    return {line: json.loads(path.read_text()) for line, path in found.items() if path.is_file()}


def read_timm_record() -> dict[str, Any] | None:
    """Return the record of the models of timm, if there is one."""
    path = ROOT / "benchmarks" / "results" / TIMM_RECORD
    return json.loads(path.read_text()) if path.is_file() else None


def _unknown(name: str, known: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    """Return a message that names the families whose names are near one that there is not.

    Args:
        name: What was given.
        known: The families that can be tried.
        others: Those that can be tried with or without `--timm`, whichever it was not.
    """
    folded = {each.casefold(): each for each in known}
    near = [folded[each] for each in difflib.get_close_matches(name.casefold(), folded)]
    near += [each for fold, each in folded.items() if name.casefold() in fold and each not in near][:5]
    message = f"There is no family {name!r}"
    if name in others:
        return f"{message} with this choice of --timm, but there is one with the other."
    return (
        f"{message}; did you mean {' or '.join(map(repr, near))}?"
        if near
        else f"{message}, nor one of a similar name."
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="FAMILY")
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--also", nargs="+", choices=COSTLY, default=[], help="what to check in addition to the usual")
    where = "write what came of the families, by default to the record of this line of Transformers"
    parser.add_argument("--record", type=Path, nargs="?", const=Path(), help=where)
    parser.add_argument("--timm", action="store_true", help="try the models of timm instead")
    parser.add_argument("--again", action="store_true", help="try again what is in the record")
    parser.add_argument(
        "--render", type=Path, metavar="PAGE", help="write the page of the documentation, and try nothing"
    )
    args = parser.parse_args()
    folder = ROOT / "benchmarks" / "results"
    if args.render is not None:
        args.render.write_text(render(read_records(), read_timm_record()), encoding="utf-8")
        return
    import transformers
    from families.catalogue import FAMILIES
    from families.timm_catalogue import TIMM_FAMILIES

    every: dict[str, Any] = dict(TIMM_FAMILIES if args.timm else FAMILIES)
    path = args.record
    if path == Path():
        line = "4.57" if transformers.__version__.startswith("4.") else "5.x"
        path = folder / (TIMM_RECORD if args.timm else RECORDS[line])
    unknown = [name for name in args.names if name not in every]
    if unknown:
        parser.error(" ".join(_unknown(name, every, FAMILIES if args.timm else TIMM_FAMILIES) for name in unknown))
    chosen = {name: every[name] for name in args.names or every}
    record(path, chosen, args.recipe, args.also, args.again)


if __name__ == "__main__":
    main()
