"""What lasts long is announced with how long it took before."""

from trainstack.run.folder import RunFolder
from trainstack.units import time_of


def test_the_last_of_several_times_is_told_and_none_that_did_not_end(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.create()
    assert run.last_time("attempt", "start") == ""
    moments = [("attempt", 0), ("start", 40), ("loaded", 50), ("attempt", 100), ("start", 109),
               ("attempt", 200), ("failed", 230)]  # fmt: skip
    for event, at in moments:
        monkeypatch.setattr("trainstack.run.folder.now", lambda at=at: time_of(1e9 + at))
        run.add_event(event)
    assert run.last_time("attempt", "start") == " (9 s last time)"
    assert run.last_time("start", "loaded") == " (10 s last time)"
    assert run.last_time("loaded", "training") == ""
