"""Sessions: demo, inference, replay, tests, kernels, tests_gpu, sanitize, exhaustive, lint, bench.

With `nox --no-venv -s NAME` in the current environment.
"""

from __future__ import annotations

import ctypes
import sys

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "tests"]
# pip, not uv: both of a machine's own package configuration and an already cached PyTorch are then honoured.
nox.options.default_venv_backend = "virtualenv"

PROJECT = nox.project.load_toml("pyproject.toml")


def group(name: str) -> list[str]:
    """The requirements of a dependency group."""
    return list(nox.project.dependency_groups(PROJECT, name))


def has_gpu() -> bool:
    """Whether an NVIDIA driver with at least one GPU is there. It needs no package."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def install(session: nox.Session, *requirements: str, extras: tuple[str, ...] = ()) -> None:
    """Install the project with extras and requirements, unless the session runs in the current environment."""
    if session.virtualenv.is_sandboxed:
        session.install("-e", f".[{','.join(extras)}]" if extras else ".", *requirements)


@nox.session
def demo(session: nox.Session) -> None:
    """Show that results change with the batch size in standard PyTorch and do not in the mode (CPU or GPU)."""
    install(session, *group("torch"), extras=("cuda13",) if has_gpu() else ())
    session.run("python", "examples/demo.py", *session.posargs)


@nox.session
def inference(session: nox.Session) -> None:
    """One prompt many times under continuous batching: how many answers there are, without the mode and in it."""
    install(session, *group("examples"), extras=("cuda13",) if has_gpu() else ())
    session.run("python", "examples/deterministic_inference.py", *session.posargs)


@nox.session
def replay(session: nox.Session) -> None:
    """What a model answered on a Hopper GPU, computed again on this CPU: every log-probability has the same bits."""
    install(session, *group("examples"), extras=("cuda13",) if has_gpu() else ())
    session.run("python", "examples/replay_on_cpu.py", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Everything that needs no GPU: the CPU backend, the adapter, and GPU kernels compiled."""
    install(session, *group("test"), extras=("cuda13",))
    session.run("pytest", *(session.posargs or ["-n", "auto", "-m", "not gpu"]))


@nox.session
def kernels(session: nox.Session) -> None:
    """GPU kernels compiled without a GPU: all that may be launched, but examples of those that Numba has for rows and
    columns; `tests` compiles a share.
    """
    install(session, *group("test"), extras=("cuda13",))
    files = ("tests/test_cuda_kernels.py", "tests/test_numba_kernels.py")
    session.run("pytest", "-n", "auto", "--every-kernel", *files, *session.posargs)


@nox.session
def tests_gpu(session: nox.Session) -> None:
    """Every backend on this machine's GPU, against each other and the reference."""
    if not has_gpu():
        session.error("no NVIDIA driver with a GPU was found; `nox -s tests` needs none")
    install(session, *group("test"), extras=("cuda13",))
    session.run("pytest", "--backend", "cupy", "--backend", "numba", "--backend", "cpu", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, ruff format and mypy."""
    install(session, *group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def sanitize(session: nox.Session) -> None:
    """Every schedule of every product and reduction under compute-sanitizer, which CUDA's toolkit brings.

    `-- --every 14 --first 3` runs a fourteenth; all at a time take minutes, where the kernels are compiled already.
    racecheck also takes long for the products, of which `--products 6` are a sixth. Errors of the driver's functions
    are not reported: libraries ask it for functions that it may lack.
    """
    install(session, *group("test"), extras=("cuda13",))
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "1"]
        options = ["--racecheck"] if tool == "racecheck" else []
        session.run(*command, "python", "-m", "tests.sanitize", *options, *session.posargs, external=True)


@nox.session
def exhaustive(session: nox.Session) -> None:
    """exp and log of every float32 on this machine's GPU and CPU, alone and within reductions."""
    install(session, *group("test"), *group("docs"), extras=("cuda13",))
    session.run("python", "docs/polynomials.py", "check")
    session.run("python", "-m", "tests.exhaustive", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Run a program of `benchmarks`: `nox -s bench -- matmul --quick`; `matmul` if none is named."""
    install(session, *group("bench"), extras=("cuda13",) if has_gpu() else ())
    name, *arguments = session.posargs or ["matmul"]
    session.run("python", f"benchmarks/{name}.py", *arguments)
