"""What the command line does before it loads torch, for tests that train in this process."""

from mmgen.process import tune

tune()
