"""Jobs under a real Slurm: submitted, preempted, out of time, queued again, killed."""

import json
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.slurm.submission import newest_submission
from tests.cluster.namespaces import PATIENCE, what_is_missing
from tests.cluster.slurm_cluster import PROGRAMS, SlurmCluster
from tests.cluster.slurm_run import ENVIRONMENT, NODES, ROOT, STEPS, SlurmRun, assert_same_run
from tests.faults.launched import INJECTED

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    if missing := what_is_missing(PROGRAMS):
        pytest.skip(missing)
    scratch = Path(tempfile.mkdtemp(prefix="ringzero-slurm-"))  # a socket's path must be short
    try:
        with SlurmCluster(scratch) as cluster:
            yield cluster
    finally:
        shutil.rmtree(scratch)


@pytest.fixture(autouse=True)
def _nothing_is_left(cluster: SlurmCluster) -> Iterator[None]:
    """The jobs of a test that fails must not keep the nodes from the others."""
    yield
    if left := cluster.command("squeue", "-h", "-o", "%i").split():
        cluster.command("scancel", *left, check=False)


@pytest.fixture(scope="module")
def undisturbed(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> SlurmRun:
    """A job from submission to its end, which the others are compared with."""
    run = SlurmRun(cluster, tmp_path_factory.mktemp("undisturbed"))
    job = run.start()
    ranks = cluster.until(lambda: len(found := cluster.ranks(job)) == len(NODES) and found)
    for process in ranks.values():
        environment = process.environ()
        assert {name: environment[name] for name in ENVIRONMENT} == ENVIRONMENT
        assert process.cpu_affinity() == psutil.Process().cpu_affinity()
    run.finish(job)
    assert not list(cluster.processes(job))
    return run


def test_a_job_from_submission_to_its_end(cluster: SlurmCluster, undisturbed: SlurmRun) -> None:
    submission = newest_submission(undisturbed.run)
    (job,) = submission.job_ids
    log = undisturbed.log(job)
    assert f"job {job} is done: step {STEPS} of {STEPS}" in log
    assert f"from step 0 on {' '.join(NODES)}" in log
    assert f"saved {undisturbed.job.checkpoints}/step-{STEPS:08d}" in log  # what rank 0 says is shown
    assert (submission.folder / "job.sbatch").read_text().startswith("#!/bin/bash\n#SBATCH --job-name=tiny\n")
    assert f"max_steps: {STEPS}" in submission.config.read_text() and (submission.folder / "revision.txt").exists()
    assert len(list((submission.folder / f"{job}-0").glob("*_rank*.log"))) == len(NODES)
    command = [sys.executable, str(ROOT / "launch" / "status.py"), str(undisturbed.run)]
    told = cluster.run(*command, environment={"PYTHONPATH": str(ROOT)}).stdout
    assert re.search(rf"^job {job} +COMPLETED, restarts 0", told, re.MULTILINE)
    assert re.search(rf"^step +{STEPS} of {STEPS}, [\d,]+ tokens/s$", told, re.MULTILINE)
    assert re.search(rf"^checkpoint +step {STEPS} in ", told, re.MULTILINE)


def test_a_job_that_fails_its_check_is_not_submitted(cluster: SlurmCluster, tmp_path: Path) -> None:

    def jobs() -> set[str]:
        return set(cluster.command("squeue", "-h", "-t", "all", "-o", "%i").split())

    before = jobs()
    run = SlurmRun(cluster, tmp_path)
    told = run.submit("training.global_batch_size=3", code=2)
    assert "global_batch_size (3) must be divisible by micro_batch_size x data_parallel_size (1 x 2 = 2)" in told
    assert "world size (3)" in run.submit("slurm.nodes=3", "parallel.context_parallel_size=2", code=2)
    assert jobs() == before
    assert not run.run.exists()


def test_a_preempted_job_goes_on_where_it_was(cluster: SlurmCluster, undisturbed: SlurmRun, tmp_path: Path) -> None:
    run = SlurmRun(cluster, tmp_path)
    job = run.start()
    with run.stopped(3, job):
        urgent = int(
            cluster.command(
                *("sbatch", "--parsable", "-phigh", "-N2", f"-w{','.join(NODES)}", "--exclusive"),
                *("-o/dev/null", "--wrap", "sleep 1"),
            )
        )
    assert cluster.end(urgent) == "COMPLETED"
    run.finish(job)
    log = run.log(job)
    stopped = re.search(rf"stopped after step (\d+) of {STEPS}, as asked by a signal", log)
    assert stopped and 3 < int(stopped[1]) < STEPS
    assert f"resumed from step {stopped[1]}" in log and cluster.facts(job)["Restarts"] == "1"
    assert_same_run(run, undisturbed)


def test_requeued_by_an_operator_stopped_by_a_plain_sigterm_and_off_a_crashed_node(
    cluster: SlurmCluster, undisturbed: SlurmRun, tmp_path: Path
) -> None:
    """SIGTERM to the steps is what a preemption sends where preempt_send_user_signal is not set."""
    run = SlurmRun(cluster, tmp_path, "checkpoint.save_interval=4")
    job = run.start()

    def until_resumed(restarts: int) -> int:
        """The step from which the job goes on after so many restarts."""
        cluster.until(lambda: run.log(job).count("resumed from step") == restarts)
        assert cluster.facts(job)["Restarts"] == str(restarts)
        return newest_submission(run.run).slices()[-1]["step"]

    cluster.until(lambda: run.job.complete())
    with run.stopped(6, job):
        cluster.command("scontrol", "requeue", str(job))
    with run.stopped(until_resumed(1) + 2, job):
        cluster.command("scancel", "--signal=TERM", str(job))
    stopped = until_resumed(2)
    assert f"queueing job {job} again" in run.log(job) and f"was stopped at step {stopped} of" in run.log(job)
    crashed = newest_submission(run.run).slices()[-1]["nodes"][1]
    with run.stopped(stopped + 2, job, rank=1):
        cluster.crash(crashed)
    until_resumed(3)
    cluster.boot(crashed)
    assert crashed not in newest_submission(run.run).slices()[-1]["nodes"]
    run.finish(job)
    assert_same_run(run, undisturbed)


def test_a_time_limit_and_a_cancelled_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Slurm looks every 30 s who is to be warned before the next look: here 8 to 38 s after the start, which leaves
    minutes to save in."""
    run = SlurmRun(cluster, tmp_path, "slurm.time=5", "slurm.stop_seconds=262", steps=100_000)
    job = run.start()
    run.until_said("restart 1, from step", job)
    stopped = re.search(r"was stopped at step (\d+) of 100000", run.log(job))
    assert stopped and int(stopped[1]) > 0 and f"restart 1, from step {stopped[1]} on" in run.log(job)
    cluster.until(lambda: len(cluster.ranks(job)) == len(NODES))
    cluster.command("scancel", str(job))
    run.finish(job, "CANCELLED")
    cluster.until(lambda: not list(cluster.processes(job)))  # now nobody is left who could queue it again
    assert cluster.state(job) == "CANCELLED"


def test_a_killed_rank_ends_the_job_in_seconds(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = SlurmRun(cluster, tmp_path, steps=100_000, processes=2)
    job = run.start()
    run.until_step(2, job)
    cluster.ranks(job)[3].send_signal(signal.SIGSEGV)
    killed = time.monotonic()
    assert cluster.end(job) == "FAILED"
    cluster.until(lambda: not list(cluster.processes(job)))
    print(f"over {time.monotonic() - killed:.1f} s after it was killed")
    assert time.monotonic() - killed < 120, "the others have waited for it"
    log = run.log(job)
    assert "rank 3 on node-2 was killed by signal 11 (SIGSEGV); the last it said" in log
    assert re.search(r'File ".*/launch/trainer.py", line \d+ in ', log), "and where it was"
    assert not re.search(r"rank [012] on node-\d", log.partition("rank 3 on node-2")[0])
    assert f"job {job} failed" in log and cluster.facts(job)["Restarts"] == "0"


def test_ranks_that_srun_starts_itself(cluster: SlurmCluster, undisturbed: SlurmRun, tmp_path: Path) -> None:
    """SIGTERM stops them, too, and the same command goes on."""
    run = SlurmRun(cluster, tmp_path)
    train = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(run.job.config)]
    train += [override for override in run.overrides if not override.startswith("slurm.")]
    script = tmp_path / "own.sbatch"
    exports = "".join(f"export {name}={value}\n" for name, value in ENVIRONMENT.items())
    step = shlex.join(["srun", "--cpu-bind=none", *train])
    script.write_text(f"#!/bin/bash\n{exports}trap '' TERM\n{step}; echo status $?\n{step}\n")
    options = ["-N2", "--ntasks-per-node=1", f"-o{tmp_path}/own.log"]
    job = int(cluster.command("sbatch", "--parsable", *options, str(script)))

    def tasks() -> dict[str, tuple[psutil.Process, dict[str, str]]]:
        found = [one for one in cluster.processes(job) if one[1].get("SLURM_STEP_ID") == "0"]
        return {variables["SLURM_PROCID"]: (process, variables) for process, variables in reversed(found)}

    def trains() -> bool:
        assert cluster.state(job) in ("PENDING", "RUNNING"), (tmp_path / "own.log").read_text()
        return run.job.logged() >= 3

    cluster.until(trains)
    started = tasks()
    assert started.keys() == {"0", "1"}
    assert all(variables.items() >= ENVIRONMENT.items() for _, variables in started.values())
    with cluster.stopped(started["0"][0]):
        cluster.command("scancel", "--signal=TERM", f"{job}.0")
    assert cluster.end(job) == "COMPLETED", (tmp_path / "own.log").read_text()
    log = (tmp_path / "own.log").read_text()
    assert "status 75" in log and "resumed from step" in log
    assert_same_run(run, undisturbed)


def test_a_killed_launcher_takes_its_ranks_along(cluster: SlurmCluster, tmp_path: Path) -> None:
    """DeepSpeed's of one job and ours of another, side by side on the four nodes."""
    jobs: dict[str, tuple[SlurmRun, int]] = {}
    for idle, victim in ((4, "deepspeed.launcher.launch"), (2, "slurm_node.py")):
        run = SlurmRun(cluster, tmp_path / victim, steps=100_000)
        jobs[victim] = run, run.start(idle=idle)
    for victim, (run, job) in jobs.items():
        run.until_step(1, job)
        ranks = list(cluster.ranks(job).values())
        cluster.launchers(job, victim)[-1].send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(ranks, timeout=PATIENCE)
        assert not alive, victim
        assert cluster.end(job) == "FAILED", victim
        cluster.until(lambda job=job: not list(cluster.processes(job)))


def test_a_slow_node_and_one_with_a_stopped_rank_are_avoided(
    cluster: SlurmCluster, undisturbed: SlurmRun, tmp_path: Path
) -> None:
    """Writing takes many times as long on node-2, which the probe finds, and which no load does to the other; then a
    rank is stopped on one that has come instead."""
    slow = {"rank": 1, "node": "node-2", "event": "open", "path": "probe-", "every": True}
    slow |= {"action": "run", "command": "sleep 4"}
    run = SlurmRun(
        cluster,
        tmp_path,
        *("checkpoint.save_interval=4", "health.exclude=true", "health.outlier=0.2"),
        *("health.minimum_step_seconds=6", "health.hang_grace_seconds=3"),
        environment={"FAULT": json.dumps(slow), "PYTHONPATH": f"{INJECTED}:{ROOT}"},
    )
    job = run.start()
    run.until_said("restart 1, from step", job)
    assert "warning: node-2: writing of node-2, " in run.log(job)
    assert f"queueing job {job} again, without node-2\n" in run.log(job)
    run.until_step(6, job)
    first, second = newest_submission(run.run).slices()[-1]["nodes"]
    assert "node-2" not in (first, second)
    cluster.ranks(job)[1].send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    run.until_said(f"\nmissing: rank 1 on {second}, which does not answer", job)
    print(f"named {time.monotonic() - begun:.1f} s after it was stopped")
    limit = re.search(r"^hang: .* takes longer than (\d+) s: ", run.log(job), re.MULTILINE)
    assert limit and time.monotonic() - begun < int(limit[1]) + 60
    run.finish(job)
    log = run.log(job)
    assert "state T (stopped by a signal)" in log
    assert re.search(r"a step that takes longer than \d+ s counts as hung: health\.", log)
    assert re.search(rf"^rank 0 on {first}, (waiting in|not over:) \w+", log, re.MULTILINE)
    assert f"queueing job {job} again, without {second}\n" in log
    assert not {"node-2", second} & set(newest_submission(run.run).slices()[-1]["nodes"])
    assert cluster.facts(job)["Restarts"] == "2"
    assert_same_run(run, undisturbed)


CONTAINER = """\
#!/bin/sh
# A stand-in for a container: processes and mounts of its own, none of Slurm's commands, and a file of its own. The
# first one takes its time.
shift 2  # --image any
until [ -e LATER ]; do sleep 0.1; done
exec unshare --mount --pid --fork --kill-child --mount-proc sh -c '
    mount -t tmpfs inside /mnt && touch /mnt/inside-the-container
    mount --bind /dev/null "$(command -v scancel)" && mount --bind /dev/null "$(command -v srun)"
    exec "$@"' sh "$@"
"""


TEMPLATE = """\
#!/bin/bash
# What this site wants in every job.
{directives}
trap '' USR2
{setup}
export SITE_SCRATCH=${TMPDIR:-/tmp}/of-the-site
exec {command} "$@"
"""


def test_a_chain_in_a_container_that_is_warned_at_once(cluster: SlurmCluster, tmp_path: Path) -> None:
    """By a site's own template. The warning of the first job comes before there are ranks; of the second, while they
    train."""
    contain, later = tmp_path / "contain", tmp_path / "later"
    contain.write_text(CONTAINER.replace("LATER", str(later)))
    contain.chmod(0o755)
    template = tmp_path / "site.sh"
    template.write_text(TEMPLATE)
    site = (f"slurm.template={template}", f"slurm.container={contain} --image any")
    run = SlurmRun(cluster, tmp_path / "run", *site, "slurm.nodes=1")
    first, second, third = run.start_chain("--chain", "3")
    run.until_said(f"job {first}, restart 0, from step 0", first)
    cluster.command("scancel", "--batch", "--signal=USR2", str(first))
    run.until_said("SIGUSR2: asking all ranks to save and stop", first)
    later.touch()
    run.finish(first)
    assert "was stopped at step" in run.log(first) and cluster.facts(first)["Restarts"] == "0"
    with run.stopped(run.job.logged() + 2, second):
        (rank,) = cluster.ranks(second).values()
        assert (Path("/proc") / str(rank.pid) / "root/mnt/inside-the-container").exists()
        assert rank.environ()["SITE_SCRATCH"].endswith("/of-the-site")
        cluster.command("scancel", "--batch", "--signal=USR2", str(second))
    run.finish(second)
    run.finish(third)
    assert "was stopped at step" in run.log(second) and f"job {third} is done" in run.log(third)
    assert sorted(run.job.curve()) == list(range(1, STEPS + 1))
