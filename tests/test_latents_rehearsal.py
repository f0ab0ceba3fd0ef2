"""The rehearsal of ImageNet's latents, in small."""

import pytest
from latents_rehearsal import rehearse


@pytest.mark.slow
def test_a_rehearsal_with_few_rows(tmp_path):
    found = rehearse(12_000, tmp_path)
    step, memory = found["a step, ms"], found["memory, MiB"]
    assert len(step) == 11 and max(step) < 3 * min(step)  # rows far into the data take no longer
    assert max(memory) < memory[0] + 50
