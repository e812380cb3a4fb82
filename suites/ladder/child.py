"""The process of survey requests: `python -m suites.ladder.child <modules>...`.

It imports what takes long, frameworks, and forks for each request, a line of JSON on its standard
input. The fork prints a line of JSON for every seed, and when it has ended one more says how.
Nothing of ours is imported before a defect is planted, and a climb with a defect ends where nothing
that follows could show it at a lower level.
"""

import importlib
import json
import os
import sys
import traceback
from dataclasses import replace


def main(modules: list[str]) -> None:
    if cores := os.environ.get("AERIE_CORES"):
        os.sched_setaffinity(0, map(int, cores.split(",")))
    for name in modules:
        importlib.import_module(name)
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            code = 1
            try:
                answer(json.loads(line))
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)  # frameworks take long to tear down
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"ended": os.waitstatus_to_exitcode(status)}), flush=True)


def answer(request: dict) -> None:
    if request["defect"]:
        from suites.ladder.defects import DEFECTS, plant

        plant(next(defect for defect in DEFECTS if defect.name == request["defect"]))
    from implementations.engine import load_engine
    from suites.harness.run import Run
    from suites.ladder.check import level_of, limit_of
    from suites.parity import climb

    base = Run.from_json(request["run"])
    lowest = min((level for level in base.workload.levels if level != "L0"), default=None)
    for seed in request["seeds"]:
        run = replace(base, seed=seed)
        settings = {"dtype": run.dtype, "kernels": run.kernels, "device_kind": run.device_kind}
        engine = load_engine(run.backend)(run.model, seed=seed, **settings)
        errors, failure = {}, None
        try:
            for check in climb(run, engine):
                errors[check.field] = (check.error.largest, check.error.rms)
                ends = request["defect"] and level_of(check.field) in ("L0", lowest)
                if ends and check.error.exceeds(limit_of(check.field, run)):
                    break
        except Exception as error:  # what was compared before it counts
            failure = f"{type(error).__name__}: {error}"[:300]
        print(json.dumps({"seed": seed, "errors": errors, "failure": failure}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
