"""The Pythons of a cluster, as this machine has them: its runs are planned by their versions."""

import subprocess
from collections.abc import Iterator

from suites.doctor.finding import OK, PROBLEM, WARNING, Finding
from suites.harness import provenance
from suites.harness.cluster import Cluster

BACKENDS = ("jax", "torch")


def look(cluster: Cluster) -> Iterator[Finding]:
    missing = []
    for name in dict.fromkeys((*BACKENDS, *cluster.python)):
        python = cluster.interpreter(name)
        what, path = f"python for {name}", python or "that of this command"
        try:
            found = provenance.versions(python)
        except (ValueError, OSError, subprocess.TimeoutExpired) as error:
            line = " ".join(str(error).split())
            if name == "worker":  # of the nodes alone; those of backends say what is current, here
                yield Finding(what, f"{line} (here: the job tells of a node)")
                continue
            advice = f"set cluster.python.{name} to an interpreter that runs here and on the nodes"
            yield Finding(what, line, PROBLEM, advice)
            continue
        needed = "numpy" if name == "worker" else name
        kept = {key: found[key] for key in (needed, *provenance.LIBRARIES.get(name, ()))}
        words = ", ".join(f"{key} {version}" for key, version in kept.items() if version)
        if found.get(needed) is None:
            missing.append(name)
            verdict = PROBLEM if python or len(missing) == len(BACKENDS) else WARNING
            advice = (
                f"no {needed}: install it, or set cluster.python.{name} to a Python that has it"
            )
            yield Finding(what, f"{path}: {words or 'nothing that is needed'}", verdict, advice)
        else:
            yield Finding(what, f"{path}: {words}", OK)


def version(backend: str, cluster: Cluster) -> str | None:
    try:
        return provenance.versions(cluster.interpreter(backend)).get(backend)
    except (ValueError, OSError, subprocess.TimeoutExpired):
        return None  # said above
