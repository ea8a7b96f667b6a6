"""What the folder of a run remembers."""

from trainstack.run.folder import RunFolder


def test_windows_that_are_left_out_add_up_even_if_one_swallows_another(tmp_path):
    run = RunFolder(tmp_path / "runs" / "a")
    run.create()
    run.leave_out(20, 25)
    assert run.left_out() == [{"after": 20, "steps": 5}]
    run.leave_out(40, 44)
    assert run.left_out() == [{"after": 20, "steps": 5}, {"after": 40, "steps": 4}]
    run.leave_out(15, 42)  # back beyond both: steps 16 to 42 had used 27 + 5 + 4 steps of data
    assert run.left_out() == [{"after": 15, "steps": 36}]
