"""Nothing of the paper is in here: a pipeline, files, flags, reports, processes.

Imported first by every command. Torch's OpenMP threads spin while they wait for each other.
Beside other busy programs a call then takes many times as long. So they are told to spin shortly
and then to sleep: to sleep at once costs a seventh on idle cores (docs/cost.md). A value that you
have set wins. It must be there before torch is imported.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:  # GOMP_SPINCOUNT: of GCC's OpenMP, in torch for Linux
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"} | os.environ
os.environ.setdefault("MPLBACKEND", "Agg")  # pictures go to files, never to a window
