"""Synthetic stroke cohort with known truth: CT perfusion, DWI, ADC, brain and lesion masks in the layout of raw data.

    python lapt/make_phantom.py                                       # 60 cases of 192 x 224 x 32 voxels: minutes
    python lapt/make_phantom.py --shape 48 48 8 --n_cases 40          # for training on a CPU: half a minute
    python lapt/make_phantom.py --lesion_masks MASKS --n_cases 12     # cores of the shapes of real lesions
    python lapt/make_phantom.py --defects --n_cases 12 --shape 48 48 8 --out STUDY   # something for --check_only

Anatomy: a head of common/phantom.py per case, with skull and scalp in the CTP. Perfusion: an arterial input (gamma
variate, peak 450 HU) convolved with the residue function exp(-t / MTT) after a delay, times CBF (indicator dilution:
Meier and Zierler, J Appl Physiol 1954; Ostergaard et al., MRM 1996), sampled at 15 times 3 s apart. Values of healthy
and ischaemic tissue follow the usual definitions (core: CBF below 30 %; penumbra: delay above 6 s, Tmax):

                   CBF ml/100 ml/min   MTT s     delay s     ADC 1e-6 mm^2/s   CT at rest, HU
    grey                  60            4.0        0-1             830               37
    white                 25            4.8        0-1             750               28
    penumbra             x 0.5         x 2.2      + 6-8         unchanged         unchanged
    core                 x 0.12        x 2.5      + 7-9          360-560             - 4

DWI is S0 exp(-1000 s/mm^2 ADC): bright in the core only, so the core must be told from the penumbra in the curves. One
case in six has neither. Scans have noise (CTP 1.5 HU, DWI 3 %, ADC 25e-6) and a DWI gain that differs by 3 %.

OUT/raw/<case>/{ctp,dwi,adc,mask,lesion}.nii.gz, lesion = core; OUT/labels/<case>.nii.gz: 1 core, 2 penumbra;
OUT/truth.csv: volumes in ml, centre, side, age, bolus. With --maps OUT/raw/<case>/{cbf,mtt,delay}.nii.gz, the truth
without noise (`preprocessing.py --maps cbf mtt delay` takes them). Cases are seeded one by one: another --n_cases
leaves every other case as it was.
"""

from __future__ import annotations

import gzip
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

import numpy as np

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parent
SHAPE, FOV_MM = (192, 224, 32), (192.0, 192.0, 128.0)  # the paper's grid is 1 x 1 x 4 mm
LEAST_MM = 80.0
FREE_EVERY = 6  # every sixth case is lesion-free
CORE, PENUMBRA = 1, 2  # codes of the label maps
CORE_ML, MISMATCH = (4.0, 80.0), (1.0, 2.5)  # volume of the core (log-uniform), penumbra relative to it
AIF_PEAK_HU, AIF_SHAPE = 450.0, 3.0
# tissue: CBF ml/100 ml/min, MTT s, HU at rest, ADC 1e-6 mm^2/s, DWI signal at b = 0
TISSUE = {
    "grey": (60.0, 4.0, 37.0, 830.0, 700.0),
    "white": (25.0, 4.8, 28.0, 750.0, 560.0),
    "csf": (0.0, 4.0, 6.0, 2900.0, 1300.0),
}
HEAD_SCALE = 0.93  # mean size of the phantom's heads relative to MNI: real lesion masks shrink with them
DT_S = 0.1  # of the table of tissue curves
DEFECTS = (
    "ADC on another grid", "one time point less", "empty mask", "lesion outside the mask", "NaN in the CTP",
    "ADC missing", "CTP without its offset of -1024", "CTP stored LAS", "CTP scaled by its header", "ADC in mm^2/s",
)  # fmt: skip
HARMLESS = DEFECTS[7:]  # the same case in other clothes


@dataclass
class Options(CommonOptions):
    out: str = option(str(HERE / "data"), "folder that gets raw/, labels/ and truth.csv")
    n_cases: int = option(60, "cases, one patient each; every sixth has no lesion")
    shape: tuple[int, int, int] = option(SHAPE, "grid, x y z", unit="voxels")
    voxel: tuple[float, float, float] = option(
        (0.0, 0.0, 0.0), "voxel size, x y z; 0: as 192 x 192 x 128 mm fit the grid, square in-plane", unit="mm"
    )
    time_points: int = option(15, "CTP frames")
    frame_s: float = option(3.0, "time between frames", unit="s")
    noise: float = option(1.5, "noise of the CTP", unit="HU SD")
    lesion_masks: str = option("", "folder of lesion masks (NIfTI, MNI space): cores take their shapes and places")
    maps: bool = option(False, "also write the maps of CBF, MTT and delay")
    defects: bool = option(False, f"spoil one of the first cases each: {', '.join(DEFECTS)}")
    overwrite: bool = option(False, "replace a cohort that is already there")


# ---- physics --------------------------------------------------------------------------------------------------------


def arterial_input(time_s: np.ndarray, arrival_s: float, width_s: float) -> np.ndarray:
    """Enhancement in HU of a gamma variate that begins at `arrival_s` and peaks AIF_SHAPE * width_s later."""
    x = np.clip(np.asarray(time_s, np.float64) - arrival_s, 0, None) / (AIF_SHAPE * width_s)
    return AIF_PEAK_HU * x**AIF_SHAPE * np.exp(AIF_SHAPE * (1 - x))


def tissue_curves(aif: np.ndarray, dt_s: float, mtt_s: np.ndarray) -> np.ndarray:
    """The input (N,), linear between samples, convolved with exp(-t / MTT): (len(mtt_s), N) in HU s, exact."""
    m = np.asarray(mtt_s, np.float64)
    w = np.exp(-dt_s / m)
    of_new = m * (1 - w) - m * (m * (1 - w) / dt_s - w)
    of_old = m * (m * (1 - w) / dt_s - w)
    out = np.zeros((len(m), len(aif)))
    for i in range(1, len(aif)):
        out[:, i] = out[:, i - 1] * w + of_new * aif[i] + of_old * aif[i - 1]
    return out


def enhancement(cbf, mtt_s, delay_s, times_s, arrival_s: float, width_s: float) -> np.ndarray:
    """Contrast enhancement (T, ...) in HU of voxels with maps CBF (ml/100 ml/min), MTT and delay (...)."""
    from scipy import ndimage

    grid_s = np.arange(0, max(times_s) + DT_S, DT_S)
    log_mtt = np.linspace(np.log(1.0), np.log(60.0), 128)
    table = tissue_curves(arterial_input(grid_s, arrival_s, width_s), DT_S, np.exp(log_mtt))
    row = (np.log(mtt_s) - log_mtt[0]) / (log_mtt[1] - log_mtt[0])
    places = ((np.clip(t - delay_s, 0, None) / DT_S) for t in times_s)
    curves = [ndimage.map_coordinates(table, [row, column], order=1, mode="nearest") for column in places]
    return (np.stack(curves) * (np.asarray(cbf) / 6000)).astype(np.float32)  # 6000: per 100 ml and minute to per s


def smooth_noise(rng, points_mm, fwhm_mm: float, rms: float) -> np.ndarray:
    """Smooth random field at world points (..., 3), alike in mm on every image grid."""
    from scipy import ndimage

    from common.phantom import CENTRE_MM

    step = fwhm_mm / 2.5
    n = int(240 / step) + 8
    noise = ndimage.gaussian_filter(rng.standard_normal((n, n, n)), fwhm_mm / 2.3548 / step, mode="wrap")
    places = (points_mm - CENTRE_MM) / step + (n - 1) / 2
    field = ndimage.map_coordinates(noise / noise.std(), np.moveaxis(places, -1, 0), order=1, mode="grid-wrap")
    return (rms * field).astype(np.float32)


# ---- the patient ----------------------------------------------------------------------------------------------------


def draw_patient(seed: int, number: int) -> dict:
    """Age, side, volumes and bolus of a case (no image); core_ml 0 for every sixth."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, number]))
    age, side = float(np.round(rng.uniform(45, 90), 1)), str(rng.choice(["left", "right"]))
    core_ml = float(np.exp(rng.uniform(*np.log(CORE_ML))))
    drawn = {"age": age, "side": side, "core_ml": core_ml, "penumbra_ml": core_ml * float(rng.uniform(*MISMATCH)),
             "arrival_s": float(rng.uniform(5, 9)), "width_s": float(rng.uniform(1.7, 2.3)),
             "gain": float(np.exp(0.03 * rng.normal()))}  # fmt: skip
    if number % FREE_EVERY == 0:
        drawn |= {"side": "none", "core_ml": 0.0, "penumbra_ml": 0.0}
    return drawn


def grid_mm(shape, voxel=(0, 0, 0)) -> tuple[float, float, float]:
    """Voxel size (x, y, z) in mm: as given, or as the field of view fits, square in-plane."""
    in_plane = max(FOV_MM[0] / shape[0], FOV_MM[1] / shape[1])
    default = (in_plane, in_plane, FOV_MM[2] / shape[2])
    return tuple(float(given or own) for given, own in zip(voxel, default, strict=True))


def voxel_points(shape, affine) -> np.ndarray:
    """World mm (X, Y, Z, 3) of the voxels."""
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]


def nearest(score: np.ndarray, allowed: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` allowed voxels of lowest score (all of them if there are fewer)."""
    places = np.flatnonzero(allowed)
    chosen = places[np.argsort(score.ravel()[places], kind="stable")[:count]]
    out = np.zeros(allowed.shape, bool)
    out.ravel()[chosen] = True
    return out


def draw_core(rng, points_mm, allowed, volume_ml: float, voxel_ml: float) -> np.ndarray:
    """A blob of this volume in the territory of the middle cerebral artery: an ellipsoid with a wavy surface."""
    x, y, z = np.moveaxis(points_mm, -1, 0)
    territory = allowed & (np.abs(x) > 18) & (y > -55) & (y < 30) & (z > -12) & (z < 52)
    places = points_mm[territory if territory.any() else allowed]
    centre, axes = places[rng.integers(len(places))], np.exp(rng.normal(0, 0.25, 3))
    radius_mm = (volume_ml * 1000 * 3 / (4 * np.pi)) ** (1 / 3)
    away = np.sqrt((((points_mm - centre) / axes) ** 2).sum(-1)) / radius_mm
    score = away + smooth_noise(rng, points_mm, 18.0, 0.25)
    return nearest(score, allowed, max(1, round(volume_ml / voxel_ml)))


def place_mask(path: Path, mirrored: bool, points_mm, allowed, voxel_ml: float) -> np.ndarray:
    """The lesion of a mask file in MNI space on the phantom's grid, of the same (shrunken) volume, inside `allowed`."""
    from scipy import ndimage

    from common import nifti
    from common.phantom import CENTRE_MM

    lesion = nifti.load(path)
    if not (lesion.data > 0.5).any():
        raise UserError(f"{path}: the lesion mask is empty; take it out of --lesion_masks")
    volume_ml = float((lesion.data > 0.5).sum() * np.prod(lesion.spacing_mm) / 1000 * HEAD_SCALE**3)
    mni = (points_mm - CENTRE_MM) / HEAD_SCALE + CENTRE_MM
    mni = mni * [-1, 1, 1] if mirrored else mni
    inverse = np.linalg.inv(lesion.affine)
    places = np.moveaxis(mni @ inverse[:3, :3].T + inverse[:3, 3], -1, 0)
    # As wide as the phantom's voxels, so that thin lesions between their centres are seen too.
    step_mm = np.abs([points_mm[1, 0, 0, 0] - points_mm[0, 0, 0, 0], points_mm[0, 1, 0, 1] - points_mm[0, 0, 0, 1],
                      points_mm[0, 0, 1, 2] - points_mm[0, 0, 0, 2]])  # fmt: skip
    soft = ndimage.gaussian_filter((lesion.data > 0.5).astype(np.float32), 0.42 * step_mm / lesion.spacing_mm)
    soft = ndimage.map_coordinates(soft, places, order=1)
    return nearest(-soft, allowed & (soft > 1e-4), max(1, round(volume_ml / voxel_ml)))


def draw_lesion(drawn: dict, rng, brain, parts: dict, mask, points_mm, path: Path | None, mirrored: bool):
    """(core, penumbra) masks of a patient: in the cerebrum of one side, or where the lesion mask `path` lies."""
    from scipy import ndimage

    from common import phantom

    core, penumbra = np.zeros(mask.shape, bool), np.zeros(mask.shape, bool)
    if not drawn["core_ml"]:
        return core, penumbra
    k, spacing = brain.k, brain.spacing_mm
    voxel_ml = float(np.prod(spacing)) / 1000
    allowed = mask & (parts["grey"] + parts["white"] > 0.6)
    if path is None:
        region = brain.region[k[0] // 2 :: k[0], k[1] // 2 :: k[1], k[2] // 2 :: k[2]]
        allowed &= ~np.isin(region, [phantom.REGION_ID["cerebellum"], phantom.REGION_ID["brain_stem"]])
    sign = -1 if drawn["side"] == "left" else 1
    if path is None:
        core = draw_core(rng, points_mm, allowed & (sign * points_mm[..., 0] > 4), drawn["core_ml"], voxel_ml)
    else:
        core = place_mask(path, mirrored, points_mm, allowed, voxel_ml)
        if not core.any():
            raise UserError(f"{path}: the lesion misses the brain of the phantom; give masks in MNI space")
        sign = -1 if points_mm[core][:, 0].mean() < 0 else 1
    drawn["side"] = "left" if sign < 0 else "right"
    away = ndimage.distance_transform_edt(~core, sampling=spacing) + smooth_noise(rng, points_mm, 20.0, 5.0)
    wanted = max(1, round(core.sum() * drawn["penumbra_ml"] / drawn["core_ml"]))
    return core, nearest(away, allowed & ~core & (sign * points_mm[..., 0] > 0), wanted)


# ---- the scans ------------------------------------------------------------------------------------------------------


def mixture(parts: dict, values) -> np.ndarray:
    """Mean of one value per tissue (in the order of TISSUE) by the fractions of a voxel."""
    weighted = sum(parts[tissue] * value for tissue, value in zip(TISSUE, values, strict=True))
    return weighted / np.maximum(sum(parts.values()), 1e-3)


def perfusion_maps(rng, parts: dict, points_mm, core, penumbra) -> dict:
    """CBF in ml/100 ml/min, MTT and delay in s."""
    flow = mixture(parts, [row[0] for row in TISSUE.values()])
    blood = mixture(parts, [row[0] * row[1] for row in TISSUE.values()])
    mtt = np.where(flow > 0.1, blood / np.maximum(flow, 0.1), TISSUE["csf"][1])
    vary, late = (smooth_noise(rng, points_mm, 25.0, 1.0) for _ in range(2))
    delay = np.clip(0.5 + 0.25 * smooth_noise(rng, points_mm, 40.0, 1.0), 0, 1)
    return {
        "cbf": flow * np.exp(0.08 * vary) * np.select([core, penumbra], [0.12, 0.5], 1.0),
        "mtt": mtt * np.select([core, penumbra], [2.5, 2.2], 1.0),
        "delay": delay + np.select([core, penumbra], [8.0, 7.0], 0.0) + np.clip(late, -1, 1) * (core | penumbra),
    }


def scan_ctp(rng, parts: dict, mask, core, maps: dict, drawn: dict, options: Options, spacing_mm) -> np.ndarray:
    """CT perfusion (T, X, Y, Z) in HU, skull and air around."""
    times = np.arange(options.time_points) * options.frame_s
    rest = mixture(parts, [row[2] for row in TISSUE.values()]) - 4.0 * core
    ctp = np.where(mask, rest, outside_hu(mask, spacing_mm)).astype(np.float32)[None].repeat(len(times), 0)
    inside = (maps[name][mask] for name in ("cbf", "mtt", "delay"))
    ctp[:, mask] += enhancement(*inside, times, drawn["arrival_s"], drawn["width_s"])
    return ctp + options.noise * rng.standard_normal(ctp.shape, dtype=np.float32)


def scan_mri(rng, parts: dict, mask, points_mm, core, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """DWI (b 1000 s/mm^2, scanner units, background noise) and ADC in 1e-6 mm^2/s (0 outside the brain)."""
    adc = mixture(parts, [row[3] for row in TISSUE.values()]) + 15 * smooth_noise(rng, points_mm, 20.0, 1.0)
    adc = np.where(core, np.clip(460 + 50 * smooth_noise(rng, points_mm, 25.0, 1.0), 360, 560), adc)
    s0 = mixture(parts, [row[4] for row in TISSUE.values()]) * np.where(core, 1.3, 1.0)  # oedema
    bias = gain * np.exp(0.03 * smooth_noise(rng, points_mm, 80.0, 1.0))
    real, imaginary = 8.0 * rng.standard_normal((2, *mask.shape))
    dwi = np.hypot(np.where(mask, s0 * np.exp(-adc / 1000) * bias, 0) + real, imaginary)
    return dwi, np.where(mask, np.clip(adc + 20 * rng.standard_normal(mask.shape), 1, None), 0)


def make_case(options: Options, number: int, masks: list[Path]) -> dict:
    """Write one case; returns its truth row. masks: of real lesions, taken in turn, the second time mirrored."""
    from common import nifti, phantom  # they import nibabel and torch, which --help need not

    # ---- who: head, tissues, lesion
    name, out, drawn = f"case_{number:04d}", Path(options.out), draw_patient(options.seed, number)
    seed = options.seed * 100_003 + number  # distinct anatomy for every (seed, number)
    rng, older = np.random.default_rng(np.random.SeedSequence([seed, 7])), (drawn["age"] - 45) / 45
    factors = phantom.Factors(age=drawn["age"], atrophy=0.1 + 0.5 * older, ventricle_scale=float(np.exp(0.8 * older)))
    spacing = grid_mm(options.shape, options.voxel)
    brain = phantom.anatomy(seed, options.shape, factors, spacing)
    parts = {tissue: brain.tissue_map(tissue) for tissue in TISSUE}
    mask, points = largest_part(sum(parts.values()) > 0.5), voxel_points(options.shape, brain.affine)
    turn, place = divmod(number - 1, len(masks)) if masks else (0, 0)
    path = masks[place] if masks else None
    core, penumbra = draw_lesion(drawn, rng, brain, parts, mask, points, path, turn % 2 == 1)
    parts["csf"] = np.where(core, 0, parts["csf"])  # swelling closes the sulci

    # ---- what the scanners see
    maps = perfusion_maps(rng, parts, points, core, penumbra)
    ctp = scan_ctp(rng, parts, mask, core, maps, drawn, options, spacing)
    dwi, adc = scan_mri(rng, parts, mask, points, core, drawn["gain"])

    # ---- files
    folder = out / "raw" / name
    for what, image in (("ctp", ctp), ("dwi", dwi), ("adc", adc)):
        nifti.save(folder / f"{what}.nii.gz", np.rint(image).clip(-1024, 32767), brain.affine, dtype=np.int16)
    for what, image in (("mask", mask), ("lesion", core)):
        nifti.save(folder / f"{what}.nii.gz", image, brain.affine, dtype=np.uint8)
    labels = np.select([core, penumbra], [CORE, PENUMBRA], 0)
    nifti.save(out / "labels" / f"{name}.nii.gz", labels, brain.affine, dtype=np.uint8)
    for what, image in maps.items() if options.maps else ():
        nifti.save(folder / f"{what}.nii.gz", np.where(mask, image, 0), brain.affine)
    centre, voxel_ml = points[core].mean(0) if core.any() else [None] * 3, float(np.prod(spacing)) / 1000
    volumes = {"core_ml": core.sum() * voxel_ml, "penumbra_ml": penumbra.sum() * voxel_ml,
               "brain_ml": mask.sum() * voxel_ml}  # fmt: skip
    where = dict(zip(("x_mm", "y_mm", "z_mm"), centre, strict=True))
    shape_of = {"lesion_mask": path.name if path and core.any() else "", "defect": ""}
    return {"case": name, "seed": seed} | drawn | volumes | where | shape_of


def largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask, its holes filled slice by slice."""
    from scipy import ndimage

    parts, _ = ndimage.label(mask)
    mask = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    return np.stack([ndimage.binary_fill_holes(mask[..., z]) for z in range(mask.shape[2])], -1)


def outside_hu(mask: np.ndarray, spacing_mm) -> np.ndarray:
    """HU around the brain: fluid, 6 mm of bone, 5 mm of scalp, air."""
    from scipy import ndimage

    away = ndimage.distance_transform_edt(~mask, sampling=spacing_mm)
    return np.select([away <= 2, away <= 8, away <= 13], [6.0, 900.0, 40.0], -1000.0)


# ---- defects --------------------------------------------------------------------------------------------------------


def spoil(out: Path, rows: list[dict]) -> None:
    """One defect of DEFECTS for each of the first cases, noted in its row; those of HARMLESS change no value."""
    for row, defect in zip(rows, DEFECTS, strict=False):
        row["defect"] = defect
        _spoil(out / "raw" / row["case"], defect)


def _spoil(folder: Path, defect: str) -> None:
    import nibabel as nib

    from common import nifti

    ctp, mask = nifti.load(folder / "ctp.nii.gz", series=True), nifti.load(folder / "mask.nii.gz")
    adc, lesion = nifti.load(folder / "adc.nii.gz"), nifti.load(folder / "lesion.nii.gz")

    def rewrite(data, slope, inter, dtype):
        """The CTP with a header that scales; nifti.save writes none of that kind."""
        image = nib.Nifti1Image(np.moveaxis(data, 0, 3).astype(dtype), ctp.affine)
        image.header.set_slope_inter(slope, inter)
        (folder / "ctp.nii.gz").write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))

    if defect == "ADC on another grid":
        small = nifti.resample(adc, np.array(adc.spacing_mm) * [1.5, 1.5, 1])
        nifti.save(folder / "adc.nii.gz", small.data, small.affine)
    elif defect == "one time point less":
        nifti.save(folder / "ctp.nii.gz", ctp.data[:-1], ctp.affine, dtype=np.int16)
    elif defect == "empty mask":
        nifti.save(folder / "mask.nii.gz", 0 * mask.data, mask.affine, dtype=np.uint8)
    elif defect == "lesion outside the mask":
        data = lesion.data.copy()
        data[:3, :3, :] = 1
        nifti.save(folder / "lesion.nii.gz", data, lesion.affine, dtype=np.uint8)
    elif defect == "NaN in the CTP":
        data = ctp.data.copy()
        data[(0, *(n // 2 for n in ctp.data.shape[1:]))] = np.nan
        rewrite(data, 1, 0, np.float32)
    elif defect == "ADC missing":
        (folder / "adc.nii.gz").unlink()
    elif defect == "CTP without its offset of -1024":
        nifti.save(folder / "ctp.nii.gz", ctp.data + 1024, ctp.affine, dtype=np.int16)
    elif defect == "CTP stored LAS":
        nifti.save(folder / "ctp.nii.gz", *nifti.reorient(ctp.data, ctp.affine, "LAS"), dtype=np.int16)
    elif defect == "CTP scaled by its header":
        rewrite((ctp.data + 1024) / 0.5, 0.5, -1024, np.int16)
    elif defect == "ADC in mm^2/s":
        nifti.save(folder / "adc.nii.gz", adc.data * 1e-6, adc.affine)
    else:
        raise ValueError(defect)


# ---- command --------------------------------------------------------------------------------------------------------


def check(options: Options) -> None:
    if min(options.shape[:2]) < 16 or options.shape[2] < 4 or max(options.shape) > 256:
        raise UserError(f"--shape {options.shape}: 16 to 256 voxels in-plane, 4 to 256 slices")
    if any(not 0 <= v <= 40 for v in options.voxel):
        raise UserError(f"--voxel {options.voxel}: 0 to 40 mm")
    width_mm = [n * v for n, v in zip(options.shape, grid_mm(options.shape, options.voxel), strict=True)]
    if min(width_mm) < LEAST_MM:
        raise UserError(f"--shape and --voxel make a grid of {' x '.join(f'{w:g}' for w in width_mm)} mm, which misses "
                        f"most of a head: {LEAST_MM:g} mm along every axis at least")  # fmt: skip
    if not 0 < options.n_cases < 10_000 or options.seed < 0:
        raise UserError(f"--n_cases {options.n_cases}, --seed {options.seed}: 1 to 9999 cases, seeds from 0")
    if not 2 <= options.time_points <= 200 or not 0 < options.frame_s <= 60 or not 0 <= options.noise < np.inf:
        raise UserError(f"--time_points {options.time_points} (2 to 200), --frame_s {options.frame_s} (to 60), --noise "
                        f"{options.noise} (from 0)")  # fmt: skip
    if options.defects and options.n_cases < len(DEFECTS):
        raise UserError(f"--defects needs {len(DEFECTS)} cases, one each; raise --n_cases")
    for path in (Path(options.out) / name for name in ("raw", "labels", "truth.csv")):
        if not options.overwrite and (path.is_file() or path.is_dir() and any(path.iterdir())):
            raise UserError(f"{path} already holds data; give another --out, or --overwrite to replace it")


def mask_files(folder: str) -> list[Path]:
    """NIfTI files of --lesion_masks by name; none without it."""
    if not folder:
        return []
    paths = sorted(p for p in Path(folder).glob("*") if p.name.endswith((".nii", ".nii.gz")))
    if not paths:
        raise UserError(f"--lesion_masks {folder}: no NIfTI file there; name a folder of lesion masks in MNI space")
    return paths


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    check(options)
    masks = mask_files(options.lesion_masks)
    from common import phantom, tables
    from common.runlog import progress, write_json

    phantom.template()  # once, before the threads ask for it
    with ThreadPoolExecutor(max(options.num_workers, 1)) as pool, progress(options.n_cases, 0, "phantom") as bar:
        futures = [pool.submit(make_case, options, number + 1, masks) for number in range(options.n_cases)]
        rows = []
        try:
            for future in futures:
                rows.append(future.result())
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    out = Path(options.out)
    if options.defects:
        spoil(out, rows)
    tables.write_csv(out / "truth.csv", rows, digits=6)
    told = ("seed", "n_cases", "shape", "time_points", "frame_s", "noise")
    record = {"source": "phantom"} | {name: getattr(options, name) for name in told}
    record |= {"voxel_mm": grid_mm(options.shape, options.voxel), "labels": {"core": CORE, "penumbra": PENUMBRA},
               "lesion_masks": [path.name for path in masks]}  # fmt: skip
    write_json(out / "phantom.json", record)
    volumes = [row["core_ml"] for row in rows if row["core_ml"]]
    cores = f"cores of {min(volumes):.1f} to {max(volumes):.1f} ml, " if volumes else ""
    print(f"{len(rows)} cases in {out / 'raw'}: {cores}{len(rows) - len(volumes)} without lesion")
    size = " x ".join(f"{v:.4g}" for v in grid_mm(options.shape, options.voxel))
    print(f"{' x '.join(map(str, options.shape))} voxels of {size} mm, {options.time_points} time points")
    for row in rows:
        if row["defect"]:
            print(f"spoilt: {row['case']}: {row['defect']}")


if __name__ == "__main__":
    cli.run(main)
