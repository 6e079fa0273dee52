"""An environment with transformers for the benchmarks that compare with it, as the project does without.

It lies in the folder for temporary files, is made once, and sees the packages of the environment that made
it, so that torch and timm are the same on both sides. Nothing is fetched but packages; weights are random.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from importlib.util import find_spec
from pathlib import Path

VERSION = "5.23.0"
ROOT = Path(__file__).resolve().parents[1]


def enter(module: str) -> None:
    """Go on with this module inside the environment, which is made where it is missing; return inside it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if find_spec("transformers") is not None:
        return
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    os.execve(_python(), [str(_python()), "-m", module, *sys.argv[1:]], environment)


def _python() -> Path:
    folder = Path(tempfile.gettempdir()) / f"transformers-{VERSION}-{os.getuid()}"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if ready.exists():
        return python
    venv.create(folder, with_pip=False, clear=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    (packages / "outside.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*install, f"transformers=={VERSION}"], check=True)
    ready.touch()
    return python
