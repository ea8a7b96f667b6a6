"""The fake site, and a job on it."""

import pytest
from fake_site import SECRET, Job, Site, end_group


@pytest.fixture
def site(tmp_path, home):
    """Whatever a test does: nothing in a name was run, and no secret stands in any file."""
    site = Site(tmp_path, home)
    yield site
    assert not list(tmp_path.rglob("canary"))
    for path in tmp_path.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.suffix != ".environment":
            assert SECRET.encode() not in path.read_bytes(), path


@pytest.fixture
def job(tmp_path, home):
    job = Job(tmp_path, home)
    yield job
    end_group(job.process)
    assert not list(tmp_path.rglob("canary"))
