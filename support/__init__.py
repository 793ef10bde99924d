"""Nothing of the paper is in here: a pipeline, files, flags, reports, processes.

Imported first by every command. Torch's OpenMP threads spin while they wait, and beside one
other busy program that makes a round about ten times slower. So they are told to sleep; a
value that you have set wins. It must be there before torch is imported.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "Agg")  # pictures go to files, never to a window
