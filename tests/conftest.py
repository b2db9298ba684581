"""The suite runs on 8 simulated CPU devices, with shapes in signatures checked and compiled programs cached."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "tests", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# before jax is imported: 8 simulated devices, no accelerator, a compilation cache that outlives the process
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "kindred-zoo" / "tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "True")  # compiling dominates: halves it, changes no result

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["zoo"], "beartype.beartype")


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Compiled programs of a test module are not kept beyond it: a whole suite's would fill several gigabytes."""
    yield
    jax.clear_caches()
