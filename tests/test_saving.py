"""Checkpoints written beside training: the state as it was, one copy of it, and none that is not finite."""

import math
import threading

import pytest
import torch

from aquila_sft import checkpoint
from aquila_sft.errors import UserError
from aquila_sft.saving import Saver

STEP = 60  # seconds after which a thread that should have moved is given up


def state() -> dict:
    weight = torch.arange(6.0)
    return {"model": {"head": weight, "tied": weight}, "optimizer": {"state": [{"step": torch.tensor(3.0)}], "lr": 0.1}}


class Fill:
    """Writes model/head; each call waits until it is let go, and keeps what it was given."""

    def __init__(self) -> None:
        self.begun, self.go, self.given = threading.Event(), threading.Event(), []

    def __call__(self, folder, copy) -> None:
        self.given.append(copy)
        self.begun.set()
        assert self.go.wait(STEP)
        (folder / "head").write_text(str(copy["model"]["head"].tolist()))


def test_training_goes_on_while_the_state_as_it_was_is_written(tmp_path):
    fill, trained = Fill(), state()
    with Saver(tmp_path, None) as saver:
        saver.save(1, trained, fill)
        assert fill.begun.wait(STEP) and not list(tmp_path.glob("step-*"))  # save() is back, the write has not ended
        trained["model"]["head"] += 100  # the next update
        fill.go.set()
        saver.finish()
        assert (tmp_path / "step-000001/head").read_text() == str(list(map(float, range(6))))
        assert checkpoint.problem(tmp_path / "step-000001") is None


def test_a_save_waits_for_the_one_before_and_there_is_one_copy_of_the_state(tmp_path):
    fill, trained, saved = Fill(), state(), threading.Event()
    with Saver(tmp_path, None) as saver:
        saver.save(1, trained, fill)
        assert fill.begun.wait(STEP)
        second = threading.Thread(target=lambda: (saver.save(2, trained, fill), saved.set()))
        second.start()
        assert not saved.wait(0.1) and len(fill.given) == 1
        fill.go.set()
        assert saved.wait(STEP)
        second.join()
        saver.wait()
        assert [path.name for path in checkpoint.all_of(tmp_path)] == ["step-000001", "step-000002"]
        places = [
            [t.data_ptr() for t in (*copy["model"].values(), copy["optimizer"]["state"][0]["step"])]
            for copy in fill.given
        ]
        assert places[0] == places[1] and len(set(places[0])) == 2  # tied tensors are one
        assert sum(buffer.nbytes for buffer in saver.buffers.values()) == 6 * 4 + 4


def test_the_last_state_is_written_without_a_copy_of_what_is_in_host_memory(tmp_path):
    (fill := Fill()).go.set()
    trained = state()
    with Saver(tmp_path, None) as saver:
        saver.save(1, trained, fill, last=True)
        saver.finish()
    assert fill.given[0]["model"]["head"].data_ptr() == trained["model"]["head"].data_ptr() and not saver.buffers
    assert (tmp_path / "step-000001/head").read_text() == str(list(map(float, range(6))))
    assert checkpoint.problem(tmp_path / "step-000001") is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["head", "step"])
def test_a_state_that_is_not_finite_is_no_checkpoint_and_the_ones_before_stay(tmp_path, value, where):
    (fill := Fill()).go.set()
    trained = state()
    with Saver(tmp_path, 1) as saver:
        saver.save(1, trained, fill)
        of = {"head": trained["model"]["head"], "step": trained["optimizer"]["state"][0]["step"]}[where]
        of.view(-1)[-1] = value
        saver.save(2, trained, fill)
        with pytest.raises(UserError, match=f"{where} is not finite at step 2: this checkpoint is not written"):
            saver.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"] and len(fill.given) == 1


def test_what_goes_wrong_in_the_thread_is_raised_by_the_next_save(tmp_path):
    def full(folder, copy):
        raise OSError(28, "No space left on device")

    saver = Saver(tmp_path, None)
    saver.save(1, state(), full)
    with pytest.raises(UserError, match="No space left on device; nothing that was saved is lost"):
        saver.save(2, state(), full)
    assert not list(tmp_path.iterdir())
