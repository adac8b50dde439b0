"""Settings of all tests, made before torch is imported."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order, and two ranks fit on two cores
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit for bit is a promise for the CPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask a hub
