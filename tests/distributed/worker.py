"""Run in one or several processes, as `accelerate launch` starts them: all cases, with what each process found as JSON.

    accelerate launch … worker.py CASES FOLDER

CASES is the name of a module here; its functions `case_…` take this process and a folder for files, and return JSON
values. A case that raises reports its error.
"""

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))


def main() -> None:
    cases, folder = importlib.import_module(f"distributed.{sys.argv[1]}"), Path(sys.argv[2])
    # Models of the cases are made before processes know each other: Transformers then writes files in one alone.
    from optimum_mixrank.runtime.distributed import find_processes

    processes = find_processes()
    found = {}
    for name in sorted(vars(cases)):
        if name.startswith("case_"):
            with contextlib.redirect_stderr(io.StringIO()) as stderr:
                try:
                    value = getattr(cases, name)(processes, folder)
                except Exception as error:
                    value = {"error": f"{type(error).__name__}: {error}"}
            found[name.removeprefix("case_")] = {**value, "stderr": stderr.getvalue()}
    (folder / f"{processes.index}.json").write_text(json.dumps(found))
    if not processes.is_single:
        import torch

        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
