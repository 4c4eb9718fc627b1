"""Directions and edits: doses in known units, exactness at 0, files, and the counterfactual report."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.cli import UserError
from ldae import manipulation, probes
from ldae.manipulation import Direction, Edit, counterfactual_report
from tests.ldae.test_probes import PLAIN, diagnosis, make_codes, quiet


def close(a, b, atol=1e-4):
    return torch.allclose(a, torch.as_tensor(b, dtype=a.dtype), atol=atol)


@pytest.fixture(scope="module")
def codes():
    return make_codes(200, dim=12, effect=1.5)


@pytest.fixture(scope="module")
def fitted(codes):
    """{name: Direction} of diagnosis and age."""
    found = {}
    for task in (diagnosis(codes), probes.make_task(codes, "age"), probes.make_task(codes, "sex")):
        found |= probes.directions(probes.run(task, {}, replace(PLAIN, bootstrap=10), log=quiet))
    return found


@pytest.fixture(scope="module")
def probe(fitted):
    return fitted["diagnosis_AD_vs_CN"]


@pytest.fixture
def y(codes):
    return torch.from_numpy(codes.values[:5])


# ---- reading


def test_direction_reads_as_the_probe_does(codes, fitted):
    """The direction's probabilities are those of the final fit, to float32."""
    task = diagnosis(codes)
    result = probes.run(task, {}, replace(PLAIN, bootstrap=10), log=quiet)
    y = torch.from_numpy(task.codes.values)
    logits = fitted["diagnosis_AD_vs_CN"].logit(y).numpy()
    assert np.allclose(logits, result.final.scores(task.codes.values)[:, 0], atol=1e-5)
    p = fitted["diagnosis_AD_vs_CN"].probability(y).numpy()
    assert np.allclose(p, probes.probabilities(task, logits[:, None])[:, 0], atol=1e-6)
    assert p[task.y == 0].mean() > 0.6 > 0.4 > p[task.y == 1].mean()  # AD is positive
    years = fitted["age"].predict(y)
    assert torch.equal(years, fitted["age"].score(y)) and 40 < years.min() and years.max() < 110


def test_nuisance_is_taken_out_of_the_score(codes):
    task = diagnosis(codes, nuisance=("age", "sex"))
    result = probes.run(task, {}, replace(PLAIN, bootstrap=10), log=quiet)
    direction = probes.directions(result)["diagnosis_AD_vs_CN_without_age_sex"]
    assert direction.nuisance == ("age", "sex=M") and direction.name == "diagnosis_AD_vs_CN_without_age_sex"
    y, nuisance = torch.from_numpy(task.codes.values), torch.from_numpy(task.nuisance)
    found = direction.logit(y, nuisance).numpy()
    assert np.allclose(found, result.final.scores(task.codes.values, task.nuisance)[:, 0], atol=1e-4)
    at_mean = torch.tensor([direction.nuisance_mean]).expand(len(y), -1)
    assert torch.allclose(direction.logit(y), direction.logit(y, at_mean), atol=1e-5)


def test_age_has_no_logit(fitted, y):
    with pytest.raises(UserError, match="predicts years and has no log-odds; use years or sd"):
        fitted["age"].probability(y)


# ---- editing


def test_an_edit_of_zero_is_none_and_doses_are_monotonic(fitted, y):
    """Fact 20: amount 0 returns the code bit for bit; over five rising doses the probability rises."""
    for direction in fitted.values():
        for unit in (direction.unit, "sd", "upstream"):
            assert torch.equal(direction.edit(y, 0.0, unit), y)
            doses = torch.stack([direction.predict(direction.edit(y, 0.02 * a, unit)) for a in (-2, -1, 0, 1, 2)])
            assert (doses.diff(dim=0) > 0).all(), (direction.name, unit)


def test_units(codes, fitted, probe, y):
    for direction in (probe, fitted["diagnosis_AD_vs_CN_means"]):
        assert close(direction.logit(direction.edit(y, 1.5)) - direction.logit(y), 1.5)
    age = fitted["age"]
    assert age.unit == "years" and close(age.predict(age.edit(y, -4)) - age.predict(y), -4.0)
    training = torch.from_numpy(codes.select(codes.column("split") != "test").values)
    for direction in fitted.values():
        u = direction.path / direction.path.norm()
        spread = (direction.normalise(training) @ u).std(correction=0)
        moved = (direction.normalise(direction.edit(y, 1.0, "sd")) - direction.normalise(y)) @ u
        assert torch.allclose(moved, spread, rtol=1e-3)
        far = direction.normalise(direction.edit(y, 1.0, "upstream")) - direction.normalise(y)
        assert torch.allclose(far.norm(dim=1), torch.tensor(math.sqrt(12)), rtol=1e-4)
        assert np.isclose(direction.convert(direction.convert(2.0, "sd", "upstream"), "upstream", "sd"), 2.0)
    each = probe.edit(y, torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0]))
    assert close(probe.logit(each) - probe.logit(y), [0.0, 1.0, 2.0, 3.0, -1.0])


def test_original_rule():
    """The golden rule: y' = denormalise(normalise(y) + a sqrt(n) w / |w|), and its 2.5 is far outside the data."""
    g = torch.Generator().manual_seed(0)
    y, mean, w = torch.randn(2, 24, generator=g), torch.randn(24, generator=g), torch.randn(24, generator=g)
    std = 0.5 + torch.randn(24, generator=g).abs()
    direction = Direction(mean, std, w, 0.0, "CN", "AD")
    for a in (0.3, -0.1, 0.0):
        expected = ((y - mean) / std + a * 24**0.5 * w / w.norm()) * std + mean
        assert torch.allclose(direction.edit(y, a, "upstream"), expected, atol=1e-5)
    assert torch.allclose(direction.denormalise(direction.normalise(y)), y, atol=1e-6)
    weight = torch.zeros(768)
    weight[0] = 4.232  # as long as the shipped probe's
    shipped = Direction(torch.zeros(768), torch.ones(768), weight, 0.893, "CN", "AD")
    assert np.isclose(shipped.convert(2.5, "upstream", "logit"), 293, atol=0.5)
    assert np.isclose(shipped.convert(4.0, "logit", "upstream"), 0.034, atol=0.001)


def test_stop_at_a_probability(probe, y):
    p = probe.probability(y)
    for target in (0.05, 0.5, 0.9):
        assert close(probe.probability(probe.edit(y, probe.amount_for(y, target))), target)
        up = probe.probability(probe.edit(y, 50.0, stop=target))
        assert close(up, p.clamp_min(target))  # those beyond it stay as they are
        down = probe.probability(probe.edit(y, -50.0, "sd", stop=target))
        assert close(down, p.clamp_max(target))
    short = probe.edit(y, 0.01, stop=0.999)
    assert torch.allclose(short, probe.edit(y, 0.01), atol=1e-6)
    with pytest.raises(UserError, match="target probability 1.0: give one between 0 and 1"):
        probe.amount_for(y, 1.0)


def test_stop_at_an_age(fitted, y):
    age = fitted["age"]
    assert close(age.predict(age.edit(y, age.amount_for(y, 70.0))), 70.0, atol=1e-3)


def test_units_that_do_not_fit(fitted, probe, y):
    with pytest.raises(UserError, match="unit 'years' does not fit the direction diagnosis_AD_vs_CN: use logit, sd"):
        probe.edit(y, 1.0, "years")
    with pytest.raises(UserError, match="unit 'logit' does not fit the direction age: use years, sd or upstream"):
        fitted["age"].edit(y, 1.0, "logit")


def test_without_nuisance_directions(fitted, probe, y):
    """An edit orthogonal to age and sex leaves both predictions where they are and still has the asked dose."""
    age, sex = fitted["age"], fitted["sex_F_vs_M"]
    plain, clean = probe.edit(y, 3.0), probe.without(age, sex).edit(y, 3.0)
    assert close(probe.logit(clean) - probe.logit(y), 3.0, atol=1e-3)
    for other in (age, sex):
        assert torch.allclose(other.score(clean), other.score(y), atol=1e-3)
        assert (other.score(plain) - other.score(y)).abs().max() > 0.01
    assert probe.without(age).name == "diagnosis_AD_vs_CN_orthogonal_to_age"
    # codes of another normalisation: the gradient in code space counts, not the normalised weight
    factor = torch.linspace(1, 3, 12)
    scaled = replace(age, std=age.std * factor, weight=age.weight * factor)
    assert torch.allclose(probe.without(scaled).path, probe.without(age).path, atol=1e-6)
    with pytest.raises(UserError, match="is the same as diagnosis_AD_vs_CN: nothing is left"):
        probe.without(probe)


def test_class_means(codes, fitted, probe):
    """The second direction goes from class mean to class mean and reads as the first."""
    means, part = fitted["diagnosis_AD_vs_CN_means"], codes.select(codes.column("split") != "test")
    x = probe.normalise(torch.from_numpy(part.values))
    sick = torch.tensor([row.diagnosis == "AD" for row in part.rows])
    difference = x[sick].mean(0) - x[~sick].mean(0)
    cosine = torch.nn.functional.cosine_similarity(means.path, difference, dim=0)
    assert cosine > 0.9999 and torch.equal(means.weight, probe.weight) and means.name == "diagnosis_AD_vs_CN_means"
    assert torch.nn.functional.cosine_similarity(means.path, probe.path, dim=0) < 0.999


def test_how_far_an_edit_goes(codes, probe):
    y = torch.from_numpy(codes.values[:160])
    assert abs(probe.typicality(y).square().mean() - 1) < 0.1
    assert (probe.typicality(probe.edit(y[:5], 2.5, "upstream")) > 2).all()
    assert probe.identity_distance(y, probe.edit(y, 3.0)).max() < 1e-5  # only along the path
    others = probe.identity_distance(y, y.roll(1, 0))
    assert 0.7 < others.square().mean().sqrt() < 1.2 and torch.equal(probe.identity_distance(y, y), torch.zeros(160))


# ---- files


def test_files(fitted, tmp_path, y):
    for name, direction in fitted.items():
        direction.save(tmp_path / name)
        for given in (name, f"{name}.npz", f"{name}.json"):
            again = Direction.load(tmp_path / given)
            assert again.name == direction.name and again.codes == "c" * 16 and again.encoder == "e" * 16
            assert torch.equal(again.edit(y, 1.0, "sd"), direction.edit(y, 1.0, "sd"))
            assert torch.equal(again.score(y), direction.score(y))
        with np.load(tmp_path / f"{name}.npz", allow_pickle=False) as arrays:
            assert {"mean", "std", "weight", "path", "correlation", "head"} == set(arrays)
    again.check_encoder("e" * 16)
    with pytest.raises(UserError, match="is of codes of eeeeeeeeeeeeeeee, this model is ffff"):
        again.check_encoder("ffff")
    with pytest.raises(UserError, match="no direction .*nothing.npz; write it with `python ldae/scripts/train_manip"):
        Direction.load(tmp_path / "nothing")
    (tmp_path / "bad.npz").write_bytes((tmp_path / "age.npz").read_bytes()[:500])
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name in ("bad", "other"):
        with pytest.raises(UserError, match="is damaged or no direction"):
            Direction.load(tmp_path / name)


def test_probe_of_the_original(tmp_path):
    torch.save({"weight": torch.randn(1, 8), "bias": torch.tensor([0.9])}, tmp_path / "w.ckpt")
    torch.save(torch.randn(8), tmp_path / "mean.pt")
    torch.save(torch.rand(8) + 0.5, tmp_path / "std.pt")
    files = [tmp_path / name for name in ("w.ckpt", "mean.pt", "std.pt")]
    direction = manipulation.from_original(*files)
    assert direction.positive == "CN" and direction.encoder is None and math.isclose(direction.bias, 0.9, abs_tol=1e-6)
    direction.check_encoder("anything")
    y = torch.zeros(1, 8)
    assert direction.probability(direction.edit(y, 2.0)) > direction.probability(y)
    assert direction.convert(1.0, "sd", "upstream") == 1 / math.sqrt(8)  # no correlations: unit variance everywhere
    torch.save(torch.randn(7), tmp_path / "short.pt")
    with pytest.raises(UserError, match="weight, mean and SD have 8, 7 and 8 entries"):
        manipulation.from_original(files[0], tmp_path / "short.pt", files[2])
    with pytest.raises(UserError, match="is no linear probe"):
        manipulation.from_original(files[1], files[1], files[2])
    with pytest.raises(UserError, match="no file .*gone.pt"):
        manipulation.from_original(tmp_path / "gone.pt", files[1], files[2])


# ---- counterfactual report


def head(ventricle, shift=0.0):
    """A brain of 24 x 28 x 24 voxels of 6 mm with a dark middle of that radius (voxels); a patch outside by `shift`."""
    d, h, w = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in (24, 28, 24)), indexing="ij")
    radius = np.sqrt(d**2 + (h / 1.2) ** 2 + w**2)
    volume = 0.9 / (1 + np.exp(4 * (radius - 10)))
    volume *= 1 - 0.85 / (1 + np.exp(4 * (np.sqrt(d**2 + h**2 + (w - 1) ** 2) - ventricle)))
    volume[:2, :2, :2] += shift
    return volume.astype(np.float32)


AFFINE = np.diag([6.0, 6.0, 6.0, 1.0])


def report(tmp_path, probe, y, edits, **options):
    return counterfactual_report(tmp_path / "out" / "sub-1", direction=probe, y=y[0], original=head(3.0), edits=edits,
                                 affine=AFFINE, **options)  # fmt: skip


def test_report_of_a_larger_ventricle(tmp_path, probe, y):
    grown = probe.edit(y[:1], 3.0)[0]
    labels = (head(3.0) < 0.45).astype(np.int32) * (head(0.01) > 0.6) * 7
    edits = [Edit(3.0, grown, head(4.2), reencoded=grown + 0.1), Edit(-3.0, probe.edit(y[:1], -3.0)[0], head(2.0))]
    found = report(tmp_path, probe, y, edits, labels=labels, names={"ventricles": 7, "absent": 9}, scan="sub-1")
    before, larger, smaller = found["original"], *found["edits"]
    assert smaller["ventricle_ml"] < before["ventricle_ml"] < larger["ventricle_ml"]
    regions = [entry["regions_ml"]["ventricles"] for entry in (smaller, before, larger)]
    assert regions == sorted(regions) and list(before["regions_ml"]) == ["ventricles"]
    assert np.isclose(before["regions_ml"]["ventricles"], 4 / 3 * np.pi * 3**3 * 0.216, rtol=0.2)  # ml of a ball
    assert smaller["prediction"] < before["prediction"] < larger["prediction"]
    assert np.isclose(math.log(larger["prediction"] / (1 - larger["prediction"])),
                      math.log(before["prediction"] / (1 - before["prediction"])) + 3, atol=1e-3)  # fmt: skip
    assert larger["share_outside"] < 1e-3 and larger["l1_outside"] < 1e-4 < larger["l1_brain"]
    assert larger["identity_distance"] > 0 and "identity_distance" not in smaller
    assert found["unit"] == "logit" and found["scan"] == "sub-1" and found["positive"] == "AD"
    assert found["prediction_is"] == "probability of AD"
    assert json.loads((tmp_path / "out" / "sub-1.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "out" / "sub-1.png").read_bytes()[:4] == b"\x89PNG"


def test_report_sees_a_change_outside_the_brain(tmp_path, probe, y):
    found = report(tmp_path, probe, y, [Edit(1.0, probe.edit(y[:1], 1.0)[0], head(3.0, shift=0.5))])["edits"][0]
    assert found["share_outside"] == 1 and found["l1_brain"] == 0 and np.isclose(found["largest"], 0.5)
    assert np.isclose(found["l1"], 8 * 0.5 / (24 * 28 * 24)) and found["regions_ml"] == {}
    nothing = report(tmp_path, probe, y, [Edit(0.0, y[0], head(3.0))])
    assert nothing["edits"][0]["l1"] == 0 and nothing["edits"][0]["share_outside"] is None
    assert nothing["edits"][0]["ventricle_ml"] == nothing["original"]["ventricle_ml"]


def test_report_of_age(tmp_path, fitted, y):
    age = fitted["age"]
    found = report(tmp_path, age, y, [Edit(10.0, age.edit(y[:1], 10.0)[0], head(3.5))])
    assert found["prediction_is"] == "years" and found["unit"] == "years"
    assert np.isclose(found["edits"][0]["prediction"] - found["original"]["prediction"], 10, atol=1e-3)


def test_region_without_contrast_has_no_volume():
    flat = np.full((8, 8, 8), 0.5, np.float32)
    mask = np.zeros((8, 8, 8), bool)
    mask[3:5, 3:5, 3:5] = True
    assert manipulation.region_ml(flat, flat, mask, 1.0) is None
    bright = flat + 0.4 * mask
    assert np.isclose(manipulation.region_ml(bright, bright, mask, 1.0), 8.0)
    assert manipulation.region_ml(bright, bright, np.ones((8, 8, 8), bool), 1.0) is None
