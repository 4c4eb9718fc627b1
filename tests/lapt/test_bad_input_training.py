"""What a user can get wrong before a training ends in one `error:` line that says what to do, and changes no file."""

import json
import shutil

import numpy as np
import pytest

from common import checkpoint
from common.cli import UserError
from tests.helpers import run_script
from tests.lapt.stages import STAGES, again, best, earlier, last, of_another_split, trained, words


@pytest.fixture(scope="module")
def runs(prepared):
    return trained(prepared)


def refused(stage, data, runs, logdir, message, *more):
    """The stage ends in a UserError with this message, and no run has begun."""
    with pytest.raises(UserError, match=message):
        again(stage, data, runs, logdir, *more)
    assert not (logdir / stage).exists()


@pytest.mark.parametrize("stage", STAGES)
def test_no_prepared_data(runs, tmp_path, stage):
    refused(stage, tmp_path / "nothing", runs, tmp_path / "out", "is no prepared folder.*preprocessing.py")


@pytest.mark.parametrize(
    ("stage", "name", "message"),
    [
        ("ldm", "vqgan", "no vqgan at .*configs/vqgan.yaml -t.*paths.vqgan=RUN"),
        ("lapt", "ldm", "no ldm at .*configs/ldm.yaml -t.*paths.ldm=RUN"),
        ("ldm3d", "ldm2d", "no ldm at .*paths.ldm2d=RUN"),
        ("lapt3d", "ldm", "no ldm at .*paths.ldm=RUN"),
        ("lapt3d", "guide", "no guide at .*configs/guide.yaml -t.*paths.guide=RUN"),
    ],
)
def test_earlier_stage_is_missing_or_damaged(prepared, runs, tmp_path, stage, name, message):
    refused(stage, prepared, runs, tmp_path / "out", message, f"paths.{name}={tmp_path / 'nowhere'}")
    source = {"ldm2d": "ldm"}.get(name, name)
    source = "ldm3d" if (stage, name) == ("lapt3d", "ldm") else source
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(best(runs, source).read_bytes()[:-5000])
    refused(stage, prepared, runs, tmp_path / "out", "truncated, damaged", f"paths.{name}={broken}")
    wrong = best(runs, "guide" if name != "guide" else "vqgan")
    refused(stage, prepared, runs, tmp_path / "out", "holds a ", f"paths.{name}={wrong}")


def test_stages_that_do_not_fit_together(prepared, runs, tmp_path):
    out = tmp_path / "out"
    flat, deep = runs / "ldm", runs / "ldm3d"
    refused("lapt", prepared, runs, out, "of volumes of 8 slices: lapt needs a run of ldm", f"paths.ldm={deep}")
    refused("lapt3d", prepared, runs, out, "of single slices: lapt3d needs a run of ldm3d", f"paths.ldm={flat}")
    refused("ldm3d", prepared, runs, out, "model of volumes: name a run of ldm", f"paths.ldm2d={deep}")
    refused("lapt3d", prepared, runs, out, "data.size .* multiples of 4, the last the 8 slices", "data.size=[48,48,10]")
    refused("ldm3d", prepared, runs, out, "multiples of 4", "data.size=[46,48,8]")
    other = tmp_path / "guide"
    again("guide", prepared, runs, tmp_path, "data.normalisation=zscore", "--max_steps", 1)
    refused("lapt3d", prepared, runs, out, "images of other intensities .*normalisation", f"paths.guide={other}")


@pytest.mark.parametrize("stage", ["ldm", "lapt3d"])
def test_networks_of_another_split(prepared, runs, tmp_path, stage):
    """Training patients of an earlier stage could be among the test patients here."""
    data = of_another_split(prepared, tmp_path / "data")
    refused(stage, data, runs, tmp_path / "out", "split")  # the statistics belong to the old split
    done = run_script(["lapt/data_split.py", "--data", data, "--keep_lists"])
    assert done.returncode == 0, done.stderr
    refused(stage, data, runs, tmp_path / "out", "earlier stage was trained with split .* train it again")


@pytest.mark.parametrize("stage", ["vqgan", "guide"])
def test_a_patient_in_two_lists(prepared, runs, tmp_path, stage):
    data = shutil.copytree(prepared, tmp_path / "data")
    patients = json.loads((data / "splits/train_list.json").read_text())
    others = json.loads((data / "splits/val_list.json").read_text())
    (data / "splits/val_list.json").write_text(json.dumps([*others, patients[0]]))
    refused(stage, data, runs, tmp_path / "out", "listed twice")


@pytest.mark.parametrize("stage", ["vqgan", "ldm3d"])
def test_a_damaged_case(prepared, runs, tmp_path, stage):
    """A file that is gone, cut off or of another shape ends the training in one line that names the case."""
    for number, spoil in enumerate((
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:500]),
        lambda path: np.save(path, np.zeros((2, 3, 4), np.float32)),
    )):  # fmt: skip
        data = shutil.copytree(prepared, tmp_path / str(number))
        for case in (data / "cases").iterdir():
            spoil(case / "dwi.npy")
        refused(stage, data, runs, tmp_path / "out", "case_.*missing or damaged|case_.*has shape")


@pytest.mark.parametrize("stage", STAGES)
def test_batches_and_intervals_that_no_loop_can_use(prepared, runs, tmp_path, stage):
    out = tmp_path / "out"
    for name in ("batch_size", "accumulate", "log_every", "val_every"):
        refused(stage, prepared, runs, out, f"{name} 0: must be at least 1", f"training.{name}=0")
    refused(stage, prepared, runs, out, "cannot be shared by 1 rank.*multiple of 5", "training.accumulate=5")


def test_sizes_of_networks(prepared, runs, tmp_path):
    out = tmp_path / "out"
    refused("vqgan", prepared, runs, out, "no multiple of its 4 norm groups; change model", "model.channels=6")
    refused("vqgan", prepared, runs, out, "too small for a discriminator of model.disc_layers 6", "model.disc_layers=6")
    refused("vqgan", prepared, runs, out, "needs .*paths.perceptual_weights", "loss.perceptual_weight=1")
    refused("ldm", prepared, runs, out, "no multiple of 32.*section model", "model.model_channels=20")
    refused("ldm", prepared, runs, out, "cannot be split into heads of 5", "model.head_channels=5")
    refused("guide", prepared, runs, out, "norm groups; change model", "model.norm_groups=3")


def test_weights_of_somebody_else_are_not_replaced(prepared, runs, tmp_path):
    best(tmp_path, "vqgan").parent.mkdir(parents=True)
    shutil.copy(best(runs, "vqgan"), best(tmp_path, "vqgan"))
    before = best(tmp_path, "vqgan").read_bytes()
    with pytest.raises(UserError, match="best.ckpt was not made by a run that can continue.*--restart"):
        again("vqgan", prepared, runs, tmp_path)
    assert best(tmp_path, "vqgan").read_bytes() == before


def test_a_partial_write_never_replaces_the_last_good_checkpoint(prepared, runs, tmp_path):
    """Fact 16: a half-written temporary file is ignored and overwritten; a cut off last.ckpt is named."""
    again("guide", prepared, runs, tmp_path, "--max_steps", 1)
    good = last(tmp_path, "guide").read_bytes()
    last(tmp_path, "guide").with_name(".last.ckpt.tmp").write_bytes(good[:1000])
    again("guide", prepared, runs, tmp_path, "--max_steps", 2)
    assert checkpoint.load(last(tmp_path, "guide"))["step"] == 2
    last(tmp_path, "guide").write_bytes(good[:1000])
    with pytest.raises(UserError, match="last.ckpt is truncated, damaged"):
        again("guide", prepared, runs, tmp_path)


def test_a_user_sees_one_line_and_status_2(prepared, tmp_path):
    done = run_script(["lapt/main.py", *words("ldm", prepared, tmp_path), *earlier(tmp_path, "ldm")], cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: no vqgan at") and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
