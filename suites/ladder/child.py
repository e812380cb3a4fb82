"""The process of one survey request: `python -m suites.ladder.child <request as JSON>`.

It prints one line of JSON for every seed. Nothing of ours is imported before a defect is planted,
and a climb with a defect ends where nothing that follows could show it at a lower level.
"""

import json
import os
import sys
from dataclasses import replace


def main(request: dict) -> None:
    if cores := os.environ.get("AERIE_CORES"):
        os.sched_setaffinity(0, map(int, cores.split(",")))
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
    main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # frameworks take long to tear down
