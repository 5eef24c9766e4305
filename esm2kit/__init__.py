"""Train, use and judge ESM-2 protein language models."""

import os

# OpenMP's threads spin while they wait for each other. On a machine that is busy otherwise that cost training eight
# tenths of its speed and more; waiting asleep cost nothing that could be measured. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
