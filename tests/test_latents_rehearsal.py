"""The rehearsal of ImageNet's latents, in small."""

import pytest
from latents_rehearsal import rehearse


@pytest.mark.slow
def test_a_rehearsal_with_few_rows(tmp_path):
    found = rehearse(12_000, tmp_path)
    assert found["rows"] == 12_000 and found["memory, at the end"] < found["memory, first tenth"] + 50
