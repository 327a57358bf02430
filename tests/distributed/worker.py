"""Run all cases in one or several processes started by `accelerate launch`, and write the results of each as JSON.

    accelerate launch … worker.py FOLDER CASES …

CASES are names of modules in this folder; their functions `case_…` take the `Processes` and a folder for files, and
return JSON values. For a case that raises, the error is reported.
"""

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))


def main() -> None:
    folder, modules = Path(sys.argv[1]), sys.argv[2:]
    # The models of the cases are made before the processes are connected, after which Transformers writes files in one
    # process only.
    cases = {module: importlib.import_module(f"distributed.{module}") for module in modules}
    from optimum_mixrank.reporting import html
    from optimum_mixrank.runtime.distributed import find_processes

    # Drawing takes longer than compressing.
    html.draw_pictures = lambda *reports: []
    processes = find_processes()
    found = {module: run(cases[module], processes, folder / module) for module in modules}
    (folder / f"{processes.index}.json").write_text(json.dumps(found))
    if not processes.is_single:
        import torch

        torch.distributed.destroy_process_group()


def run(cases, processes, folder):
    folder.mkdir(exist_ok=True)
    found = {}
    for name in sorted(vars(cases)):
        if name.startswith("case_"):
            with contextlib.redirect_stderr(io.StringIO()) as stderr:
                try:
                    value = getattr(cases, name)(processes, folder)
                except Exception as error:
                    value = {"error": f"{type(error).__name__}: {error}"}
            found[name.removeprefix("case_")] = {**value, "stderr": stderr.getvalue()}
    return found


if __name__ == "__main__":
    main()
