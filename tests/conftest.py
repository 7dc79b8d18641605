import importlib.util
import sys

import pytest
import triton_interpreter


def pytest_configure(config):
    """Triton's kernels run on a GPU with `-m gpu`, and otherwise, on Linux, through its interpreter."""
    if config.getoption("-m") != "gpu" and importlib.util.find_spec("triton"):
        triton_interpreter.install()


@pytest.fixture(autouse=True, scope="module")
def accelerate_begins_anew():
    """Accelerate keeps device and precision in the process: a file of tests gets none of the one before it."""
    yield
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
