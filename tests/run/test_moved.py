"""A run stands on its own feet: what it was started from and with may be gone."""

import shutil
import subprocess

import pytest
import transformers

import tiny
from lab import Lab


@pytest.fixture
def start(tmp_path):
    """A folder of somebody's with a model and texts, from which a run is to start."""
    folder = tmp_path / "mine"
    model = tiny.make_model(tmp_path / "elsewhere")
    shutil.copytree(model, folder / "model", ignore=shutil.ignore_patterns("manifest.json"))
    config = transformers.AutoConfig.from_pretrained(folder / "model")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    for number in range(120):
        text = f"The text of number {number} says {number * 7919 % 1000} and nothing else. " * 6
        (folder / "texts" / f"{number}.txt").write_text(text)
    return folder


def test_a_paused_run_goes_to_the_same_end_without_its_start_and_its_checkout(
    home, tmp_path, start
):
    lab = Lab(home, tmp_path / "shared", train__max_steps=24)
    mine = [f"model.name={start}/model", f"data.name={start}/texts", "model.init=pretrained"]
    command = ["bash", lab.checkout / "download_data_model.sh", *mine]
    subprocess.run(command, env=lab.environment(), check=True, capture_output=True)
    reference = lab.train("whole", *mine)
    lab.train("moved", *mine, fault="term:rank=0,step=13", code=75)

    start.rename(tmp_path / "gone")
    lab.checkout.rename(tmp_path / "old checkout")
    code = lab.home / "runs" / "moved" / "code"
    resume = ["bash", code / "submit.sh", "--local", "--resume", "moved"]
    done = subprocess.run(resume, env=lab.environment(), capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is gone; not needed: the run has a checkpoint") == 2
    moved = lab.trace("moved")
    assert moved.equals(reference)
    moved.ledger()
    newest = [max(trace.run.checkpoints.glob("checkpoint-*")) for trace in (reference, moved)]
    for path in newest[0].glob("*"):
        if path.is_file() and path.name != "manifest.json":
            assert (newest[1] / path.name).read_bytes() == path.read_bytes(), path.name
