import importlib.util

import triton_interpreter


def pytest_configure(config):
    """Triton's kernels run on a GPU with `-m gpu`, and otherwise, on Linux, through its interpreter."""
    if config.getoption("-m") != "gpu" and importlib.util.find_spec("triton"):
        triton_interpreter.install()
