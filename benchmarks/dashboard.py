"""Makes the picture of docs/dashboard.md: `python benchmarks/dashboard.py docs/dashboard.png`.

Trains the quickstart, stops it half-way as a preemption would, starts the same command again, and photographs the
TensorBoard of the whole run in a browser without a window (Debian's package chromium). Takes as long as two starts and
one quickstart; `--run DIRECTORY` photographs a run that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import psutil
from PIL import Image

from launch.exit_status import STOPPED

ROOT = Path(__file__).resolve().parents[1]
CARDS = (
    "train/loss",
    "validation/loss",
    "train/learning_rate",
    "train/gradient_norm",
    "throughput/tokens_per_second",
    "stragglers/slowest_over_median",
)
SIZE = "1560,1440"
COLOURS = 64
"""A board needs no more, and a repository keeps every picture for good."""


def train(folder: Path, stop_at: int, overrides: list[str]) -> Path:
    """The quickstart, stopped once it has logged step `stop_at` and started again; its run directory."""
    run = folder / "quickstart"
    command = [str(Path(sys.executable).parent / "deepspeed"), "--quiet", "--num_gpus", "4"]
    command += [str(ROOT / "launch" / "train.py"), f"job.run_directory={run}", "monitor.log_interval=2", *overrides]
    first = subprocess.Popen(command, cwd=folder)
    while logged(run) < stop_at:
        assert first.poll() is None, "the job ended before it could be stopped"
        time.sleep(0.2)
    for process in psutil.Process(first.pid).children(recursive=True):
        if process.environ().get("RANK") == "0" and "train.py" in " ".join(process.cmdline()):
            process.send_signal(signal.SIGUSR2)
    assert first.wait() == STOPPED, "the job did not stop as it was asked to"
    subprocess.run(command, cwd=folder, check=True)
    return run


def logged(run: Path) -> int:
    """The last step in metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


@contextmanager
def board(run: Path, port: int) -> Iterator[str]:
    """TensorBoard on a run; its address."""
    command = [str(Path(sys.executable).parent / "tensorboard"), "--logdir", str(run), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                with urllib.request.urlopen(f"{address}/data/plugin/scalars/tags", timeout=5) as answer:
                    if b"train/loss" in answer.read():
                        break
            except OSError:
                pass
            assert server.poll() is None, "TensorBoard ended"
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def photograph(address: str, picture: Path) -> None:
    """The cards named above, unsmoothed, as a reader would open them."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no browser: install Debian's package chromium")
    pinned = quote(json.dumps([{"plugin": "scalars", "tag": tag} for tag in CARDS], separators=(",", ":")), safe="")
    url = f"{address}/?pinnedCards={pinned}&smoothing=0#timeseries"
    options = ["--headless=new", "--disable-3d-apis", "--hide-scrollbars", f"--window-size={SIZE}"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory() as profile:
        options += [f"--user-data-dir={profile}", "--virtual-time-budget=60000", f"--screenshot={picture}"]
        subprocess.run([browser, *options, url], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with Image.open(picture) as whole:
        whole.convert("RGB").quantize(COLOURS).save(picture, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--run", type=Path, help="run directory to photograph instead of training one")
    parser.add_argument("--stop-at", type=int, default=100, help="step after which the job is stopped (default: 100)")
    parser.add_argument("--port", type=int, default=6106, help="of TensorBoard (default: 6106)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override one key")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or train(Path(folder), options.stop_at, options.overrides)
        with board(run, options.port) as address:
            photograph(address, options.picture.absolute())
    print(f"{options.picture}: {options.picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
