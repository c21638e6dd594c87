"""What several rooms share."""
import pytest

from convnext_mm.utils import is_first_process


@pytest.mark.parametrize(('variables', 'first'), [
    ({}, True), ({'RANK': '0'}, True), ({'RANK': '3'}, False), ({'SLURM_PROCID': '0'}, True),
    ({'SLURM_PROCID': '1'}, False), ({'OMPI_COMM_WORLD_RANK': '2'}, False),
    ({'SLURM_PROCID': '1', 'RANK': '0'}, True)])
def test_the_first_process_is_known_before_the_group_is_there(variables, first, monkeypatch):
    for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() == first
