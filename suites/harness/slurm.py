"""What Slurm says, asked in as few commands as there can be, and what it is told.

Slurm 20.11 to 25, with accounting and without. squeue knows what is in the queue, and for some
minutes what has ended (MinJobAge); of the rest sacct knows, where a site keeps accounts. What Slurm
does not answer is Unreachable, and nothing follows from it.
"""

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

COMMAND_S = 60.0  # until a command is given up; it tries for 9 s to reach a controller that is down

# What a state means for a job that is in it.
WAITING, RUNNING, STOPPING, INTERRUPTED, ENDED = (
    "waiting",
    "running",
    "stopping",
    "interrupted",  # over, and Slurm may start the job again
    "ended",
)
STATES = {
    "PENDING": WAITING,
    "CONFIGURING": WAITING,
    "POWER_UP_NODE": WAITING,
    "EXPEDITING": WAITING,
    "REQUEUE_HOLD": WAITING,
    "REQUEUE_FED": WAITING,
    "RESV_DEL_HOLD": WAITING,
    "SPECIAL_EXIT": WAITING,  # requeued and held
    "RUNNING": RUNNING,
    "RESIZING": RUNNING,
    "SIGNALING": RUNNING,
    "STOPPED": RUNNING,
    "SUSPENDED": RUNNING,
    "UPDATE_DB": RUNNING,
    "COMPLETING": STOPPING,  # shown before a requeue, too
    "STAGE_OUT": STOPPING,
    "REQUEUED": STOPPING,
    "PREEMPTED": INTERRUPTED,
    "NODE_FAIL": INTERRUPTED,
    "BOOT_FAIL": INTERRUPTED,
    "LAUNCH_FAILED": INTERRUPTED,
    "RECONFIG_FAIL": INTERRUPTED,
    "REVOKED": INTERRUPTED,  # its sibling in a federation runs
    "COMPLETED": ENDED,
    "CANCELLED": ENDED,
    "DEADLINE": ENDED,
    "FAILED": ENDED,
    "OUT_OF_MEMORY": ENDED,
    "TIMEOUT": ENDED,
}
OVER = (INTERRUPTED, ENDED)

# Names that Slurm 20.11 knows already. ":|" ends a field, and does not cut it to 20 characters.
_QUEUE_FIELDS = "ArrayJobID:|,ArrayTaskID:|,State:|,NodeList:|,RestartCnt:|,TimeUsed:|,exit_code:|,"
_QUEUE_FIELDS += "PreemptTime:|,Name:|,Reason:"  # the reason last: it may be any text
_ACCOUNT_FIELDS = "JobID,State,ExitCode,ElapsedRaw,NodeList,Submit,JobName"  # Restarts from 23.02
_FOREIGN = ("SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_", "SACCTMGR_", "SLURM_", "SBATCH_", "LC_")
KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")  # by which Slurm is reached


class Unreachable(Exception):
    """Slurm did not answer, in one line: nothing is known, and nothing may be concluded."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What Slurm says of one job, an array's or a single one, at its latest start."""

    state: str
    is_in_queue: bool  # squeue shows it, and in a state that is not an end
    reason: str = ""  # why it waits or has ended, in Slurm's words
    node: str = ""
    restarts: int | None = None
    elapsed_s: float | None = None
    exit_code: int | None = None  # of an ended job; negative: a signal
    is_preempted: bool = False  # it has been told to make room
    name: str = ""  # another cluster, or one that was set up anew, gives the same numbers again


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the controller says of one job while it is there."""

    state: str
    reason: str = ""
    limit_s: float | None = None  # None: unlimited
    elapsed_s: float | None = None
    restarts: int = 0
    is_requeued: bool = False  # Slurm may start it again
    is_preempted: bool = False  # it has been told to make room


@dataclass(frozen=True, kw_only=True)
class Partition:
    preempt_mode: str | None = None
    grace_s: float | None = None  # between a preemption's signal and its kill
    max_time_s: float | None = None
    qos: str | None = None
    state: str | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a site allows, and how it treats jobs; None where Slurm does not say."""

    version: str | None = None
    max_array_size: int | None = None  # one more than the highest index
    submit_limits: dict[str, int] = field(default_factory=dict)  # of jobs in the queue, by name
    num_queued: int = 0  # of this user, now
    may_requeue: bool | None = None  # the default of jobs that do not ask
    preempt_type: str | None = None
    preempt_mode: str | None = None
    kill_wait_s: float | None = None
    min_job_age_s: float | None = None
    has_accounting: bool | None = None
    warns_of_preemption: bool = False  # by the signal of sbatch --signal, and not by SIGTERM alone
    partitions: dict[str, Partition] = field(default_factory=dict)


def kind(state: str) -> str:
    """What a state means. One that is not known is taken for running: it is no end that we know."""
    return STATES.get(state, RUNNING)


def queue(jobs: Iterable[str]) -> dict[str, Seen]:
    """What is known of jobs, by ARRAY_INDEX ("123_4"), or by the id of a job that is no array.

    `jobs` are such names, or ids of whole arrays. One squeue for all; then, for jobs that it does
    not know or whose end sacct knows better, one sacct.
    """
    jobs = set(jobs)
    if not jobs:
        return {}
    ids = ",".join(sorted({_array_of(job) for job in jobs}, key=_natural))
    command = ["squeue", f"--jobs={ids}", "--array", "--states=all", "--noheader"]
    code, out, err = _ask([*command, f"--Format={_QUEUE_FIELDS}"])
    if code and "Invalid job id" not in err:
        raise Unreachable(_line("squeue", code, err))
    found = parse_queue(out)
    known = found.keys() | {_array_of(job) for job in found}
    asked = {job for job in jobs if job not in known}
    asked |= {job for job in jobs if job in found and found[job].state in ("FAILED", "CANCELLED")}
    if asked:
        for job, starts in _starts(asked).items():
            if not ({job, _array_of(job)} & asked):
                continue
            if job not in found or kind(starts[-1].state) in OVER:
                found[job] = _merged(starts[-1], found.get(job))
    return found


def find(name: str, since: str = "now-30days") -> list[str]:
    """Job ids of the arrays of this name, oldest first: what was submitted by one that was killed
    before it could write the id down."""
    command = ["squeue", f"--name={name}", "--states=all", "--noheader", "--Format=ArrayJobID:|"]
    code, out, err = _ask(command)
    if code:
        raise Unreachable(_line("squeue", code, err))
    ids = {line.strip("|").strip() for line in out.splitlines()}
    if not ids:
        command = ["sacct", f"--name={name}", f"--starttime={since}", "--allocations"]
        _, out, _ = _accounts([*command, "--noheader", "--parsable2", "--format=JobID"])
        ids = {_array_of(line) for line in out.splitlines()}
    return sorted(ids - {""}, key=_natural)


def earlier_end(job_id: str | None) -> Seen | None:
    """How the start before this one of a restarted job has ended. Where no accounts are kept it was
    requeued, and that is all."""
    if job_id is None:
        return None
    unknown = Seen(state="REQUEUED", is_in_queue=False)
    with contextlib.suppress(Unreachable):
        starts = _starts({job_id}).get(job_id, [])
        ends = [one for one in starts if kind(one.state) in (*OVER, STOPPING)]
        return ends[-1] if ends else unknown
    return unknown


def describe(job_id: str | None) -> Job | None:
    """One job, as its controller knows it; None where that cannot be had (nodes without scontrol, a
    controller that is down)."""
    if job_id is None:
        return None
    try:
        code, out, _ = _ask(["scontrol", "--oneliner", "show", "job", job_id], limit_s=10.0)
    except Unreachable:
        return None
    return None if code else parse_job(out)


def requeue(job_id: str) -> str | None:
    """Asks Slurm to start our own job again; None where it will, else its refusal, in one line.

    This stops the job, and all that it has started: scontrol ignores the signal that comes back to
    it, and its death by a signal is no refusal.
    """
    deaf = "trap '' TERM HUP INT USR1 USR2; exec \"$@\""
    command = ["sh", "-c", deaf, "sh", "scontrol", "requeue", job_id]
    try:
        code, _, err = _ask(command, start_new_session=True)
    except Unreachable as error:
        return str(error)
    is_signalled = code < 0 or code - 128 in signal.valid_signals() - {0}
    return None if code == 0 or is_signalled else _line("scontrol requeue", code, err)


def cancel(jobs: Iterable[str]) -> None:
    """Cancels jobs or whole arrays; those that have ended are left alone."""
    jobs = sorted(set(jobs), key=_natural)
    if not jobs:
        return
    code, _, err = _ask(["scancel", *jobs])
    said = [line for line in err.splitlines() if not re.search(r"Invalid job id|already", line)]
    if code and said:
        raise Unreachable(_line("scancel", code, "\n".join(said)))


def release(jobs: Iterable[str]) -> None:
    """Lets jobs that are held begin; those that Slurm does not let go stay as they are."""
    for job in sorted(set(jobs), key=_natural):
        _ask(["scontrol", "release", job])


def limits(
    partition: str | None = None, account: str | None = None, qos: str | None = None
) -> Limits:
    """What the site allows this user, on a partition and under an account where they are named."""
    code, out, err = _ask(["scontrol", "show", "config"])
    if code:
        raise Unreachable(_line("scontrol show config", code, err))
    config = parse_config(out)
    _, out, _ = _ask(["scontrol", "--oneliner", "show", "partition"])
    partitions = parse_partitions(out)
    has_accounting = not config.get("AccountingStorageType", "").endswith("none")
    count = ["squeue", f"--user={os.getuid()}", "--array", "--noheader", "--format=%i"]
    code, queued, err = _ask(count)
    if code:
        raise Unreachable(_line("squeue", code, err))
    submit_limits = {}
    if (max_jobs := _int(config.get("MaxJobCount"))) is not None:
        submit_limits["MaxJobCount"] = max_jobs
    if has_accounting:
        own = partitions.get(partition or "", Partition()).qos
        name = config.get("ClusterName")
        submit_limits |= _submit_limits(name, partition, account, qos, own)
    return Limits(
        version=config.get("SLURM_VERSION"),
        max_array_size=_int(config.get("MaxArraySize")),
        submit_limits=submit_limits,
        num_queued=len(queued.split()),
        may_requeue={"0": False, "1": True}.get(config.get("JobRequeue", "")),
        preempt_type=config.get("PreemptType"),
        preempt_mode=config.get("PreemptMode"),
        kill_wait_s=_int(config.get("KillWait")),
        min_job_age_s=_int(config.get("MinJobAge")),
        has_accounting=has_accounting,
        warns_of_preemption="preempt_send_user_signal" in config.get("SlurmctldParameters", ""),
        partitions=partitions,
    )


# Parsing ----------------------------------------------------------------------------------------


def parse_queue(text: str) -> dict[str, Seen]:
    found = {}
    for line in text.splitlines():
        fields = line.split("|", 9)
        if len(fields) < 10:  # a warning, or a line that names a cluster
            continue
        array, tasks, state, node, restarts, elapsed, code, preempted, name, reason = (
            text.strip() for text in fields
        )
        state, is_over = _word(state), kind(_word(state)) in OVER
        one = Seen(
            state=state,
            is_in_queue=not is_over,
            reason=_text(reason),
            node=_text(node),
            restarts=_int(restarts),
            elapsed_s=seconds(elapsed),
            exit_code=_exit_code(code) if is_over else None,
            is_preempted=_is_time(preempted),
            name=name,
        )
        for task in _tasks(tasks):
            found[f"{array}_{task}" if task else array] = one
    return found


def parse_accounts(text: str) -> dict[str, list[Seen]]:
    """Every start of every job that sacct lists, the latest last."""
    starts: dict[str, list[tuple[str, Seen]]] = {}
    waiting: dict[str, Seen] = {}
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) < 7:
            continue
        number, state, code, elapsed, node, submitted, name = fields[:7]
        job, _, step = number.partition(".")
        if step:
            _take_step(starts.get(job), _word(state))
            continue
        one = Seen(
            state=_word(state),
            is_in_queue=False,
            reason=f"by uid {state.split()[-1]}" if " by " in state else "",
            node=_text(node),
            elapsed_s=_int(elapsed),
            exit_code=_exit_code(code) if kind(_word(state)) in OVER else None,
            name=name,
        )
        if "[" in job:  # those of an array that have not started; also some that have, for a while
            array, _, tasks = job.partition("_")
            waiting |= {f"{array}_{task}": one for task in _tasks(tasks)}
        else:
            # A requeue is submitted anew; when it starts may not be written down.
            starts.setdefault(job, []).append((submitted, one))
    ordered = {
        job: [one for _, one in sorted(found, key=lambda item: item[0])]
        for job, found in starts.items()
    }
    counted = {
        job: [replace(one, restarts=number) for number, one in enumerate(found)]
        for job, found in ordered.items()
    }
    return {job: [one] for job, one in waiting.items()} | counted


def parse_job(text: str) -> Job | None:
    values = _values(text)
    if "JobState" not in values:
        return None
    return Job(
        state=_word(values["JobState"]),
        reason=_text(values.get("Reason", "")),
        limit_s=seconds(values.get("TimeLimit", "")),
        elapsed_s=seconds(values.get("RunTime", "")),
        restarts=_int(values.get("Restarts")) or 0,
        is_requeued=values.get("Requeue") == "1",
        is_preempted=_is_time(values.get("PreemptTime", "")),
    )


def parse_config(text: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def parse_partitions(text: str) -> dict[str, Partition]:
    found = {}
    for line in text.splitlines():
        values = _values(line)
        if name := values.get("PartitionName"):
            qos = values.get("QoS")
            found[name] = Partition(
                preempt_mode=values.get("PreemptMode"),
                grace_s=_int(values.get("GraceTime")),
                max_time_s=seconds(values.get("MaxTime", "")),
                qos=None if qos in (None, "N/A") else qos,
                state=values.get("State"),
            )
    return found


def seconds(text: str) -> float | None:
    """Of [days-]hours:minutes:seconds or minutes:seconds; None for UNLIMITED, INVALID and such."""
    if not (match := re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())):
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)


def _take_step(starts: list[tuple[str, Seen]] | None, state: str) -> None:
    """A step that ran out of memory says why its job has failed; the job itself does not."""
    if starts and state == "OUT_OF_MEMORY" and starts[-1][1].state == "FAILED":
        submitted, one = starts[-1]
        starts[-1] = (submitted, replace(one, state=state))


def _tasks(text: str) -> Iterator[str]:
    """Of "7", "[4-9%2]", "1,3,10-20:5", and "" for what is no array."""
    if text in ("", "N/A"):
        yield ""
        return
    for part in text.strip("[]").partition("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?(?::(\d+))?", part)
        if match:
            first, last, step = match.groups()
            yield from map(str, range(int(first), int(last or first) + 1, int(step or 1)))


def _exit_code(text: str) -> int | None:
    """Of "3:0", "0:9", or the number that wait(2) gives: squeue prints that until 23.02."""
    code, colon, number = text.partition(":")
    if not code.isdigit():
        return None
    if colon:
        return -int(number) if number.isdigit() and int(number) else int(code)
    return -(int(code) & 127) if int(code) & 127 else int(code) >> 8


def _word(state: str) -> str:
    """CANCELLED by 0, CANCELLED+ and FAILED,COMPLETING begin with the word that counts."""
    return re.split(r"[\s+,]", state.strip(), maxsplit=1)[0].upper()


def _values(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)", text):
        found.setdefault(key, value)
    return found


def _int(text: str | None) -> int | None:
    """The number that a text begins with: "5 sec" is 5."""
    match = re.match(r"\d+", (text or "").strip())
    return int(match[0]) if match else None


def _text(word: str) -> str:
    return "" if word in ("None", "(null)", "None assigned") else word


def _is_time(text: str) -> bool:
    """And none of None, Unknown, N/A."""
    return text[:1].isdigit()


def _array_of(job: str) -> str:
    return job.partition("_")[0]


def _natural(job: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", job)]


# Asking -----------------------------------------------------------------------------------------


def _starts(jobs: set[str]) -> dict[str, list[Seen]]:
    """Of the arrays of these jobs, by sacct: duplicates and all, as a restarted job has several."""
    ids = ",".join(sorted({_array_of(job) for job in jobs}, key=_natural))
    command = ["sacct", f"--jobs={ids}", "--duplicates", "--noheader", "--parsable2"]
    _, out, _ = _accounts([*command, f"--format={_ACCOUNT_FIELDS}"])
    return parse_accounts(out)


def _merged(accounted: Seen, queued: Seen | None) -> Seen:
    """The account of a job's end, and what only the queue says."""
    if queued is None:
        return accounted
    known = {"restarts": queued.restarts, "is_preempted": queued.is_preempted}
    return replace(accounted, **known, reason=accounted.reason or queued.reason)


def _accounts(command: list[str]) -> tuple[int, str, str]:
    """What the accounts say: nothing, where none are kept or they cannot be reached now."""
    try:
        return _ask(command)
    except Unreachable:
        return 1, "", ""


def _submit_limits(
    cluster: str | None,
    partition: str | None,
    account: str | None,
    qos: str | None,
    own: str | None,
) -> dict[str, int]:
    """By name, those of the associations that a job would be counted by, and of their QOS. Of other
    accounts nothing follows: they may have expired."""
    account = account or os.environ.get("SBATCH_ACCOUNT") or _default_account()
    who = [f"user={_user()}", *([f"cluster={cluster}"] if cluster else [])]
    who += [f"account={account}"] if account else []
    rows = [
        row
        for row in _table(["sacctmgr", "--parsable2", "show", "assoc", *who])
        if row.get("Partition", "") in ("", *(partition or "").split(","))
    ]
    names = {qos} if qos else {row.get("Def QOS") or "normal" for row in rows}
    names |= {own} if own else set()
    known = _table(["sacctmgr", "--parsable2", "show", "qos"]) if rows else []
    named = [(f"MaxSubmit of account {row.get('Account')}", row) for row in rows]
    named += [(f"MaxSubmit of qos {row['Name']}", row) for row in known if row["Name"] in names]
    found: dict[str, int] = {}
    for name, row in named:
        for key in ("MaxSubmit", "GrpSubmit", "MaxSubmitPU"):
            if (limit := _int(row.get(key))) is not None:
                found[name] = min(limit, found.get(name, limit))
    return found


def _default_account() -> str | None:
    """Of a job that names none."""
    rows = _table(["sacctmgr", "--parsable2", "show", "user", f"name={_user()}"])
    return next((row.get("Def Acct") for row in rows), None) or None


def _table(command: list[str]) -> list[dict[str, str]]:
    try:
        code, out, _ = _ask(command)
    except Unreachable:
        return []
    lines = [line.split("|") for line in out.splitlines()]
    return [] if code else [dict(zip(lines[0], line, strict=False)) for line in lines[1:]]


def _user() -> str:
    import pwd  # not outside of POSIX, where this module is imported all the same

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a user of a directory service that is not reachable from here
        return str(os.getuid())


def _ask(
    command: list[str], limit_s: float | None = None, start_new_session: bool = False
) -> tuple[int, str, str]:
    limit_s = COMMAND_S if limit_s is None else limit_s
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=limit_s,
            env=environment(),
            start_new_session=start_new_session,
        )
    except FileNotFoundError:
        raise Unreachable(f"{command[0]} is not found: this is no machine of Slurm's.") from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{command[0]} did not answer within {limit_s:g} s.") from None
    except OSError as error:
        raise Unreachable(f"{command[0]} cannot be started: {error}.") from None
    return done.returncode, done.stdout, done.stderr


def environment() -> dict[str, str]:
    """Ours, without the settings that change what Slurm's commands print or ask for."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if key in KEPT or not key.startswith(_FOREIGN)
    }
    return clean | {"LANG": "C", "LC_ALL": "C", "SLURM_BITSTR_LEN": "0"}  # 0: lists are not cut


def _line(command: str, code: int, err: str) -> str:
    """The last line of what a command complains of: those before it are tries."""
    said = [line.strip() for line in err.splitlines() if line.strip()]
    return f"{command}: {said[-1] if said else f'exit code {code}'}"
