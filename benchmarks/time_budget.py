"""Measure how exactly `bnlab train --time` keeps its time, on an idle machine and on one that is busy at first.

    python benchmarks/time_budget.py PHOTOS [SECONDS [RUNS [OPTION ...]]]

Each run is a separate process, timed from its start to its end. Every second run shares the machine, for the first 30
seconds, with as many busy processes as there are cores. OPTIONs are passed to `bnlab train`, such as `--size 64`.
Nothing else should run on the machine. The script prints the seconds used and the steps of the plan as it changed.
"""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import date
from pathlib import Path

import yaml

from bnlab.machine import usable_cores

BUSY = 30.0  # seconds


def main(photos: str, seconds: str = "60", runs: str = "3", *options: str) -> None:
    print(f"{date.today()}, {usable_cores()} cores, {seconds} s asked, load at the beginning {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as home:
        for number in range(int(runs)):
            for busy in (False, True):
                name = f"{'busy' if busy else 'idle'}{number}"
                words = [sys.executable, "-m", "bnlab", "train", str(Path(photos).resolve()), "--name", name]
                began = time.monotonic()
                others = [
                    subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(usable_cores() * busy)
                ]
                process = subprocess.Popen(
                    [*words, "--time", seconds, *options], cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                )
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=BUSY)
                for other in others:
                    other.kill()
                    other.wait()
                _, messages = process.communicate()
                used = time.monotonic() - began
                if process.returncode:
                    sys.exit(messages.decode())
                plan = yaml.safe_load((Path(home) / "runs" / name / "recipe.yaml").read_text())["plan"]
                steps = " ".join(str(steps) for _, steps, _ in plan)
                print(f"{name}: {used:.1f} s used, {used / float(seconds):.1%}; steps {steps}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
