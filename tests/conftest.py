"""Settings of all tests, made before torch is imported."""

import os

# a waiting OpenMP thread that spins takes a core from the process it waits for
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask a hub
