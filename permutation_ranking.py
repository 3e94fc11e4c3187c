"""Audio representations from shuffled spectrograms, after M. Carr, Q. Berthet, M. Blondel, O.
Teboul and N. Zeghidour, "Self-supervised learning of audio representations from permutations with
differentiable ranking", IEEE Signal Processing Letters 2021 (arXiv 2103.09879).

Cut the log spectrogram of a note into n patches (10 frequency bands), shuffle them, and score the
slots so that sorting by score puts the patches in order: a context-free encoder sees one patch at a
time, a joint head all. The loss compares soft ranks of the scores with the true ranks, or is the
Fenchel-Young loss of perturbed ranks; baselines regress the ranks (mse) or name one of 100 fixed
permutations (classification). A 3-layer MLP on the frozen encoder then learns family, instrument
and pitch from few labels.

Measured (demo, 800 labels, 3 seeds, one thread; family accuracy and pitch error in semitones
squared on unseen instruments): soft_rank .430 ± .013, 11.3 ± 0.5; fenchel_young .407, 11.6; mse
.409, 11.7; classification .425 ± .005, 12.5 ± 1.1; random encoder .352 ± .010, 21.7 ± 1.2;
supervised .394, 9.1; statistics .263, 45. By the paper's layer: fenchel_young .351 ± .018, 17.9 ±
1.3; mse .338, 18.6; soft_rank .312, 20.7; random .324 ± .014, 24.9; classification .300, 33.

    python permutation_ranking.py                        demo: makes its own notes
    python permutation_ranking.py --data ./nsynth        NSynth; or any audio, without scores
    python permutation_ranking.py --predict note.wav     family and pitch of a note
    python permutation_ranking.py --predict --data DIR   the trained encoders, scored on other notes

Differences from the paper, whose choice stands in brackets; it leaves sizes, epsilon, sigma and
normalisation open
- Patches are standardised: else loudness gives their order away, and the embedding has less pitch.
- The embedding is what the convolutions make of all patches, in order (chosen by cross-validation
  on recorded notes, none of the test). The paper's, the joint layer, has rows of its own; --setting
  paper has that alone.
- Small encoder, frames averaged by four, views of 1 s, to end in minutes; --setting paper has the
  AlexNet-like one, all frames and 4 s.
- AdamW, one cycle, clipped gradients (Adam, 1e-6 constant: its 1000 epochs are 9 million steps).
- fenchel_young takes its expectation over the noise in closed form (sampled). epsilon = sigma = 1.
- classification has 100 permutations, for Fig. 2 too (1000). Out of 10 000, each is the farthest
  from its nearest predecessor (Noroozi & Favaro 2016: by the sum over all). It need only tell these
  apart, so do not compare its partial ranks with the other arms'.
- The MLP clips its inputs at 3 sd, smooths its labels by 0.1 and trains for 30 epochs (not stated;
  validation cross-entropy would stop it after one, far from its best accuracy).
- "supervised" learns family and pitch in one network, read like the others (end to end, one each).
- Labelled notes are drawn at random: a few do not show all instruments.
- Beside the MLP: linear probes, chroma, a split of seen instruments, statistics of the spectrum.

Copy this file and common.py; nothing else is needed.
"""

import argparse
import itertools
import json
import math
import time
from collections import namedtuple
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common import (LogMel, die, end_run, find_audio, in_background, linear_probe, load_checkpoint,
                    make_folder, open_run, random_key, rank_and_size, read_audio, report, run,
                    save, save_first, scan_audio, soft_rank, start_run, training, write_whole)

# -----------------------------------------------------------------------------
# Hyper-parameters: `demo` applies without --data, `data` with it; `paper`: as far as published.

HYPER_PARAMETERS = {  # name: (demo, data, paper, meaning)
    "steps": (300, 600, 9000000, "optimiser steps of every trained arm (paper: 1000 epochs)"),
    "batch_size": (32, 32, 32, "notes in a step"),
    "lr": (1e-3, 1e-3, 1e-6, "peak learning rate of one cycle (paper: constant)"),
    "label_counts": ((200, 800), (500, 1000, 3000, 5000, 10000), (500, 1000, 3000, 5000, 10000),
                     "labelled notes, as far as the data go"),
    "network": ("small", "small", "alexnet", "small: convolutions over time; alexnet: the paper's"),
    "hidden": (256, 256, 512, "width of the MLP's first layer, twice that of its second"),
}
LIMITS = {"steps": (2, 10**8), "batch_size": (2, 10**5), "lr": (1e-9, 10), "seed": (0, 2**32),
          "label_counts": (20, 10**7), "hidden": (2, 10**5), "bands": (1, 60), "slices": (1, 12),
          "workers": (0, 64)}
FIXED_PERMUTATIONS, SAMPLE_RATE = 100, 16000  # classes of the classification arm; Hz
TEMPERATURE = 1.0  # epsilon of soft_rank, sigma of fenchel_young (not published)
FAMILIES = "bass brass flute guitar keyboard mallet organ reed string synth_lead vocal".split()
PRETEXT = ("partial_ranks", "kendall_tau", "zero_gradient")  # metrics of the pretext task
VERSION = "permutation_ranking 8"  # of the checkpoint's contents


def parse_args(argv=None) -> argparse.Namespace:
    """The command line, completed from the column of HYPER_PARAMETERS that applies."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0])
    parser.error = die  # one line, without the usage
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="NSynth or any audio (default: makes its own)")
    add("--losses", nargs="+", default=list(LOSSES), choices=LOSSES, help="the paper's arms")
    add("--bands", type=int, nargs="+", default=[10], help="frequency bands (1: time slices only)")
    add("--slices", type=int, nargs="+", default=[1], help="time slices, as many as --bands")
    add("--setting", choices=["demo", "data", "paper"], help="column of the defaults below")
    special = {"label_counts": {"nargs": "+", "type": int}, "network": {"choices": NETWORKS}}
    for name, (demo, data, paper, meaning) in HYPER_PARAMETERS.items():
        add("--" + name.replace("_", "-"), **special.get(name, {"type": type(paper)}),
            help=f"{meaning} (demo {demo}, data {data}, paper {paper})")
    add("--out", type=Path, default=Path("out/permutation_ranking"), metavar="DIR", help="results")
    add("--seed", type=int, nargs="+", default=[0], help="several give mean and sd")
    add("--device", default="", help="cpu, cuda or mps (default: the best)")
    add("--workers", type=int, default=2, help="threads that read audio; changes no result")
    add("--resume", action="store_true", help="go on from --out/checkpoint.pt, as started")
    add("--predict", nargs="*", metavar="FILE", help="print family and pitch of these notes; "
        "without FILE: score what was trained on the notes of --data")
    args = parser.parse_args(argv)
    args.setting = args.setting or ("data" if args.data else "demo")
    for name, columns in HYPER_PARAMETERS.items():
        if getattr(args, name) is None:
            setattr(args, name, columns[("demo", "data", "paper").index(args.setting)])
    for name, (low, high) in LIMITS.items():
        if not all(low <= value <= high for value in np.ravel(getattr(args, name))):
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}")
    if len(args.bands) != len(args.slices) or min(np.multiply(args.bands, args.slices)) < 2:
        parser.error("--bands and --slices need equally many values, every pair 2 patches or more")
    if len(set(zip(args.bands, args.slices))) < len(args.bands):
        parser.error("--bands and --slices name the same grid twice")
    if args.predict == [] and not args.data:
        parser.error("--predict needs FILE... or --data DIR")
    args.seed, args.losses = list(dict.fromkeys(args.seed)), list(dict.fromkeys(args.losses))
    return args


# -----------------------------------------------------------------------------
# Data: the demo's own notes, in NSynth's layout. Letters: S samples, K partials.

SOUNDS = {  # attack s, decay s, inharmonicity, vibrato, noise, roll-off, loss of even partials
    "bass": (0.01, 1.5, 4e-4, 0.0, 0.02, 1.8, 0.0),
    "brass": (0.05, 4.0, 0.0, 0.005, 0.03, 0.8, 0.0),
    "flute": (0.08, 4.0, 0.0, 0.010, 0.10, 2.2, 0.0),
    "guitar": (0.01, 1.2, 3e-4, 0.0, 0.03, 1.2, 0.4),
    "keyboard": (0.01, 2.0, 1e-3, 0.0, 0.03, 1.5, 0.0),
    "mallet": (0.005, 0.8, 2e-2, 0.0, 0.05, 1.5, 0.3),
    "organ": (0.03, 4.0, 0.0, 0.0, 0.02, 1.2, 0.0),
    "reed": (0.04, 4.0, 0.0, 0.004, 0.06, 1.0, 0.9),
    "string": (0.10, 4.0, 0.0, 0.015, 0.05, 1.1, 0.0),
    "vocal": (0.08, 4.0, 0.0, 0.025, 0.05, 1.0, 0.0),
}
NOTES = {"train": (20, 5), "valid": (4, 5), "test": (8, 4)}  # instruments per family, notes of each


def make_note(family: str, instrument: int, pitch: int, velocity: int, rng) -> np.ndarray:
    """A note of 2 s, (S,) float32. Families overlap: an instrument strays from its family's sound,
    and each note has a loudness, an equaliser (its room) and background noise of its own."""
    *varied, roll_off, lack = SOUNDS[family]
    own = np.random.default_rng(random_key("instrument", instrument))  # alike in all of its notes
    attack, decay, inharmonicity, vibrato, noise = varied * own.lognormal(0, 0.4, 5)
    roll_off += own.normal(0, 0.15)
    formants, widths = np.exp(own.uniform(5.5, 8.5, 3)), own.uniform(0.15, 0.5, 3)  # Hz, octaves

    k = np.arange(1, 25)  # (K,)
    frequency = 440 * 2 ** ((pitch - 69 + rng.normal(0, 0.05)) / 12) * k
    frequency = frequency * np.sqrt(1 + inharmonicity * k**2)  # of a stiff string
    audible = frequency < 7600  # Hz: below the 8000 of this sample rate
    k, frequency = k[audible], frequency[audible]
    level = k ** -(roll_off + 0.6 * (0.5 - velocity / 127)) * np.where(k % 2, 1, 1 - lack)
    level *= 0.5 + np.exp(-0.5 * (np.log2(frequency[:, None] / formants) / widths) ** 2).sum(1)

    t = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    # 35 is 2 pi 5.5: the frequency then sways by the fraction `vibrato`
    wobble = vibrato * np.sin(2 * np.pi * rng.uniform(4.5, 6.5) * t + rng.uniform(0, 6)) / 35
    cycles = frequency[:, None] * (t + wobble) + rng.random((len(k), 1))  # (K, S)
    partials = np.sin(2 * np.pi * (cycles - np.floor(cycles)).astype(np.float32))
    partials *= np.exp(np.outer(-(k**0.5) / decay, t).astype(np.float32))  # the higher die sooner
    waveform = level @ partials + 0.3 * noise * level.sum() * rng.standard_normal(len(t))
    waveform *= np.minimum(1, t / attack) * np.minimum(1, (2 - t) / 0.1)

    octaves = np.log2(np.fft.rfftfreq(len(t), 1 / SAMPLE_RATE) + 60)
    room = np.interp(octaves, np.linspace(5.9, 13, 9), rng.normal(0, 8, 9))  # dB
    waveform = np.fft.irfft(np.fft.rfft(waveform) * 10 ** (room / 20))
    waveform *= 10 ** rng.uniform(-1.3, -0.1) / np.abs(waveform).max()
    background = np.convolve(rng.standard_normal(len(t) + 7), rng.standard_normal(8), "valid") / 3
    waveform = waveform + 10 ** rng.uniform(-3, -1.2) * background
    return (10 ** rng.uniform(-1.5, 0) * waveform).astype(np.float32)


def write_note(item: tuple, folder: Path) -> tuple[str, dict]:
    """Writes a generated note as a wav file; its name and labels."""
    family, instrument, number = item
    rng = np.random.default_rng(random_key(instrument, number))
    lowest = random_key("compass", instrument) % 32 + 28  # of three octaves
    pitch, velocity = int(lowest + rng.integers(36)), int(rng.choice([25, 50, 75, 100, 127]))
    name = f"{family}_synthetic_{instrument:03d}-{pitch:03d}-{velocity:03d}-{number}"
    note = make_note(family, instrument, pitch, velocity, rng)
    soundfile.write(folder / "audio" / f"{name}.wav", note, SAMPLE_RATE)
    return name, {"pitch": pitch, "velocity": velocity, "instrument": instrument,
                  "instrument_family": FAMILIES.index(family)}


def write_notes(folder: Path, workers: int):
    """The demo's data set; no instrument is in two splits."""
    numbers = itertools.count()  # of the instruments
    for split, (instruments, notes) in NOTES.items():
        part = folder / f"nsynth-{split}"
        make_folder(part / "audio")
        players = [(family, next(numbers)) for family in SOUNDS for _ in range(instruments)]
        todo = [(*player, note) for player in players for note in range(notes)]
        records = dict(in_background(partial(write_note, folder=part), todo, workers))
        (part / "examples.json").write_text(json.dumps(records))
    print(f"data   synthetic notes in {folder} (--data DIR: NSynth, or any recordings)")


# -----------------------------------------------------------------------------
# Data: NSynth on disk, or any folder of audio. Letters: B notes, S samples, n patches of H x W.

Note = namedtuple("Note", "path seconds family instrument pitch", defaults=(-1, -1, -1))  # -1: none


def read_labels(file: Path) -> dict[str, tuple]:
    """{name of a note: (family, instrument, pitch)} from an examples.json; {} if it is none."""
    labels = {}
    try:
        records = json.loads(file.read_text()).items()
    except (AttributeError, OSError, RecursionError, ValueError) as error:
        print(f"skip   {file}: not NSynth's labels ({type(error).__name__}: {error})")
        return {}
    for name, r in records:
        with suppress(ArithmeticError, LookupError, TypeError, ValueError):
            labels[name] = int(r["instrument_family"]), int(r["instrument"]), int(r["pitch"])
    if broken := len(records) - len(labels):
        print(f"skip   {file}: {broken} of {len(records)} notes lack a label")
    return labels


def load_notes(folder: Path, workers: int) -> dict[str, list[Note]]:
    """{split: notes} below a folder, of NSynth or parts of it, wherever they lie. Splits: train,
    valid, unseen (NSynth's test), seen (a sixth of train), unlabelled (to pre-train on, too); valid
    and seen are thinned to 2000 at most."""
    paths = find_audio(folder)
    seconds = scan_audio(paths, SAMPLE_RATE, 0.25, workers)  # {path: seconds}
    if not seconds:
        problem = f"{len(paths)} audio files, none to use" if folder.is_dir() else "no such folder"
        die(f"--data {folder}: {problem}; expected nsynth-train/examples.json and "
            "nsynth-train/audio/*.wav, or any audio")
    notes, taken = {"train": [], "valid": [], "test": []}, set()  # labelled or held-out paths
    for file in [f for f in find_audio(folder, {".json"}) if f.name == "examples.json"]:
        labels = read_labels(file)
        below = [path for path in seconds if file.parent in path.parents]
        here = {path.stem: path for path in below}
        found = {name for name, (family, _, pitch) in labels.items()
                 if name in here and 0 <= family < len(FAMILIES) and 0 <= pitch < 128}
        split = next((split for split in notes if split in file.parent.name), "train")
        notes[split] += [Note(str(here[f]), seconds[here[f]], *labels[f]) for f in sorted(found)]
        taken |= {path for path in below if split != "train" or path.stem in found}
        if labels:
            print(f"truth  {file}: {len(found)} notes; {len(labels) - len(found)} have no audio or "
                  "a label out of range")
    # of a note and its copies one is used, in the last split that has it: test, else valid
    split_of = {(Path(note.path).stem, *note[2:]): (note, split)
                for split in notes for note in notes[split]}
    if 0 < len({split for _, split in split_of.values()}) < len(notes):  # only a part of NSynth
        print("truth  not all splits are there: instruments shared out anew, 7 : 1 : 2")
        players = sorted({note.instrument for note, _ in split_of.values()}, key=random_key)
        tenths = itertools.cycle(["test", "valid", *3 * ["train"], "test", *4 * ["train"]])
        split_with = dict(zip(players, tenths))
        split_of = {key: (note, split_with[note.instrument]) for key, (note, _) in split_of.items()}
    notes = {split: [note for note, s in split_of.values() if s == split] for split in notes}
    for split, part in notes.items():
        absent = sorted(set(FAMILIES) - {FAMILIES[note.family] for note in part})
        if part:
            print(f"truth  {split}: {len(part)} notes of {len({n.instrument for n in part})} "
                  f"instruments; families without a note: {', '.join(absent) or 'none'}")
    held_out = lambda note: random_key("seen", Path(note.path).stem) % 6 == 0
    thin = lambda part: part[:: len(part) // 2000 + 1]  # at most 2000, of all families
    notes["seen"] = thin([note for note in notes["train"] if held_out(note)])
    notes["train"] = [note for note in notes["train"] if not held_out(note)]
    notes["unseen"], notes["valid"] = notes.pop("test"), thin(notes["valid"])
    if min(map(len, notes.values())) < 2:
        print("truth  no scores: they need labelled notes of several instruments")
        notes, taken = dict.fromkeys(notes, []), set()
    if shared := {n.instrument for n in notes["train"]} & {n.instrument for n in notes["unseen"]}:
        print(f"truth  {len(shared)} instruments of the test split are in train, too: not unseen")
    taken = {path.stem for path in taken}  # and their copies
    notes["unlabelled"] = [Note(str(p), s) for p, s in seconds.items() if p.stem not in taken]
    if not notes["valid"]:  # every tenth, which is not trained on if there are more
        everything = notes["unlabelled"]
        notes["valid"] = thin(everything[::10])
        notes["unlabelled"] = [note for i, note in enumerate(everything) if i % 10] or everything
    return notes


def deal(notes: list[Note], seed: int, label_counts: list) -> tuple[list[Note], list[int]]:
    """Notes in a random order, and how many of the first to learn from, as far as they go."""
    order = np.random.default_rng(seed).permutation(len(notes))[: max(label_counts)]
    return [notes[i] for i in order], sorted({min(n, len(order)) for n in label_counts} - {0})


def load_view(path: str, start: float, seconds: float) -> Tensor:
    """(S,) samples of a note, with silence behind its end."""
    waveform = read_audio(path, SAMPLE_RATE, start, seconds)
    return F.pad(waveform, (0, round(seconds * SAMPLE_RATE) - len(waveform)))  # below 0: cut off


def load_views(notes: list[Note], seconds: float) -> Tensor:
    """(B, S): the beginnings of notes."""
    return torch.stack([load_view(note.path, start=0.0, seconds=seconds) for note in notes])


def load_batch(step: int, items: range, arm: str, notes: list, seconds: float, fixed: Tensor):
    """(B, S) waveforms; (B, n) permutations, out of those `fixed` (L, n) or, if L is 0, any; (B,)
    which of `fixed`, or -1; (B,) family; (B,) pitch. An item's draws depend on no other item."""
    examples = []
    for item in items:
        rng = np.random.default_rng(random_key(arm, step, item))
        note = notes[rng.integers(len(notes))]
        start = rng.uniform(0, max(0, min(1.0, note.seconds - seconds)))
        choice = int(rng.integers(len(fixed))) if len(fixed) else -1
        permutation = fixed[choice] if choice >= 0 else rng.permutation(fixed.shape[1])
        view = load_view(note.path, start, seconds)
        examples.append((view, permutation, choice, note.family, note.pitch))
    return torch.utils.data.default_collate(examples)


def cut(spectrogram: Tensor, bands: int, slices: int) -> Tensor:
    """(B, F, T) -> (B, n, H, W): n = bands * slices patches of H = F // bands bins, W = T // slices
    frames, numbered row by row, low bands first; what is left of F and T is dropped."""
    H, W = spectrogram.shape[1] // bands, spectrogram.shape[2] // slices
    grid = spectrogram.unfold(1, H, H).unfold(2, W, W)  # (B, F // H, T // W, H, W)
    return grid[:, :bands, :slices].flatten(1, 2)


def shuffle(patches: Tensor, permutation: Tensor) -> Tensor:
    """(B, n, H, W), (B, n) -> same: slot i gets the patch of place permutation[i]."""
    return patches[torch.arange(len(patches), device=patches.device)[:, None], permutation]


def distant_permutations(most: int, n: int) -> Tensor:
    """(L, n), L <= most: greedily, the candidate whose least Hamming distance to those before it is
    largest; candidates are all permutations of 0..n-1, from n = 8 on 10 000."""
    rng = np.random.default_rng(n)
    candidates = torch.tensor(np.array(list(itertools.permutations(range(n))) if n < 8 else
                                       [rng.permutation(n) for _ in range(10**4)]))
    chosen, distance = [], torch.full((len(candidates),), n)
    for _ in range(min(most, len(candidates))):
        chosen.append(distance.argmax().item())
        distance = torch.minimum(distance, (candidates != candidates[chosen[-1]]).sum(1))
    return candidates[chosen]


# -----------------------------------------------------------------------------
# Model. Letters: B notes, n patches of H x W, E features of a patch, D embedding size.


def small_encoder(height: int) -> nn.Module:
    """(B n, H, W) -> (B n, 64): convolutions over time; bins are channels and keep their place."""
    return nn.Sequential(
        nn.Conv1d(height, 64, 3, padding=1), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Conv1d(64, 64, 3, 2, padding=1), nn.BatchNorm1d(64), nn.ReLU(),
        nn.AdaptiveAvgPool1d(2), nn.Flatten(),
        nn.Sequential(nn.Linear(128, 64), nn.ReLU()))  # [-1], the dense part: see embed()


def alexnet_encoder(height: int) -> nn.Module:
    """(B n, H, W) -> (B n, 1024); widths and stride 2 of Noroozi & Favaro 2016 (AlexNet's stride 4
    leaves nothing of 51 bins), padded, and at the end pooled to (2, 4), whatever patches are."""
    return nn.Sequential(
        nn.Unflatten(1, (1, height)),
        nn.Conv2d(1, 96, 11, 2, padding=5), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1),
        nn.Conv2d(96, 256, 5, padding=2, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1),
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d((2, 4)),
        nn.Flatten(), nn.Sequential(nn.Linear(2048, 1024), nn.ReLU(), nn.Dropout(0.5)))


NETWORKS = {  # encoder, E, width of the joint layer, dropout, seconds of a note that are shuffled,
    # frames averaged into one, layer that is the embedding
    "small": (small_encoder, 64, 512, 0.1, 1.0, 4, "convolutions"),
    "alexnet": (alexnet_encoder, 1024, 4096, 0.5, 4.0, 1, "joint"),
}


class ContextFreeNetwork(nn.Module):
    """One encoder for every patch by itself, then two layers for all patches together. By default
    it has n outputs, the scores; with `n_fixed` a logit for each of at most that many fixed
    permutations; or any number of `outputs`."""

    def __init__(self, network: str, bands: int, slices: int, n_fixed=0, outputs=0):
        super().__init__()
        encoder, E, width, dropout, self.seconds, self.averaged, self.layer = NETWORKS[network]
        self.grid, n = (bands, slices), bands * slices
        self.heard = min(4.0, 2 * self.seconds)  # seconds of a note that are embedded
        # windows of 25 ms every 10 ms, 513 linear bins
        self.front_end = LogMel(SAMPLE_RATE, 1024, 160, win_length=400, floor=1e-5)
        self.encoder, self.joint = encoder(513 // bands), nn.Linear(n * E, width)
        self.register_buffer("fixed", distant_permutations(n_fixed, n))  # (L, n), L = 0: any
        self.output = nn.Sequential(nn.Dropout(dropout),
                                    nn.Linear(width, outputs or len(self.fixed) or n))
        if not outputs:
            nn.init.constant_(self.output[1].bias, (n + 1) / 2)  # the mean rank, for mse alone

    def patches(self, frames: Tensor) -> Tensor:
        """(B, F, T) of the front end -> (B, n, H, W), in order."""
        return cut(F.avg_pool1d(frames, self.averaged), *self.grid)

    def embed(self, patches: Tensor) -> dict[str, Tensor]:
        """(B, n, H, W) -> {layer: (B, D)}: the paper's "joint" layer; "convolutions", those of all
        patches, without the encoder's dense part [-1], which keeps less of the pitch."""
        mean, sd = patches.mean((2, 3), keepdim=True), patches.std((2, 3), keepdim=True)
        B = len(patches)
        patches = (patches - mean) / (sd + 0.3)  # otherwise loudness gives the order away
        convolutions = self.encoder[:-1](patches.flatten(0, 1))  # (B n, .)
        features = self.encoder[-1](convolutions).view(B, -1)  # (B, n E)
        return {"convolutions": convolutions.view(B, -1), "joint": F.relu(self.joint(features))}

    def forward(self, patches: Tensor) -> Tensor:
        """(B, n, H, W) -> (B, outputs)."""
        return self.output(self.embed(patches)["joint"])

    def order(self, output: Tensor) -> Tensor:
        """(B, outputs) -> (B, n): the places 0..n-1 that it gives to the slots."""
        return self.fixed[output.argmax(1)] if len(self.fixed) else output.argsort(1).argsort(1)


# -----------------------------------------------------------------------------
# Loss. Letters: theta (B, n) scores; y (B, n) ranks 1..n, the places that the patches came from.


def soft_rank_loss(theta: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """L = 0.5 || r_eps(theta) - y ||^2, soft ranks ascending; (B, n), (B, n) -> (), mean over B.
    Without gradient where all sorted scores lie further apart than epsilon, in whatever order."""
    return 0.5 * (soft_rank(theta, epsilon) - y).square().sum(1).mean()


def fenchel_young_loss(theta: Tensor, y: Tensor, sigma: float, noise="gaussian") -> Tensor:
    """Fenchel-Young loss of perturbed ranks (Berthet et al. 2020, arXiv:2002.08676). Its gradient
    for one note is E[ranks(theta + sigma Z)] - y. (B, n), (B, n) -> (), mean over B.

    A rank counts the smaller scores, so L is a sum over pairs. With d = theta_i - theta_j:
    Gaussian Z, s = sqrt(2) sigma:  L = sum over y_i > y_j of  s phi(d/s) - d Phi(-d/s)
    Gumbel Z:  L = sum over y_i > y_j of  sigma log(1 + exp(-d / sigma)), which is RankNet's loss
    """
    d, s = theta[:, :, None] - theta[:, None], math.sqrt(2) * sigma  # (B, n, n)
    if noise == "gumbel":
        pairs = sigma * F.softplus(-d / sigma)
    else:
        phi = torch.exp(-0.5 * (d / s) ** 2) / math.sqrt(2 * math.pi)
        pairs = s * phi - d * torch.special.ndtr(-d / s)
    return (pairs * (y[:, :, None] > y[:, None])).sum((1, 2)).mean()


# Called with (output, y, choice: which of the fixed permutations, or -1, family, pitch).
LOSSES = {
    "soft_rank": lambda theta, y, *_: soft_rank_loss(theta, y, TEMPERATURE),
    "fenchel_young": lambda theta, y, *_: fenchel_young_loss(theta, y, TEMPERATURE),
    "mse": lambda theta, y, *_: 0.5 * (theta - y).square().sum(1).mean(),
    "classification": lambda logits, y, choice, *_: F.cross_entropy(logits, choice),
}


def pitch_error(output: Tensor, pitch: Tensor) -> Tensor:
    """Squared error of output 0, a pitch in tens of semitones from middle C; (B, .), (B,) -> ()."""
    return (output[:, 0] - (pitch - 60) / 10).square().mean()


def supervised_loss(output: Tensor, y, choice, family: Tensor, pitch: Tensor) -> Tensor:
    """Of pitch, output 0, and family, the logits 1 to 11; (B, 12) -> (). No ranks are asked for."""
    return pitch_error(output, pitch) + F.cross_entropy(output[:, 1:], family)


# -----------------------------------------------------------------------------
# Training: one loop for all arms; only the loss differs.


def train(arm: str, model: nn.Module, loss_of, notes: list, batch_size: int, steps: int, lr: float,
          workers: int, state: dict, shuffled=True):
    """Trains the model in place with loss_of(output, ranks 1..n, choice, family, pitch)."""
    load = partial(load_batch, arm=arm, notes=notes, seconds=model.seconds, fixed=model.fixed.cpu())
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-4)  # training() sets lr
    for (waveform, permutation, *labels), network, losses in training(
            arm, model, optimiser, steps, batch_size, load, workers, state):
        patches = model.patches(model.front_end(waveform))  # (B, n, H, W)
        output = network(shuffle(patches, permutation) if shuffled else patches)
        loss = loss_of(output, permutation + 1.0, *labels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.detach())


# -----------------------------------------------------------------------------
# Evaluation. Letters: N notes, D features; labels (N, 3) are family, instrument, pitch.


def pretext_metrics(model: nn.Module, loss_of, notes: list, workers: int) -> dict:
    """Scores on held-out notes, drawn and shuffled at random: the fraction of patches put in their
    place, Kendall's tau, and the fraction of notes whose loss has no gradient (right or wrong)."""
    sign = lambda order: (order[:, :, None] - order[:, None]).sign()  # (B, n, n)
    load = partial(load_batch, 0, arm="pretext", notes=notes, seconds=model.seconds,
                   fixed=model.fixed.cpu())
    parts, n = [], model.fixed.shape[1]
    batches = [range(i, min(i + 32, len(notes))) for i in range(0, len(notes), 32)]
    for batch in in_background(load, batches, workers):
        waveform, permutation, *labels = (part.to(model.fixed.device) for part in batch)
        patches = model.patches(model.front_end(waveform))  # (B, n, H, W)
        output = model.eval()(shuffle(patches, permutation)).detach().requires_grad_()
        loss = loss_of(output, permutation + 1.0, *labels)
        grad = torch.autograd.grad(loss, output)[0]
        found = model.order(output)
        tau = (sign(found) * sign(permutation)).sum((1, 2)) / (n * (n - 1))
        exact = (found == permutation).float().mean(1)
        parts.append(torch.stack([exact, tau, (grad == 0).all(1).float()]))
    return dict(zip(PRETEXT, torch.cat(parts, 1).mean(1).tolist()))


@torch.no_grad()
def embed(models: dict, notes: list, workers: int) -> dict[str, Tensor]:
    """{row: (N, D)} features of all notes, each read once: for every model {name: network} its
    embedding and, if that is not the joint layer already, "joint layer of <name>"; "statistics",
    mean and deviation of the log spectrum over time; "chance", a constant."""
    features = {}
    batches = [notes[i : i + 32] for i in range(0, len(notes), 32)]
    first = next(iter(models.values()))  # all have the same front end, on the same device
    load = partial(load_views, seconds=first.heard)
    for i, waveform in enumerate(in_background(load, batches, workers, "embed")):
        frames = first.front_end(waveform.to(first.fixed.device))  # (B, F, T)
        new = {"chance": torch.zeros(len(waveform), 1),
               "statistics": torch.cat([frames.mean(2), frames.std(2)], 1)}
        layers = {name: m.eval().embed(m.patches(frames)) for name, m in models.items()}
        new |= {name: layers[name][model.layer] for name, model in models.items()}
        new |= {f"joint layer of {name}": layers[name]["joint"]  # the paper's
                for name, model in models.items() if model.layer != "joint"}
        for name, part in new.items():
            if i == 0:  # whole at once: small parts between large tensors would tie up memory
                features[name] = torch.empty(len(notes), part.shape[1])
            features[name][32 * i : 32 * i + 32] = part
    return features


def make_head(size: int, hidden: int, outputs: int) -> nn.Module:
    """The 3-layer MLP, (N, D) -> (N, outputs). Its batch norm, always in eval mode, standardises by
    the mean and variance that fit_head() sets; clipped, for with few labels one outlier decides."""
    return nn.Sequential(nn.BatchNorm1d(size, affine=False), nn.Hardtanh(-3, 3),
                         nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, hidden // 2),
                         nn.ReLU(), nn.Linear(hidden // 2, outputs)).eval()


def fit_head(x: Tensor, y: Tensor, hidden: int, outputs: int, error) -> nn.Module:
    """Trains a head on features (N, D) and labels (N,) by error(output, label)."""
    head = make_head(x.shape[1], hidden, outputs)
    head[0].running_mean, head[0].running_var = x.mean(0), x.var(0)
    optimiser = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=1e-2, fused=True)
    for _ in range(30):
        for part in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            error(head(x[part]), y[part]).backward()
            optimiser.step()
    return head.requires_grad_(False)


def score(x: dict, labels: dict, count: int, hidden: int, n_instruments: int):
    """Fits MLPs (family_accuracy, instrument_accuracy, pitch_mse) and linear probes (family_linear,
    pitch_accuracy, chroma_accuracy) on the first `count` notes of "train". x: {split: (N, D)},
    labels: {split: (N, 3)}. Returns {"unseen": metrics, "seen": metrics}, the MLPs of family and
    pitch, and the sum of their errors on "valid"."""
    few, few_labels = x["train"][:count], labels["train"][:count]  # (count, D), (count, 3)
    family, instrument, pitch = few_labels.T
    class_error = partial(F.cross_entropy, label_smoothing=0.1)  # or it is too sure of its guesses
    family_head = fit_head(few, family, hidden, len(FAMILIES), class_error)
    pitch_head = fit_head(few, pitch, hidden, 1, pitch_error)
    instrument_head = fit_head(few, instrument, hidden, n_instruments, class_error)
    valid, (valid_family, _, valid_pitch) = x["valid"], labels["valid"].T  # other instruments
    error = (class_error(family_head(valid), valid_family)
             + pitch_error(pitch_head(valid), valid_pitch)).item()
    linear_family = linear_probe(few, F.one_hot(family, len(FAMILIES)).float(), iterations=40)
    linear_pitch = linear_probe(few, F.one_hot(pitch, 128).float(), iterations=40)
    accuracy = lambda guess, truth: (guess == truth).float().mean().item()
    metrics = {}
    for split in ("unseen", "seen"):
        z, (families, instruments, pitches) = x[split], labels[split].T
        semitone = linear_pitch(z).argmax(1)
        metrics[split] = {
            "family_accuracy": accuracy(family_head(z).argmax(1), families),
            "family_linear": accuracy(linear_family(z).argmax(1), families),
            "instrument_accuracy":
                accuracy(instrument_head(z).argmax(1), instruments) if split == "seen" else None,
            "pitch_mse": 100 * pitch_error(pitch_head(z), pitches).item(),
            "pitch_accuracy": accuracy(semitone, pitches),
            "chroma_accuracy": accuracy(semitone % 12, pitches % 12)}
    return metrics, nn.ModuleList([family_head, pitch_head]), error


def compare(seed: int, models: dict, pretext: dict, notes: dict, labelled: list, counts: list,
            hidden: int, workers: int, kept: dict) -> list[dict]:
    """Returns one seed's rows of the table: the scores of the networks and of the baselines. What
    --predict needs of the best network goes to `kept`; without labels it is the first network, with
    its embeddings of at most 2000 notes."""
    def keep(name, **more):
        size = *models[name].grid, len(models[name].fixed)
        kept.update(more, arm=f"{name}, seed {seed}", size=size)

    if not counts:
        if not kept:
            name, known = next(iter(pretext)), sorted({*notes["valid"], *notes["unlabelled"]})
            known = known[:: len(known) // 2000 + 1]
            keep(name, embeddings=embed({name: models[name]}, known, workers)[name],
                 paths=[note.path for note in known])
        return [{"row": name, **metrics} for name, metrics in pretext.items()]
    classes = {name: i for i, name in enumerate(sorted({n.instrument for n in notes["train"]}))}
    parts = {"train": labelled} | {split: notes[split] for split in ("valid", "unseen", "seen")}
    x = {split: embed(models, part, workers) for split, part in parts.items()}
    labels = {split: torch.tensor([(note.family, classes.get(note.instrument, -1), note.pitch)
                                   for note in part]) for split, part in parts.items()}
    rows = []
    # a supervised network is scored only with as many labels as it was trained with
    scored = [(count, name) for count in counts for name in x["train"]
              if name.endswith(f", {count} labels") or not name.endswith(" labels")]
    for count, name in in_background(lambda pair: pair, scored, 0, "score"):  # prints progress
        row = name.removesuffix(f", {count} labels")
        torch.manual_seed(random_key("heads", seed))
        mine = {split: features[name] for split, features in x.items()}
        metrics, heads, error = score(mine, labels, count, hidden, len(classes))
        rows += [{"row": f"{row}, {count} labels, {split}", **values,
                  **pretext.get(name, dict.fromkeys(PRETEXT))}
                 for split, values in metrics.items()]
        if name in pretext and error < kept.get("error", math.inf):  # the supervised do not compete
            keep(name, error=error, heads=heads.state_dict())
    return rows


def draw(path: Path, rows: list, model: nn.Module, title: str, notes: list):
    """The PNG: notes as they are, shuffled, put back by the model; scores by number of labels, or,
    where there are none, of the pretext task."""
    from matplotlib.figure import Figure  # needs no display

    picture = Figure(figsize=(13, 6), layout="constrained")
    left, right = picture.subfigures(1, 2, width_ratios=(1.2, 1))
    left.suptitle(f"{title}: notes as they are, shuffled, put back")
    waveform = load_views(notes, model.seconds).to(model.fixed.device)  # (B, S)
    patches = model.patches(model.front_end(waveform))  # (B, n, H, W)
    permutation = distant_permutations(1 + len(patches), patches.shape[1])[1:]  # 0 may be in order
    shuffled = shuffle(patches, permutation.to(patches.device))
    restored = shuffle(shuffled, model.order(model(shuffled)).argsort(1))
    grid = left.subplots(len(notes), 3, squeeze=False)
    for axes, *views in zip(grid, patches, shuffled, restored):
        for axis, view in zip(axes, views):
            rows_of_patches = view.unflatten(0, model.grid)  # (bands, slices, H, W)
            image = torch.vstack([torch.hstack([*row]) for row in rows_of_patches])  # (F, T)
            axis.imshow(image.cpu().numpy(), origin="lower", aspect="auto", cmap="magma")
            axis.set_axis_off()
    curves = {}  # {arm: {labelled notes: its row}}
    for row in rows:
        name, *labels = row["row"].split(", ")
        if labels[1:] == ["unseen"] and not name.startswith("joint"):
            curves.setdefault(name, {})[int(labels[0].split()[0])] = row
    right.suptitle("unseen instruments" if curves else "held-out notes")
    if curves:
        for axis, key in zip(right.subplots(2, 1), ("family_accuracy", "pitch_mse")):
            for name, points in curves.items():
                style = "o-" if name.split()[0] in LOSSES else "x:"
                axis.plot([*points], [row[key] for row in points.values()], style, label=name)
            axis.set(xlabel="labelled notes", ylabel=key, xscale="log",
                     yscale="log" if key == "pitch_mse" else "linear")
            axis.set_xticks([*points], [*points])
            axis.minorticks_off()
        axis.legend(fontsize=8, ncols=2)
    else:
        for axis, key in zip(right.subplots(2, 1), ("partial_ranks", "kendall_tau")):
            axis.bar([row["row"] for row in rows], [row[key] for row in rows])
            axis.set(ylabel=key)
    picture.savefig(path, dpi=100, format="png")


# -----------------------------------------------------------------------------
# Main


def new_network(network: str, grid: tuple, seed: int, device, loss="", outputs=0) -> nn.Module:
    """An untrained network: one seed and grid give all the same encoder and joint layer."""
    torch.manual_seed(random_key("weights", seed))
    fixed = FIXED_PERMUTATIONS if loss == "classification" else 0
    return ContextFreeNetwork(network, *grid, fixed, outputs).to(device)


def load_kept(state: dict, device) -> nn.Module:
    """The network of a checkpoint that answers --predict."""
    model = ContextFreeNetwork(state["args"]["network"], *state["kept"]["size"])
    model.load_state_dict(state["arms"][state["kept"]["arm"]])
    return model.to(device).eval()


def predict(files: list, checkpoint: Path, device: torch.device, workers: int):
    """Prints family and pitch of files or, trained without labels, the notes most like them."""
    state = load_checkpoint(checkpoint, VERSION)
    kept, labelled = state["kept"], "heads" in state["kept"]
    if not kept:
        die(f"{checkpoint}: nothing is scored yet; go on with --resume")
    print(f"model  {kept['arm']}, " + ("the best trained without labels" if labelled else
                                       "the first; there were no labels: the most similar notes"))
    model, trained, notes = load_kept(state, device), state["args"], []
    for path, seconds in scan_audio(files, SAMPLE_RATE, 0.25, workers).items():
        if load_view(path, 0.0, model.heard).abs().max() < 1e-5:
            print(f"skip   {path}: silent in its first {model.heard:g} s, and only these are used")
        else:
            notes.append(Note(path, seconds))
    if not notes:
        die("none of these files can be used")
    x = embed({"kept": model}, notes, workers)["kept"]  # (N, D)
    if not labelled:
        known = kept["embeddings"]  # (n, D)
        unit = lambda x: F.normalize((x - known.mean(0)) / (known.std(0, correction=0) + 1e-6))
        for note, alike in zip(notes, unit(x) @ unit(known).T):  # (n,), cosines
            best = alike.argsort(descending=True)[:3]
            print(f"{note.path}: " + ", ".join(f"{kept['paths'][i]} {alike[i]:.2f}" for i in best))
        return
    heads = nn.ModuleList([make_head(x.shape[1], trained["hidden"], n) for n in (len(FAMILIES), 1)])
    heads.load_state_dict(kept["heads"])
    family, pitch = (head(x) for head in heads)
    for note, p, tens in zip(notes, family.softmax(1), pitch[:, 0].tolist()):
        midi = 60 + 10 * tens
        name = "C C# D D# E F F# G G# A A# B".split()[round(midi) % 12]
        print(f"{note.path}: {FAMILIES[p.argmax()]} ({p.max():.2f}), "
              f"{name}{round(midi) // 12 - 1} (MIDI {midi:.1f})")


def transfer(data: Path, out: Path, label_counts: list, device: torch.device, workers: int):
    """Scores a checkpoint's encoders, unchanged, on the labelled notes below another folder, beside
    random ones; writes transfer.json."""
    began, state, table = time.time(), load_checkpoint(out / "checkpoint.pt", VERSION), []
    trained = argparse.Namespace(**state["args"])
    if len(state["rows"]) < len(trained.seed):
        die(f"{out}/checkpoint.pt: not all arms are trained; go on with --resume")
    make_folder(out)  # or one line that says why it cannot be written
    notes = load_notes(data, workers)
    if not notes["train"]:
        die(f"--data {data}: no labelled notes to score with")
    for seed in trained.seed:
        models, (labelled, counts) = {}, deal(notes["train"], seed, label_counts)
        for grid in zip(trained.bands, trained.slices):
            suffix = f" {grid[0]}x{grid[1]}" if len(trained.bands) > 1 else ""
            for row in ("random encoder", *trained.losses):
                model = models[row + suffix] = new_network(trained.network, grid, seed, device, row)
                if row in LOSSES:
                    model.load_state_dict(state["arms"][f"{row}{suffix}, seed {seed}"])
        rows = compare(seed, models, {}, notes, labelled, counts, trained.hidden, workers, {})
        table.append(rows)
    there = state["args"] | {"data": str(data), "label_counts": label_counts}
    report(table, out / "transfer.json", there, began)
    print(f"wrote  {out}/transfer.json in {time.time() - began:.0f} s")


def main(args: argparse.Namespace):
    """Trains and compares every arm, or answers --predict."""
    device = start_run(args.device)
    if args.predict:
        return predict(args.predict, args.out / "checkpoint.pt", device, args.workers)
    if args.predict == []:
        return transfer(args.data, args.out, args.label_counts, device, args.workers)
    state = open_run(vars(args), VERSION)
    args = argparse.Namespace(**state["args"])  # on --resume those of its start
    out, rows = Path(args.out), state.setdefault("rows", [])  # of the seeds that are finished
    folder, workers = Path(args.data or out / "audio"), args.workers
    if not args.data and rank_and_size()[0] == 0:
        write_notes(folder, workers)
    if dist.is_initialized():
        dist.barrier()  # rank 0 made the demo's notes
    notes = load_notes(folder, workers)
    save_first(state, [(Path(n.path).name, *n[1:]) for part in notes.values() for n in part])

    train_arm = partial(train, batch_size=args.batch_size, steps=args.steps, lr=args.lr,
                        workers=workers, state=state)
    everything = notes["train"] + notes["unlabelled"]
    for seed in args.seed[len(rows) :]:
        labelled, counts = deal(notes["train"], seed, args.label_counts)
        # of all seeds, for all have these counts
        state["planned"] = len(args.seed) * len(args.bands) * (len(counts) + len(args.losses))
        models, pretext = {}, {}
        for grid in zip(args.bands, args.slices):
            build = partial(new_network, args.network, grid, seed, device)
            suffix = f" {grid[0]}x{grid[1]}" if len(args.bands) > 1 else ""
            models["random encoder" + suffix] = build()
            for count in counts:
                row, model = f"supervised{suffix}, {count} labels", build(outputs=1 + len(FAMILIES))
                train_arm(f"{row}, seed {seed}", model, supervised_loss, labelled[:count],
                          shuffled=False)
                models[row] = model
            for loss in args.losses:
                row, model = loss + suffix, build(loss)
                train_arm(f"{row}, seed {seed}", model, LOSSES[loss], everything)
                pretext[row] = pretext_metrics(model, LOSSES[loss], notes["valid"], workers)
                models[row] = model
        rows.append(compare(seed, models, pretext, notes, labelled, counts, args.hidden, workers,
                            state["kept"]))
        save(state)
    means = report(rows, out / "results.json", state["args"], state["began"])
    shown = notes["unseen"] or notes["valid"]
    arm = next(arm for arm in state["arms"] if not arm.startswith("supervised"))  # the first
    grid = args.bands[0], args.slices[0]
    model = new_network(args.network, grid, args.seed[0], device, args.losses[0])
    model.load_state_dict(state["arms"][arm])
    write_whole(out / "permutation.png", lambda path: draw(
        path, means, model.eval(), arm, shown[:: len(shown) // 3 + 1]))
    end_run(out, "permutation.png", state["began"])


if __name__ == "__main__":
    run(main, parse_args())
