"""Has the generator copied its training set? Nearest training neighbours of synthetic and of held-out real volumes.

    python neuroldm3d/diffusion/memorisation.py                          # after VAE/save_latent.py and save_synth.py
    python neuroldm3d/diffusion/memorisation.py --features classifier    # the same in a feature space beside it

Every volume is represented by the VAE latent of what the decoder makes of it, encode(decode(.)), real and synthetic
alike; distance is the mean squared difference. Two questions are kept apart. Copies: is a synthetic volume as close to
a training volume as no held-out one could be by chance, or do synthetic volumes prefer training volumes to held-out
ones? Closeness: are they nearer to the training set than held-out volumes are? Over-smooth or little varied samples
are, without copying anyone, so this warns and the diversity beside it explains. Writes OUTPUT_DIR/summary.json,
pairs.csv (every synthetic volume with its nearest training volume), distances.npz and pictures of the closest pairs.
"""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

import numpy as np

from common import cli
from common.cli import CommonOptions, UserError, option
from neuroldm3d.diffusion import fid
from neuroldm3d.diffusion.per_slice_fid import WEIGHTS

HERE = Path(__file__).resolve().parents[1]
COINCIDENCE = 0.25  # of the median nearest distance among held-out volumes: closer is the same head, not a similar one
ALPHA = 0.01
LOW_DIVERSITY = 0.8  # median distance within the synthetic set over that within the real one
KEYS_AT_ONCE = 256  # training volumes per block of the distance matrix
PERMUTATIONS = 9999


@dataclass
class Options(CommonOptions):
    root: str = option(str(HERE), "folder that holds data_csvs/, synthetic_data/, latent_data/ and runs/")
    synthetic_folder: str = option("", "synthetic volumes; empty: ROOT/synthetic_data")
    real_csv: str = option("", "held-out real volumes; empty: ROOT/data_csvs/test.csv")
    latents: str = option("", "latents of the training set (VAE/save_latent.py); empty: ROOT/latent_data")
    vae: str = option("", "VAE of the latents; empty: ROOT/runs/vae/best_vae.pth")
    output_dir: str = option("", "empty: ROOT/memorisation_results")
    label_column: str = option("HC_vs_LTLE_vs_RTLE_string", "column of the label")
    cache: str = option("", "LMDB cache of prepared volumes; empty: ROOT/data/cache; none: no cache")
    round_trip: bool = option(True, "represent real volumes by encode(decode(latent)), as synthetic ones are")
    features: str = option("none", "second space", choices=("none", "classifier", "medicalnet"))
    weights: str = option("", "weights file of --features; empty: as in per_slice_fid.py")
    batch_size: int = option(2, "volumes encoded and decoded together", unit="volumes")
    top_pairs: int = option(6, "closest pairs to draw")
    ms_ssim_pairs: int = option(20, "random pairs per set for MS-SSIM diversity; 0: none")
    trust_pickle: bool = option(False, "allow a VAE file that needs pickle; it can run code")
    overwrite: bool = option(False, "replace the results of --output_dir")

    def __post_init__(self):
        if self.batch_size < 1 or min(self.seed, self.top_pairs, self.ms_ssim_pairs) < 0:
            raise UserError("--batch_size is at least 1; --seed, --top_pairs and --ms_ssim_pairs are 0 or more")
        root = Path(self.root)
        self.synthetic_folder = self.synthetic_folder or str(root / "synthetic_data")
        self.real_csv = self.real_csv or str(root / "data_csvs" / "test.csv")
        self.latents = self.latents or str(root / "latent_data")
        self.vae = self.vae or str(root / "runs" / "vae" / "best_vae.pth")
        self.output_dir = self.output_dir or str(root / "memorisation_results")
        self.cache = self.cache or str(root / "data" / "cache")
        self.weights = self.weights or str(root / WEIGHTS.get(self.features, ""))


# ---- distances


def distance_matrix(queries, keys) -> np.ndarray:
    """Mean squared difference (n, m) float64 of rows (n, d) and (m, d), a block of keys at a time."""
    blocks = (keys[i : i + KEYS_AT_ONCE] for i in range(0, len(keys), KEYS_AT_ONCE))
    return np.concatenate([fid.distances(queries, block) for block in blocks], axis=1)


def nearest(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest distance (n,) of each row and its column (n,)."""
    index = matrix.argmin(1)
    return matrix[np.arange(len(matrix)), index], index


def nearest_within(x) -> np.ndarray:
    """Distance (n,) of each row of (n, d) to the nearest other row."""
    matrix = distance_matrix(x, x)
    np.fill_diagonal(matrix, np.inf)
    return matrix.min(1)


def describe(values) -> dict[str, float]:
    """n, mean, std (population), min, p5, q1, median, q3, max."""
    values = np.asarray(values, np.float64)
    p5, q1, median, q3 = np.percentile(values, [5, 25, 50, 75])
    return {"n": len(values), "mean": float(values.mean()), "std": float(values.std()), "min": float(values.min()),
            "p5": float(p5), "q1": float(q1), "median": float(median), "q3": float(q3),
            "max": float(values.max())}  # fmt: skip


# ---- statistics


def compare(d_real, d_fake) -> dict:
    """Tests between the nearest-neighbour distances of held-out real and of synthetic volumes, and three thresholds.

    ks_stat, ks_p (two-sided Kolmogorov-Smirnov), mwu_two_sided_p, mwu_fake_less_p (Mann-Whitney), median_ratio, and for
    each of "min", "1%", "5%" of the real distances: the threshold, how many synthetic ones lie below, their share, and
    p: the chance of at least so many if both sets were drawn alike.
    """
    from scipy import stats

    d_real, d_fake = np.asarray(d_real, np.float64), np.asarray(d_fake, np.float64)
    ks = stats.ks_2samp(d_real, d_fake)
    result = {
        "ks_stat": float(ks.statistic),
        "ks_p": float(ks.pvalue),
        "mwu_two_sided_p": float(stats.mannwhitneyu(d_real, d_fake, alternative="two-sided").pvalue),
        "mwu_fake_less_p": float(stats.mannwhitneyu(d_fake, d_real, alternative="less").pvalue),
        "median_ratio": float(np.median(d_fake) / max(np.median(d_real), 1e-300)),
        "thresholds": {},
    }
    levels = {"min": d_real.min(), "1%": np.percentile(d_real, 1), "5%": np.percentile(d_real, 5)}
    for name, level in levels.items():
        below, real_below = int((d_fake < level).sum()), int((d_real < level).sum())
        result["thresholds"][name] = {
            "distance": float(level), "count": below, "share": below / len(d_fake),
            "p": chance_below(below, len(d_fake), real_below, len(d_real)),
        }  # fmt: skip
    return result


def chance_below(count: int, n_fake: int, real_below: int, n_real: int) -> float:
    """Probability that at least `count` of n_fake values lie below the (real_below + 1)-th smallest of n_real.

    All values drawn alike: then the first count + real_below of the pooled order hold at least `count` fakes.
    """
    from scipy import stats

    if count == 0:
        return 1.0
    return float(stats.hypergeom.sf(count - 1, n_real + n_fake, n_fake, count + real_below))


def training_preference(to_train: np.ndarray, to_real: np.ndarray, seed: int) -> dict[str, float]:
    """Share of synthetic volumes whose nearest real volume is a training one, against what chance gives.

    to_train (n, n_train), to_real (n, n_held_out): distances. If nothing was copied, a synthetic volume's nearest real
    volume is a training one as often as training volumes are among all: the p-value permutes who was in training.
    Smooth or little varied samples do not change that, as their closeness holds for held-out volumes as well.
    """
    n_train, n_real = to_train.shape[1], to_real.shape[1]
    _, index = nearest(np.concatenate([to_train, to_real], axis=1))
    hits = np.bincount(index, minlength=n_train + n_real)
    observed, rng = hits[n_train:].sum(), np.random.default_rng(seed)
    permuted = np.array([hits[rng.permutation(len(hits))[:n_real]].sum() for _ in range(PERMUTATIONS)])
    p = (1 + (permuted <= observed).sum()) / (1 + PERMUTATIONS)
    return {"share": float(1 - observed / len(index)), "expected": n_train / (n_train + n_real), "p": float(p)}


def coincidence_limit(real) -> float:
    """Distance below which two volumes are the same head, from held-out volumes (n, d); UserError if all are alike."""
    limit = COINCIDENCE * float(np.median(nearest_within(real)))
    if not limit > 0:
        raise UserError("the held-out volumes do not differ in this representation; train the network longer")
    return limit


def audit(train, real, fake, *, seed: int = 0, direct=None) -> dict:
    """Distances, tests and verdict of one representation: rows (n, d) of training, held-out and synthetic volumes.

    direct: (training, held-out) volumes as they are, if `train` and `real` hold them after a round trip through the
    VAE: a file copied into the synthetic folder has not been decoded, so copies are looked for there as well. Held-out
    volumes that coincide with a training volume (the same head under another name) say nothing about chance and are
    left out, counted and named by index. In the arrays `copy_ratio` is a synthetic volume's distance to training
    volume `copy_of` over the limit of coincidence: a copy below 1.
    """
    for name, rows in (("training", train), ("held-out", real), ("synthetic", fake)):
        if len(rows) < 2:
            raise UserError(f"{len(rows)} {name} volumes; the memorisation check needs at least 2 of each kind")
    to_train, to_real = distance_matrix(fake, train), distance_matrix(fake, real)
    (d_real, nn_real), (d_fake, nn_fake) = nearest(distance_matrix(real, train)), nearest(to_train)
    limit = coincidence_limit(real)
    kept = d_real >= limit
    if kept.sum() < 2:
        raise UserError("nearly all held-out volumes are in the training set as well; split anew with data_split.py")
    copy_ratio, copy_of = d_fake / limit, nn_fake
    if direct is not None:
        d_direct, nn_direct = nearest(distance_matrix(fake, direct[0]))
        d_direct = d_direct / coincidence_limit(direct[1])
        copy_of = np.where(d_direct < copy_ratio, nn_direct, copy_of)
        copy_ratio = np.minimum(copy_ratio, d_direct)
    self_real, self_fake = nearest_within(np.asarray(real)[kept]), nearest_within(fake)
    arrays = {"d_real": d_real, "nn_real": nn_real, "d_fake": d_fake, "nn_fake": nn_fake, "copy_ratio": copy_ratio,
              "copy_of": copy_of, "self_real": self_real, "self_fake": self_fake}  # fmt: skip
    result = {
        "n": {"training": len(train), "held_out": len(real), "synthetic": len(fake)},
        "coincident_held_out": np.flatnonzero(~kept).tolist(),
        "coincidence_limit": limit,
        "copies": np.flatnonzero(copy_ratio < 1).tolist(),
        "d_real": describe(d_real[kept]),
        "d_fake": describe(d_fake),
        "compare": compare(d_real[kept], d_fake),
        "training_preference": training_preference(to_train, to_real[:, kept], seed),
        "diversity_ratio": float(np.median(self_fake) / max(np.median(self_real), 1e-300)),
        "distinct_training_neighbours": {
            "held_out": len(np.unique(nn_real[kept])),
            "synthetic": len(np.unique(nn_fake)),
        },
    }
    if not kept.all():
        result["compare_with_coincident"] = compare(d_real, d_fake)
    return result | {"verdict": verdict(result), "arrays": arrays}


def verdict(result: dict) -> dict:
    """{"memorised", "closer_than_held_out", "low_diversity", "text"}, from the numbers of `audit` and nothing else."""
    n, copies, preference = result["n"]["synthetic"], len(result["copies"]), result["training_preference"]
    thresholds, ratio = result["compare"]["thresholds"], result["diversity_ratio"]
    prefers = preference["p"] < ALPHA
    closer = [name for name, t in thresholds.items() if t["p"] < ALPHA]
    chosen = (
        f"{preference['share']:.0%} have a training volume as nearest real one, {preference['expected']:.0%} expected"
    )
    sentences = [
        f"{copies} of {n} synthetic volumes coincide with a training volume",
        f"{chosen} (p = {preference['p']:.2g})",
        "; ".join(f"{t['share']:.1%} lie below the {name} of held-out volumes" for name, t in thresholds.items()),
    ]
    if closer:
        why = "" if copies or prefers else ", without preferring training volumes: smooth or alike"
        sentences.append(f"closer to the training set than held-out volumes are (by {', '.join(closer)}){why}")
    if ratio < LOW_DIVERSITY:
        sentences.append(f"low diversity: nearest neighbours within the set at {ratio:.2f} of the real distance")
    memorised = bool(copies or prefers)
    text = ("MEMORISED: " if memorised else "no copies found: ") + "; ".join(sentences)
    return {
        "memorised": memorised,
        "closer_than_held_out": closer,
        "low_diversity": ratio < LOW_DIVERSITY,
        "text": text,
    }


def ms_ssim_diversity(volumes, data_range: float, pairs: int, seed: int) -> dict:
    """Mean MS-SSIM of random pairs of volumes (D, H, W), lower is more diverse; with the number of scales that fits.

    volumes: a sequence; only two at a time are held if it loads them on access.
    """
    from common import metrics

    rng, n = np.random.default_rng(seed), len(volumes)
    possible = [(i, j) for i in range(n) for j in range(i)]
    chosen = [possible[k] for k in rng.permutation(len(possible))[:pairs]]
    if not chosen:
        return {"pairs": 0}
    scales = int(np.clip(np.log2(min(volumes[0].shape) / 11) + 1, 1, len(metrics.MS_SSIM_WEIGHTS)))
    values = [metrics.ms_ssim(volumes[i], volumes[j], data_range=data_range, scales=scales) for i, j in chosen]
    return {"pairs": len(values), "scales": scales, "data_range": data_range} | metrics.summary(values, seed=seed)


# ---- the script


class Loaded:
    """A sequence of volumes that are loaded on access, in native units."""

    def __init__(self, rows, volumes):
        self.rows, self.volumes = rows, volumes

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        from neuroldm3d.preprocess import denormalise

        return denormalise(self.volumes.load(self.rows[index]), self.volumes.prep)


def represent(items, load_mu, options: Options, trained, network, rt, what: str) -> dict[str, np.ndarray]:
    """{"direct", "latent", "features"} rows of all items; load_mu(item) -> (mu (C, d, h, w), volume or None).

    A volume is given for synthetic items, which have been decoded already. Ranks share the items.
    """
    import torch

    from common.runlog import progress
    from neuroldm3d.VAE import latents

    mine, rows = rt.shard(items), []
    with progress(len(mine), 0, what, enabled=rt.is_main) as bar:
        for start in range(0, len(mine), options.batch_size):
            loaded = [load_mu(item) for item in mine[start : start + options.batch_size]]
            mu = torch.stack([m for m, _ in loaded])
            volume = torch.stack([v for _, v in loaded]) if loaded[0][1] is not None else None
            row = {"direct": mu}
            if volume is None and options.round_trip:
                volume = latents.decode(trained.model, mu, rt)
                mu = latents.encode(trained.model, volume[:, None], rt)[0]
            row["latent"] = mu
            if network is not None:
                volume = latents.decode(trained.model, mu, rt) if volume is None else volume
                row["features"] = torch.from_numpy(network([volume.numpy()], rt))
            rows.append({name: value.flatten(1).numpy() for name, value in row.items()})
            bar.update(len(loaded))
    part = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]} if rows else {}
    parts = [p for p in rt.gather(part) if p]
    whole = {}
    for name in parts[0]:
        whole[name] = np.empty((len(items), parts[0][name].shape[1]), np.float32)
        for rank, p in enumerate(parts):
            whole[name][rank :: rt.world_size] = p[name]
    return whole


def check_memorisation(options: Options, rt) -> dict:
    """Audit in latent space, and in feature space on request; writes OUTPUT_DIR and returns summary.json's content."""
    import torch

    from common import training
    from common.runlog import git_revision
    from neuroldm3d import dataset
    from neuroldm3d.diffusion.evaluation import synthetic_rows
    from neuroldm3d.diffusion.features import load_features
    from neuroldm3d.VAE import latents

    # ---- setup
    out = Path(options.output_dir)
    if (out / "summary.json").exists() and not options.overwrite:
        raise UserError(f"{out} holds results already; name another --output_dir or add --overwrite")
    rt.barrier()  # every rank has looked before rank 0 writes
    trained = latents.load_vae(Path(options.vae), rt, trust_pickle=options.trust_pickle)
    record = latents.read_record(Path(options.latents))
    if record["vae"] != trained.hash:
        raise UserError(
            f"{options.latents} holds latents of another VAE than {options.vae}; run VAE/save_latent.py again"
        )
    prep = trained.preparation
    volumes = dataset.Volumes(prep, None if options.cache == "none" else options.cache)
    network = load_features(options.features, options.weights, prep, rt) if options.features != "none" else None

    # ---- data
    names = record["splits"]["train"]["names"]
    real, fake = dataset.read_table(options.real_csv, options.label_column), synthetic_rows(options.synthetic_folder)
    if leaked := sorted(set(names) & {row.name for row in real}):
        raise UserError(f"{len(leaked)} held-out volumes are in the training set, such as {leaked[0]}; give --real_csv "
                        "a table of others")  # fmt: skip

    def mu_of_training(name):
        return latents.read_latent(latents.latent_path(Path(options.latents), "train", name))[0], None

    def mu_of_real(row):
        return latents.encode(trained.model, volumes.tensor(row)[None], rt)[0][0], None

    def mu_of_fake(row):
        volume = volumes.tensor(row)
        return latents.encode(trained.model, volume[None], rt)[0][0], volume[0]

    parts = {
        "train": represent(names, mu_of_training, options, trained, network, rt, "training set"),
        "real": represent(real, mu_of_real, options, trained, network, rt, "held-out set"),
        "fake": represent(fake, mu_of_fake, options, trained, network, rt, "synthetic set"),
    }

    # ---- audit
    if not rt.is_main:
        rt.barrier()
        return {}
    spaces = {"latent": (parts["train"]["direct"], parts["real"]["direct"]) if options.round_trip else None}
    if network is not None:
        spaces["features"] = None
    found = {s: audit(*(parts[k][s] for k in ("train", "real", "fake")), seed=options.seed, direct=direct)
             for s, direct in spaces.items()}  # fmt: skip
    arrays = {f"{space}_{name}": value for space, r in found.items() for name, value in r.pop("arrays").items()}
    labels = {"held_out": [row.name for row in real], "synthetic": [row.name for row in fake], "training": names}
    for r in found.values():
        r["coincident_held_out"] = [labels["held_out"][i] for i in r["coincident_held_out"]]
        r["copies"] = [labels["synthetic"][i] for i in r["copies"]]
    summary = {
        "memorised": any(r["verdict"]["memorised"] for r in found.values()),
        "spaces": found,
        "representation": "encode(decode(latent)) of real, encode(volume) of synthetic" if options.round_trip
        else "encode(volume)",
        "features": network.record if network else None,
        "ms_ssim": diversity({"held_out": real, "synthetic": fake}, volumes, options),
        "vae": trained.hash,
        "options": training.recorded(options),
        "git_revision": git_revision(),
    }  # fmt: skip

    # ---- report
    def decoded(index):
        mu = mu_of_training(names[index])[0]
        return latents.decode(trained.model, torch.as_tensor(mu)[None], rt)[0].numpy()

    write(out, summary, arrays, labels, {"volumes": volumes, "fake": fake, "decoded": decoded}, options)
    for space, r in found.items():
        print(f"{space}: {r['verdict']['text']}")
    print(f"full report: {out / 'summary.json'}")
    rt.barrier()
    return summary


def diversity(sets: dict, volumes, options: Options) -> dict:
    """MS-SSIM within each set and class; grey-matter fraction has range 1, z-scores are taken to span 10."""
    from neuroldm3d.dataset import CLASSES

    data_range, result = 1.0 if volumes.prep.norm == "native" else 10.0, {}
    for name, rows in sets.items():
        for label, title in enumerate(CLASSES):
            chosen = Loaded([row for row in rows if row.label == label], volumes)
            if options.ms_ssim_pairs and len(chosen) > 1:
                found = ms_ssim_diversity(chosen, data_range, options.ms_ssim_pairs, options.seed)
                result.setdefault(name, {})[title] = found
    return result


def write(out: Path, summary: dict, arrays: dict, labels: dict, pictures: dict, options: Options) -> None:
    """distances.npz, pairs.csv, pictures, and summary.json last."""
    from common import figures
    from common.checkpoint import replacing
    from common.runlog import write_json
    from neuroldm3d.preprocess import denormalise, units

    out.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with replacing(out / "distances.npz") as file:
        file.write(buffer.getvalue())

    ratio, index = arrays["latent_copy_ratio"], arrays["latent_copy_of"]
    order = np.argsort(ratio, kind="stable")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["synthetic", "nearest_training", "distance_over_limit", "copy"])
    for i in order:
        name, neighbour = labels["synthetic"][i], labels["training"][index[i]]
        table.writerow([name, neighbour, f"{ratio[i]:.6g}", int(ratio[i] < 1)])
    with replacing(out / "pairs.csv") as file:
        file.write(text.getvalue().encode())

    lines = {}
    for key, name in (("d_real", "held-out real"), ("d_fake", "synthetic")):
        values = np.sort(arrays[f"latent_{key}"])
        lines[f"{name} to training"] = values, np.arange(1, len(values) + 1) / len(values)
    figures.curves(out / "distances.png", lines, xlabel="distance to the nearest training volume", ylabel="share")
    volumes = pictures["volumes"]
    for rank, i in enumerate(order[: options.top_pairs], 1):
        pair = {
            "synthetic": volumes.load(pictures["fake"][i]),
            "nearest training, decoded": pictures["decoded"](index[i]),
        }
        # figures wants RAS+; volumes are LAS+
        shown = {name: denormalise(volume, volumes.prep)[::-1] for name, volume in pair.items()}
        title = f"{labels['synthetic'][i]} and {labels['training'][index[i]]}"
        figures.montage(out / "pairs" / f"pair_{rank:02d}.png", shown, difference_to="nearest training, decoded",
                        unit=units(volumes.prep), title=title)  # fmt: skip
    write_json(out / "summary.json", summary)


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    from common import runtime

    with runtime.start(options.device, options.precision, options.seed) as rt:
        check_memorisation(options, rt)


if __name__ == "__main__":
    cli.run(main)
