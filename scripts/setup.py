"""`make setup`: a fresh checkout becomes `.venv` with syncline and one build of vLLM, from the lock.

Written for any python3 of the last years, so that a too old one gets a sentence, not a syntax error. Once `.venv`
matches the lock, nothing is asked of the network. `--environments` adds the libraries that the adapters' tests show
(one of them is compiled, so the demo does without). `--lock` resolves the locks again (`make lock`).
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
UV = VENV / "bin" / "uv"
STAMP = VENV / "syncline-setup"
"""What `.venv` was made from, and where: a moved venv is a broken one."""
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)
OLDEST_DRIVER = 580
"""NVIDIA's first driver for CUDA 13, which the locked torch is built for."""
UV_RELEASE = "uv==0.13.8"
EXTRAS = ("learner", "gsm8k", "report", "dev")
ENVIRONMENTS = ("reasoning-gym", "tensorboard", "trl", "verifiers", "wandb")
ENVIRONMENTS_STAMP = VENV / "syncline-environments"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("auto", "cpu", "cuda"), default="auto", help="which build of vLLM")
    parser.add_argument(
        "--environments", action="store_true", help="the libraries of requirements/environments.txt too"
    )
    parser.add_argument("--lock", action="store_true", help="resolve requirements/*.txt again")
    arguments = parser.parse_args()
    check_python()
    if arguments.lock:
        lock()
    else:
        set_up(arguments.engine)
        if arguments.environments:
            add_environments()


def set_up(engine: str) -> None:
    build, why = choose_build(engine)
    print(f"vLLM's {build.upper()} build: {why}", flush=True)
    packages = "\n".join([str(VENV), build, own_version(), digest(lock_file(build))])
    project = f"{packages}\n{digest(ROOT / 'pyproject.toml')}\n"
    done = STAMP.read_text() if STAMP.is_file() else ""
    if done == project:
        return
    if not done.startswith(packages):
        install_packages(build)
    run(UV, "pip", "install", "--python", PYTHON, "--no-deps", "--no-build-isolation", "--editable", ROOT)
    STAMP.write_text(project)
    print("ready: .venv", flush=True)


def add_environments() -> None:
    """On top of the lock, without touching what it names; a new `.venv` has no stamp, so it is done again there."""
    wanted = digest(lock_file("environments"))
    if ENVIRONMENTS_STAMP.is_file() and ENVIRONMENTS_STAMP.read_text() == wanted:
        return
    run(UV, "pip", "install", "--quiet", "--python", PYTHON, "--no-deps", "--requirements", lock_file("environments"))
    ENVIRONMENTS_STAMP.write_text(wanted)


def check_python() -> None:
    if sys.platform != "linux":
        sys.exit(f"syncline needs Linux, because vLLM does; this is {sys.platform}. On Windows use WSL2.")
    if OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        return
    names = [f"python3.{minor}" for minor in range(OLDEST_PYTHON[1], NEWEST_PYTHON[1] + 1)]
    found = [name for name in names if shutil.which(name)]
    remedy = f"run `make PYTHON={found[-1]} ...`" if found else "install one and run `make PYTHON=python3.12 ...`"
    sys.exit(f"syncline needs Python 3.11 to 3.14, and {sys.executable} is {own_version()}: {remedy}")


def own_version() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def choose_build(engine: str) -> tuple[str, str]:
    """(`cpu` or `cuda`, the reason). Exits when there is a GPU whose driver cannot run the locked torch."""
    if engine != "auto":
        return engine, f"asked for with ENGINE={engine}"
    try:
        gpus = output_of("nvidia-smi", "-L")
    except FileNotFoundError:
        return "cpu", "no NVIDIA GPU here (there is no nvidia-smi)"
    except subprocess.CalledProcessError as error:
        return "cpu", f"no NVIDIA GPU to use (nvidia-smi: {error.stdout.decode().strip()})"
    if not gpus:
        return "cpu", "no NVIDIA GPU here (nvidia-smi lists none)"
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()[0]
    if int(driver.split(".")[0]) < OLDEST_DRIVER:
        sys.exit(
            f"The NVIDIA driver is {driver}, and the CUDA build needs {OLDEST_DRIVER} or newer: "
            "update it, or run `make ENGINE=cpu ...`"
        )
    return "cuda", f"found {gpus.splitlines()[0].split(' (UUID')[0]}, driver {driver}"


def check_libnuma() -> None:
    """The one shared library of vLLM's CPU build that neither Python nor a wheel brings."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        sys.exit("vLLM's CPU build needs libnuma.so.1: `apt-get install libnuma1` or `dnf install numactl-libs`")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lock_file(build: str) -> Path:
    return ROOT / "requirements" / f"{build}.txt"


def install_packages(build: str) -> None:
    """Makes `.venv` hold what the lock names and nothing else."""
    if build == "cpu":
        check_libnuma()
    prepare_uv()
    for stamp in (STAMP, ENVIRONMENTS_STAMP):
        stamp.unlink(missing_ok=True)
    run(UV, "pip", "sync", "--compile-bytecode", "--python", PYTHON, *torch_source(build), lock_file(build))


def prepare_uv() -> None:
    """Installs uv in `.venv`, which is made anew unless it has pip and this Python's version."""
    try:
        version = output_of(str(PYTHON), "-c", "import pip, sys; print('%d.%d' % sys.version_info[:2])")
    except (OSError, subprocess.CalledProcessError):
        version = "none"
    if version != own_version():
        try:
            run(sys.executable, "-m", "venv", "--clear", VENV)
        except subprocess.CalledProcessError:
            sys.exit("`python3 -m venv` failed; on Debian and Ubuntu: `apt-get install python3-venv`")
    run(PYTHON, "-m", "pip", "install", "--quiet", UV_RELEASE)


def torch_source(build: str) -> list[str]:
    """uv's options that find torch's CPU build: in a folder that pip was told of, else on PyTorch's own index."""
    if build == "cuda":
        return []
    places = find_links()
    if any(next(Path(place).glob("torch-*+cpu-*.whl"), None) for place in places):
        return [option for place in places for option in ("--find-links", place)]
    return ["--torch-backend", "cpu"]


def find_links() -> list[str]:
    """What pip is configured with; uv does not read pip's configuration."""
    if "PIP_FIND_LINKS" in os.environ:
        return os.environ["PIP_FIND_LINKS"].split()
    try:
        return output_of(str(PYTHON), "-m", "pip", "config", "get", "global.find-links").split()
    except subprocess.CalledProcessError:  # pip's answer when it is not set
        return []


def lock() -> None:
    """Writes requirements/*.txt from pyproject.toml, each for every supported Python at once."""
    prepare_uv()
    requirements = ROOT / "requirements"
    wishes = {
        "cpu": ("--override", requirements / "cpu-overrides.txt", *torch_source("cpu")),
        "cuda": ("--constraint", requirements / "cuda-constraints.txt"),
    }
    for build, options in wishes.items():
        resolve(build, (*EXTRAS, build), "--override", requirements / "overrides.txt", *options)
    resolve("environments", ENVIRONMENTS, *wishes["cpu"], "--constraint", lock_file("cpu"))
    keep_additions(lock_file("environments"), beside=lock_file("cpu"))


def resolve(name: str, extras: tuple[str, ...], *options: str | Path) -> None:
    wanted = [option for extra in extras for option in ("--extra", extra)]
    how = ("--upgrade", "--universal", "--python-version", "3.11", "--custom-compile-command", "make lock")
    out = ("--quiet", "--no-annotate", "--output-file", lock_file(name))
    run(UV, "pip", "compile", *how, *wanted, *options, *out, ROOT / "pyproject.toml")


def keep_additions(lock: Path, *, beside: Path) -> None:
    """Leaves out what the other lock installs too: that one decides, the CUDA build's own as well."""
    other = beside.read_text().splitlines()
    always = {line.split("==")[0] for line in other if ";" not in line} | {"torch"}
    added = [n for n in lock.read_text().splitlines() if n not in other and n.split("==")[0] not in always]
    lock.write_text(
        "# This file was made by `make lock`: what requirements/cpu.txt has not\n" + "\n".join(added) + "\n"
    )


def output_of(*command: str) -> str:
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return answer.stdout.decode().strip()


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, cwd=str(ROOT))


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"setup stopped: `{' '.join(error.cmd)}` ended with {error.returncode}")
