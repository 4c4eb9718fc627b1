"""The inverse optimisation with a prior whose codes are known in closed form, and with a small real one."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from common import checkpoint, runtime
from common.cli import UserError
from mgdcr import baselines, geometry, inverse, objective
from mgdcr.inverse import Codes, Diverged, Files, Frame, Settings
from mgdcr.LAX_condition import ex8_multi_optimizer
from mgdcr.model import DiffAE
from mgdcr.objective import LEGACY, Objective, View
from tests.helpers import assert_same_tensors, kill_and_resume, reached, run_script, two_ranks
from tests.mgdcr.test_objective import case, view_at

FACTOR, SHAPE = 4, (12, 11)
SCRIPT = "mgdcr/LAX_condition/ex8_multi_optimizer.py"


class Analytic:
    """decode(x, z) = (tanh(x / 2 + mean(z) / 5) + 1) / 2, as in the reference cases; encode inverts it with z = 0."""

    def __init__(self, settings):
        self.settings, self.rt = settings, runtime.Runtime(torch.device("cpu"))

    def encode(self, images):
        x = 2 * torch.atanh((2 * images[:, None] - 1).clamp(-0.999, 0.999))
        return x, torch.zeros(len(x), 3)

    def decode(self, x, z):
        parts = zip(x.split(self.settings.chunk), z.split(self.settings.chunk), strict=True)
        return torch.cat([(torch.tanh(0.5 * a[:, 0] + 0.2 * b.mean(1)[:, None, None]) + 1) / 2 for a, b in parts])


def heart(depth=3):
    """A dense volume (N, H, W) in [0.2, 0.8] that gets lighter and darker between the acquired slices, as a whole."""
    z = np.linspace(0, depth - 1, FACTOR * (depth - 1) + 1)[:, None, None]
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return (0.5 + 0.1 * np.sin(2 * np.pi * z) + 0.2 * np.cos(rows / 3) + 0 * columns).astype(np.float32)


def frame_with(n_views=1, depth=3):
    truth = heart(depth)
    views = []
    for column in (5.0, 2.0)[:n_views]:
        sampler, _ = view_at(SHAPE[0], depth, column, FACTOR)
        views.append(View(f"v{column:g}", sampler, sampler.sample(torch.from_numpy(truth)), torch.ones(len(sampler))))
    return Frame(truth[::FACTOR].copy(), FACTOR, (1.0, 1.0), views), truth


QUICK = Settings(steps=3, iterations=12, lr=0.05, chunk=4, save_every=5, patience=0)


def run(settings=QUICK, goal=None, n_views=1, **more):
    frame, truth = frame_with(n_views)
    return inverse.reconstruct(Analytic(settings), frame, goal or Objective(), settings, **more), truth


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = DiffAE(image_size=16, model_channels=8, channel_mult=(1, 2), enc_channel_mult=(1, 2), num_res_blocks=1,
                   enc_num_res_blocks=1, attention_resolutions=(), num_heads=1, embed_channels=8, enc_out_channels=8,
                   resblock_updown=True, dropout=0.0).eval()  # fmt: skip
    for parameter in model.parameters():  # zero-initialised layers would hide gradients
        parameter.data.add_(0.05 * torch.randn_like(parameter)).requires_grad_(False)
    return model


def small_problem(network, settings):
    generator = torch.Generator().manual_seed(1)
    sax = torch.rand(2, 16, 16, generator=generator).numpy()
    return inverse.Problem(inverse.Prior(network, settings), Frame(sax, FACTOR, (1.0, 1.0)), Objective(), settings)


class TestPrior:
    @pytest.mark.parametrize("optimise", ["both", "z"])
    def test_a6_checkpointed_gradients_equal_plain_ones(self, network, optimise):
        from mgdcr import diffusion

        x, z = torch.randn(2, 1, 16, 16), torch.randn(2, 8)
        gradients = []
        for checkpointing in (True, False):
            a, b = x.clone().requires_grad_(optimise == "both"), z.clone().requires_grad_()
            image = diffusion.decode(network, a, b, 4, "soft", checkpointing=checkpointing)
            leaves = [leaf for leaf in (a, b) if leaf.requires_grad]
            gradients.append(torch.autograd.grad(image.square().sum(), leaves))
        for ours, plain in zip(*gradients, strict=True):
            assert plain.abs().max() > 0
            assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max().clamp_min(1)

    def test_a7_chunks_do_not_change_the_result(self, network):
        finals = []
        for chunk in (2, 100):
            settings = Settings(steps=3, iterations=3, chunk=chunk, patience=0)
            problem = small_problem(network, settings)
            optimiser = inverse.optimise(problem, problem.seeds)
            finals.append(problem.images(optimiser.x, optimiser.z).detach())
            assert not torch.equal(optimiser.x, problem.seeds.x)
        assert (finals[0] - finals[1]).abs().max() <= 1e-4

    def test_a30_activations_follow_the_chunk(self, network):
        """A30: the largest number of images in the network at once, forwards and while recomputing, is the chunk."""
        plain = network.denoise
        for chunk in (1, 3):
            seen = []

            def counting(x, t, z, seen=seen):
                seen.append(len(x))
                return plain(x, t, z)

            network.denoise = counting
            try:
                problem = small_problem(network, Settings(steps=2, iterations=1, chunk=chunk))
                inverse.optimise(problem, problem.seeds)
            finally:
                del network.denoise
            # steps x slices: in, the acquired ones out once, the free ones out and again in the backward pass
            assert max(seen) <= chunk and sum(seen) == 2 * 2 + 2 * 2 + 2 * (2 * 3)

    def test_truncated_gradient_reaches_z_alone(self, network):
        settings = Settings(steps=4, grad_steps=2, optimise="z", iterations=2, patience=0)
        problem = small_problem(network, settings)
        optimiser = inverse.optimise(problem, problem.seeds)
        assert torch.equal(optimiser.x, problem.seeds.x) and not torch.equal(optimiser.z, problem.seeds.z)
        with pytest.raises(UserError, match="optimise z"):
            Settings(grad_steps=2)

    def test_stride_decodes_fewer_slices_and_holds_the_acquired(self, network):
        settings = Settings(steps=2, iterations=2, stride=2, optimise="z", chunk=100, patience=0)
        problem = small_problem(network, settings)
        assert len(problem.seeds.z) == 3 and problem.free.tolist() == [False, True, False]
        optimiser = inverse.optimise(problem, problem.seeds)
        moved = (optimiser.z != problem.seeds.z).any(1)
        assert moved.tolist() == [False, True, False]
        volume = problem.images(optimiser.x, optimiser.z).detach()
        assert volume.shape == (5, 16, 16)
        torch.testing.assert_close(volume[::4], problem.data.sax)  # consistent
        torch.testing.assert_close(volume[1], (volume[0] + volume[2]) / 2)
        assert [inverse.stride_within(*pair) for pair in ((8, 4), (8, 8), (6, 4), (4, 4), (2, 4), (1, 4), (8, 1))] == [
            4, 4, 3, 2, 1, 1, 1]  # fmt: skip

    def test_a_network_that_learnt_nothing_adds_nothing(self):
        """With the noise that all slices share, what a prior adds comes from its codes alone."""
        torch.manual_seed(0)
        untrained = DiffAE(image_size=16, model_channels=8, channel_mult=(1, 2), enc_channel_mult=(1, 2), num_heads=1,
                           num_res_blocks=1, enc_num_res_blocks=1, attention_resolutions=(), embed_channels=8,
                           enc_out_channels=8, resblock_updown=True, dropout=0.0)  # fmt: skip
        untrained.eval().requires_grad_(False)
        settings = Settings(steps=3, iterations=3, optimise="z", noise="shared", base="linear", patience=0)
        sax = np.random.default_rng(0).random((3, 16, 16)).astype(np.float32)
        result = inverse.reconstruct(
            inverse.Prior(untrained, settings), Frame(sax, 4, (1.0, 1.0)), Objective(), settings
        )
        np.testing.assert_allclose(result.decoded, baselines.interpolate(sax, 4, "linear"), atol=1e-5)
        np.testing.assert_allclose(result.volume, baselines.interpolate(sax, 4, "linear"), atol=1e-5)
        assert torch.equal(inverse.white_noise((1, 16, 16)), inverse.white_noise((1, 16, 16)))

    def test_unconditional_prior_has_no_code(self):
        from mgdcr.model import UncondUNet

        model = UncondUNet(image_size=16, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_heads=1,
                           attention_resolutions=(), embed_channels=16, resblock_updown=True, dropout=0.0)  # fmt: skip
        prior = inverse.UnconditionalPrior(model.eval(), Settings(steps=2))
        frame = Frame(torch.rand(2, 16, 16).numpy(), 4, (1.0, 1.0))
        volume = baselines.prior_interpolation(prior, frame)
        assert volume.shape == (5, 16, 16) and np.isfinite(volume).all()
        larger = Frame(np.random.default_rng(0).random((2, 20, 18)), 4, (1.0, 1.0),
                       window=inverse.Window.middle((20, 18), 16))  # fmt: skip
        around, linear = baselines.prior_interpolation(prior, larger), baselines.interpolate(larger.sax, 4, "linear")
        np.testing.assert_allclose(around[:, :2], linear[:, :2], atol=1e-6)
        assert np.abs(around[2, 2:18, 1:17] - linear[2, 2:18, 1:17]).mean() > 0.01


class TestOptimisation:
    def test_views_improve_the_volume(self):
        settings = replace(QUICK, iterations=60, optimise="z", output="decoded", hard=False)
        decoded, truth = run(settings, Objective(curvature=0))
        before, after = (np.square(v - truth).mean() for v in (decoded.seed, decoded.volume))
        assert after < before

    def test_projection_and_step_size(self):
        """A29: the codes are pulled to the start by 0.001 after each update; the rate halves every 50 iterations."""
        settings = replace(QUICK, iterations=51, lr=1e-3, projection=0.5)
        frame, _ = frame_with()
        problem = inverse.Problem(Analytic(settings), frame, Objective(), settings)
        rates, free = [], inverse.Optimiser(problem, problem.seeds)
        free.step()
        first = float((free.x.detach() - problem.seeds.x).abs().max())
        assert first == pytest.approx(0.5e-3, rel=0.01)  # Adam's first step is lr, half of which is taken back
        inverse.optimise(problem, problem.seeds, log=lambda i, values: rates.append(values["lr"]))
        assert rates[:50] == [1e-3] * 50 and rates[50] == 5e-4
        assert Settings().projection == 1e-3 and Settings().step_size == 50 and Settings().min_delta == 1e-5

    def test_early_stop_after_patience(self):
        result, _ = run(replace(QUICK, lr=1e-9, patience=5, iterations=100))
        assert result.report["stopped_early"] and result.report["iterations"] == 6

    def test_legacy_loop_follows_the_reference(self):
        """A29: sixty iterations of the multi-optimiser script: total, codes at the end."""
        _, expected = case("loop_multi")
        goal = LEGACY["ex8_multi"]
        settings = Settings(**inverse.LEGACY_SETTINGS | {"lr": 1e-3, "iterations": 60, "schedule": "legacy"})
        n, c = expected["z_seed"].shape
        seeds = Codes(torch.from_numpy(expected["x_seed"]), torch.from_numpy(expected["z_seed"]))
        frame = Frame(np.zeros((3, *expected["x_seed"].shape[2:]), np.float32), 8, (1.0, 1.0))
        problem = inverse.Problem(Analytic(settings), frame, goal, settings, seeds)
        target, mask = (torch.from_numpy(np.asarray(expected[k], np.float32))[:, None] for k in ("target", "mask"))
        problem.data.painted = objective.Painted(target, mask)
        totals = []
        optimiser = inverse.optimise(problem, seeds, log=lambda i, values: totals.append(values["total"]))
        count = int(expected["n_iterations"])
        np.testing.assert_allclose(totals[:count], expected["total_loss"][:count], rtol=1e-4, atol=3e-3)
        assert optimiser.iteration == count and (n, c) == tuple(optimiser.z.shape)
        np.testing.assert_allclose(optimiser.x.detach(), expected["x_final"], atol=9e-5)
        np.testing.assert_allclose(optimiser.z.detach(), expected["z_final"], atol=2e-4)

    def test_alternating_solver_lowers_the_energy(self):
        totals = []
        settings = replace(QUICK, solver="alternating", inner=5, iterations=30)
        run(settings, log=lambda i, values: totals.append(values["total"]))
        assert totals[-1] < 0.8 * totals[0]

    def test_resume_is_bit_identical(self, tmp_path):
        goal = Objective()
        whole, _ = run(replace(QUICK, iterations=12))
        files = Files(tmp_path / "codes.ckpt", {"a": 1})
        calls = []
        run(QUICK, goal, files=files, stop=lambda: len(calls) >= 7, log=lambda i, values: calls.append(i))
        assert checkpoint.load(files.path)["state"]["iteration"] == 7
        again, _ = run(QUICK, goal, files=files, log=lambda i, values: calls.append(i))
        assert calls == list(range(1, 13))
        assert torch.equal(whole.codes.x, again.codes.x) and np.array_equal(whole.volume, again.volume)

    def test_codes_of_other_settings_are_refused(self, tmp_path):
        run(files=Files(tmp_path / "codes.ckpt", {"lr": 1}))
        with pytest.raises(UserError, match="another lr"):
            run(files=Files(tmp_path / "codes.ckpt", {"lr": 2}))

    def test_a22_nan_names_slice_and_term_and_dumps_the_codes(self, tmp_path):
        frame, _ = frame_with()
        frame.views[0].values[frame.views[0].sampler.coordinates[:, 0] == 2] = torch.nan
        files = Files(tmp_path / "codes.ckpt", {})
        with pytest.raises(Diverged, match="term lax_v5.*failed_codes"):
            inverse.reconstruct(Analytic(QUICK), frame, Objective(), QUICK, files=files)
        assert checkpoint.load(tmp_path / "failed_codes.ckpt")["state"]["x"].isfinite().all()
        assert issubclass(Diverged, UserError)  # exit status 2

    def test_several_starts_give_a_spread_between_the_slices(self):
        result, _ = run(replace(QUICK, iterations=3, output="decoded"), starts=3)
        assert result.spread.shape == result.volume.shape
        assert result.spread[::FACTOR].max() < 1e-7 and result.spread[1:FACTOR].mean() > 0


class TestAssembly:
    def test_a9_acquired_slices_are_exact(self):
        result, truth = run()
        assert np.array_equal(result.volume[::FACTOR], truth[::FACTOR])
        soft, _ = run(replace(QUICK, hard=False, iterations=60))
        assert np.abs(soft.volume[::FACTOR] - truth[::FACTOR]).max() <= 0.01

    def test_without_views_the_interpolation_comes_out(self):
        """A16: no view, nothing speaks for a change."""
        result, truth = run(n_views=0)
        base = baselines.interpolate(truth[::FACTOR], FACTOR, result.report["base"])
        assert result.report["shares"][1] == 0
        start = result.report["shares"][0] * (result.seed - base)
        np.testing.assert_allclose(result.volume, base + start, atol=1e-6)

    def test_a17_views_help(self):
        settings = replace(QUICK, iterations=60, optimise="z")
        errors = [np.square(run(settings, n_views=n)[0].volume - heart()).mean() for n in (0, 2)]
        assert errors[1] < 0.5 * errors[0]

    def test_a_useless_change_is_left_out(self):
        frame, truth = frame_with(1)
        noise = np.random.default_rng(0).normal(0, 0.3, truth.shape).astype(np.float32)
        base = baselines.interpolate(frame.sax, FACTOR)
        good, bad = inverse.shares_of_changes([base], [(truth - base, noise)], [frame])
        assert good > 0.9 and bad < 0.1
        assert inverse.shares_of_changes([base], [(noise,)], [frame])[0] < 0.3
        assert inverse.shares(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([-1.0, -1.0])) == pytest.approx(
            [0.0, 0.0], abs=1e-6
        )

    def test_window_cuts_and_pastes(self):
        images, around = torch.rand(2, 7, 9), torch.zeros(2, 7, 9)
        for size in (4, 12):
            window = inverse.Window.middle((7, 9), size)
            part = window.cut(images)
            assert part.shape == (2, size, size)
            pasted = window.paste(part, around)
            assert torch.equal(pasted[pasted != 0], images[pasted != 0])
            assert int((pasted != 0).sum()) == 2 * min(size, 7) * min(size, 9)


class TestCine:
    def test_first_and_last_phase_are_neighbours(self):
        assert inverse.neighbours_of(0, 5) == [1, 4] and inverse.neighbours_of(4, 5) == [0, 3]
        assert inverse.neighbours_of(0, 2) == [1] and inverse.neighbours_of(0, 1) == []

    def test_a20_temporal_term_steadies_the_cycle(self):
        from mgdcr.evaluate import jitter

        def cine(weight):
            frames = []
            for t in range(4):
                frame, _ = frame_with()
                view = frame.views[0]
                noise = torch.randn(len(view.values), generator=torch.Generator().manual_seed(t))
                frame.views[0] = replace(view, values=view.values + 0.1 * noise)
                frames.append(frame)
            goal = Objective(temporal=weight)
            settings = replace(QUICK, output="decoded", hard=False)
            results = inverse.reconstruct_cine(Analytic(settings), frames, goal, settings)
            return jitter(np.stack([r.volume for r in results]))

        assert cine(20.0) < 0.8 * cine(0.0)

    def test_a20_changes_are_averaged_over_time(self):
        """A20: a change that stays is kept, one that alternates goes, one that moves with the beat stays nearly."""
        from mgdcr.evaluate import jitter

        n, time = 20, np.arange(20)[:, None, None, None] / 20
        seeds = 0.5 + 0.2 * np.cos(2 * np.pi * time) * np.ones((n, 3, 4, 4))
        moving, noise = 0.1 + 0.05 * np.sin(2 * np.pi * time), 0.05 * (-1.0) ** np.arange(n)[:, None, None, None]
        steady = np.stack(inverse.steadied(list(seeds + moving + noise), list(seeds)))
        np.testing.assert_allclose(steady, seeds + moving, atol=0.004)
        assert jitter(steady) < 1.2 * jitter(seeds + moving) < 0.2 * jitter(seeds + moving + noise)
        few = [seeds[0], seeds[1] + 0.1]  # two phases are half a beat apart
        np.testing.assert_allclose(inverse.steadied(few, [seeds[0], seeds[1]]), few, atol=1e-6)

    def test_a_warm_start_is_not_thrown_off(self):
        """Adam's first step is as long as its rate: that of a phase that begins where another ended is smaller."""
        settings, goal = replace(QUICK, optimise="z", iterations=1, projection=0.0), Objective(temporal=0)
        (frame, _), rates, fits = frame_with(), {}, {}
        inverse.reconstruct_cine(
            Analytic(settings), [frame, frame], goal, settings, on_frame=lambda sweep, i, fit: fits.update({i: fit}),
            log=lambda sweep, i: lambda iteration, values: rates.update({i: values["lr"]}),
        )  # fmt: skip
        assert rates == {0: settings.lr, 1: settings.warm_lr * settings.lr} and settings.warm_lr < 1
        begun = [fits[0].seeds.z, fits[0].codes.z]
        steps = [float((fits[i].codes.z - begun[i]).abs().max()) for i in (0, 1)]
        assert steps == pytest.approx([settings.lr, settings.warm_lr * settings.lr], rel=1e-3)

    def test_a20_one_mixture_for_all_phases(self):
        """A20: the shares of a cine are least squares over all its phases, those of a frame alone that frame's."""
        (frame, truth), settings = frame_with(), replace(QUICK, propagate=False)
        base = baselines.interpolate(frame.sax, FACTOR)
        fits = [inverse.Fit([base + times * (truth - base)], base, None, None, np.zeros(2), {}) for times in (1, 2, 4)]
        alone = [inverse.images_of([frame], [fit], settings)[0] for fit in fits]
        assert [result.report["shares"][1] for result in alone] == pytest.approx([1, 1 / 2, 1 / 4], abs=0.01)
        together = inverse.images_of([frame] * 3, fits, settings)
        shares = {(result.report["base"], *result.report["shares"]) for result in together}
        assert len(shares) == 1 and shares.pop()[2] == pytest.approx((1 + 2 + 4) / (1 + 4 + 16), abs=0.01)
        assert inverse.share_of_seeds([np.array([1.0, 1.0]), np.array([2.0, 4.0])]) == pytest.approx(3 / 5)
        assert inverse.share_of_seeds([np.zeros(2)]) == 0 and inverse.share_of_seeds([np.array([-1.0, 1.0])]) == 0

    @pytest.mark.parametrize("temporal", [0.0, 0.2])
    def test_a_cine_is_mixed_as_one(self, temporal):
        frames = []
        for t in range(3):
            frame, _ = frame_with(depth=6)
            noise = torch.randn(len(frame.views[0].values), generator=torch.Generator().manual_seed(t))
            frame.views[0] = replace(frame.views[0], values=frame.views[0].values + 0.1 * t * noise)
            frames.append(frame)
        settings = replace(QUICK, optimise="z", iterations=6, lr=0.02)
        results = inverse.reconstruct_cine(Analytic(settings), frames, Objective(temporal=temporal), settings)
        assert len({(r.report["base"], *r.report["shares"], r.report["trust"]) for r in results}) == 1
        assert 0 < results[0].report["shares"][1] < 1

    def test_later_phases_begin_where_the_one_before_ended(self):
        frames, begun = [frame_with()[0] for _ in range(2)], {}

        def log(sweep, i):
            return lambda iteration, values: begun.setdefault((sweep, i), values["total"])

        settings = replace(QUICK, iterations=30)
        inverse.reconstruct_cine(Analytic(settings), frames, Objective(temporal=0), settings, log=log)
        assert list(begun) == [(0, 0), (0, 1)] and begun[0, 1] < begun[0, 0]


@pytest.mark.parametrize("depth", [2, 3])
def test_a21_tiny_and_identical_stacks(depth):
    sax = np.full((depth, *SHAPE), 0.5, np.float32)
    result = inverse.reconstruct(Analytic(QUICK), Frame(sax, FACTOR, (1.0, 1.0)), Objective(), QUICK)
    assert np.isfinite(result.volume).all() and result.volume.shape == (FACTOR * (depth - 1) + 1, *SHAPE)


class TestScript:
    def test_help_needs_no_torch(self):
        done = run_script([SCRIPT, "--help"])
        assert done.returncode == 0 and "--subject_id" in done.stdout and "--ckpt" in done.stdout

    def test_a31_wrong_paths_are_one_line(self, tmp_path):
        done = run_script([SCRIPT, "--sax", tmp_path / "none.nii.gz", "--device", "cpu"])
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

    @pytest.mark.parametrize("name", ["default", "ex8_multi", "ex8_norm"])
    def test_configs_resolve(self, name):
        from common import cli

        argv = ex8_multi_optimizer.yaml_options(["--config", f"{ex8_multi_optimizer.HERE}/configs/{name}.yaml"])
        options = cli.parse(ex8_multi_optimizer.Options, argv, description="", presets=ex8_multi_optimizer.PRESETS)
        goal, settings = ex8_multi_optimizer.resolve(options)
        assert goal == LEGACY.get(name, Objective())
        if name in LEGACY:
            assert settings == Settings(**inverse.LEGACY_SETTINGS | {"lr": inverse.LEGACY_LR[name]})

    def test_options_win_over_the_file(self, tmp_path):
        from common import cli

        (tmp_path / "a.yaml").write_text("lr: 0.5\nsteps: 7\n")
        argv = ex8_multi_optimizer.yaml_options(["--config", str(tmp_path / "a.yaml"), "--lr", "0.25"])
        options = cli.parse(ex8_multi_optimizer.Options, argv, description="", presets=ex8_multi_optimizer.PRESETS)
        assert (options.lr, options.steps) == (0.25, 7)

    def test_every_setting_has_a_flag(self):
        """What a mode turns on can be turned off again by a flag, and only the solvers' inner constants have none."""
        from dataclasses import fields

        from common import cli

        known = {f.name for f in fields(ex8_multi_optimizer.Options)}
        inner = {"step_size", "gamma", "projection", "min_delta", "inner", "image_iterations", "image_lr", "split"}
        assert {f.name for f in fields(Settings)} - known == inner
        words = (
            "--preset fast --noise inverted --warm_lr 0.5 --no_hold --no_hard --no_propagate --output decoded".split()
        )
        options = cli.parse(ex8_multi_optimizer.Options, words, description="", presets=ex8_multi_optimizer.PRESETS)
        changed = dict(noise="inverted", warm_lr=0.5, hold=False, hard=False, propagate=False, output="decoded")
        assert ex8_multi_optimizer.resolve(options)[1] == Settings(**inverse.MODES["fast"] | changed)
        with pytest.raises(UserError, match="warm_lr"):
            Settings(warm_lr=0.0)

    def test_a28_end_to_end(self, small, tmp_path):
        """A28, A27: NIfTI with valid forms in acquired intensities, a log of every term, a report; a rerun keeps it."""
        args = [*small, "--out", tmp_path / "out", "--starts", 2, "--subject_id", "one"]
        done = run_script(args)
        assert done.returncode == 0, done.stderr
        cine = geometry.load_cine(tmp_path / "out" / "one" / "volume.nii.gz")
        assert cine.data.shape == (2, 9, 16, 16) and cine.frame_s == pytest.approx(0.05)
        assert 50 < cine.data.min() and cine.data.max() < 950
        spread = geometry.load_cine(tmp_path / "out" / "one" / "frame_000" / "sd.nii.gz").data[0]
        assert (spread[::4] == 0).all() and spread[2].mean() > 0
        rows = [json.loads(line) for path in sorted((tmp_path / "out").glob("**/log.jsonl"))
                for line in path.read_text().splitlines()]  # fmt: skip
        assert rows and {"sax", "lax_a", "prior", "norm", "curvature", "total", "lr"} <= rows[0].keys()
        report = (tmp_path / "out" / "one" / "frame_000" / "report.json").read_bytes()
        assert run_script(args).returncode == 0
        assert (tmp_path / "out" / "one" / "frame_000" / "report.json").read_bytes() == report
        other = run_script([*args, "--prior_weight", "0.5"])
        assert other.returncode == 2 and "--overwrite" in other.stderr

    @pytest.mark.slow
    @pytest.mark.parametrize("frames, killed", [(["--frame", 0], "frame_000"), (["--sweeps", 1], "frame_001/sweep_0")])
    def test_killed_at_any_moment(self, small, tmp_path, frames, killed):
        """kill -9, then the same command: codes, volume and log are as of a run left alone; a frame, a whole cine."""
        long = [*small, "--subject_id", "one", *frames, "--iterations", 60, "--patience", 0, "--save_every", 7]
        assert run_script([*long, "--out", tmp_path / "whole"]).returncode == 0
        log = tmp_path / "cut" / "one" / killed / "log.jsonl"
        done = kill_and_resume([*long, "--out", tmp_path / "cut"], lambda kill: reached(log, 20)())
        assert done.returncode == 0, done.stderr
        whole, cut = (tmp_path / name / "one" for name in ("whole", "cut"))
        assert_same_tensors(whole / killed / "codes.ckpt", cut / killed / "codes.ckpt")
        images = sorted(path.relative_to(whole) for path in whole.glob("**/*.nii.gz"))
        assert len(images) == (3 if "--frame" in frames else 7)
        for image in images:
            assert (whole / image).read_bytes() == (cut / image).read_bytes(), image
        logs = [(folder / killed / "log.jsonl").read_text().splitlines() for folder in (whole, cut)]
        rows = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines] for lines in logs]
        assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == list(range(1, 61))
        shares = [json.loads(path.read_text())["shares"] for path in sorted(cut.glob("frame_*/report.json"))]
        assert all(share == shares[0] for share in shares)  # one mixture for a cine

    @pytest.mark.slow
    @pytest.mark.parametrize("more", [("--temporal_weight", 0, "--subject_id", "one"), ("--sweeps", 1)])
    def test_two_ranks_share_frames_or_subjects(self, small, tmp_path, more):
        """Frames where nothing ties them, else subjects: the same files as of one process."""
        for out, start in (("one_rank", run_script), ("two_ranks", two_ranks)):
            done = start([*small, *more, "--out", tmp_path / out])
            assert done.returncode == 0, done.stderr
        files = sorted((tmp_path / "one_rank").glob("**/*.nii.gz"))
        assert len(files) == (7 if "--temporal_weight" in more else 14)
        for file in files:
            other = tmp_path / "two_ranks" / file.relative_to(tmp_path / "one_rank")
            assert other.read_bytes() == file.read_bytes(), file

    def test_a22_not_finite_ends_the_run(self, small, tmp_path):
        """A22: exit status, one line that names slice and term, codes on disk."""
        done = run_script(
            [*small, "--subject_id", "one", "--frame", 1, "--lr", 1e30, "--iterations", 5, "--out", tmp_path]
        )
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: the optimisation is not finite")
        assert re.search(r"slice \d+ .*of term \w+", done.stderr)
        assert (tmp_path / "one" / "frame_001" / "failed_codes.ckpt").is_file()
        assert not list(tmp_path.glob("**/volume.nii.gz"))


@pytest.fixture(scope="module")
def small(network, tmp_path_factory):
    """Command line of the script on two studies of three slices of 16 x 16 pixels, two frames and a view; no --out."""
    from common import training

    folder, rng = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    grid = geometry.Grid(np.diag([2.0, 2.0, 8.0, 1.0]), (3, 16, 16))
    across = np.array(
        [[2.0, 0, 0, 0], [0, 0, 2.0, 15.0], [0, 2.0, 0, 0], [0, 0, 0, 1]]
    )  # columns along x, rows along z
    view = geometry.Grid(across, (1, 9, 16))
    for name in ("one", "two"):
        geometry.save(folder / "data" / name / "sax.nii.gz", rng.uniform(100, 900, (2, 3, 16, 16)), grid, 0.05)
        geometry.save(folder / "data" / name / "lax_a.nii.gz", rng.uniform(100, 900, (2, 1, 9, 16)), view, 0.05)
    settings = dict(image_size=16, model_channels=8, channel_mult=[1, 2], enc_channel_mult=[1, 2], num_res_blocks=1,
                    enc_num_res_blocks=1, attention_resolutions=[], num_heads=1, embed_channels=8,
                    enc_out_channels=8, resblock_updown=True, dropout=0.0)  # fmt: skip
    training.save_network(folder / "best.ckpt", "mgdcr diffae", network.state_dict(), settings, normaliser={},
                          split="none")  # fmt: skip
    return [SCRIPT, "--preset", "smoke", "--ckpt", folder / "best.ckpt", "--data", folder / "data", "--factor", 4,
            "--device", "cpu", "--no-align"]  # fmt: skip
