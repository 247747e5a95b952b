"""These tests are collected where `make test-fake-gpu` runs them: in its environment, behind the driver of driver.c."""

import os

collect_ignore_glob = [] if "libcuda.so.1" in os.environ.get("LD_PRELOAD", "") else ["test_*.py"]
