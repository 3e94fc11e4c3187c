"""Sounds without labels, contrastive and generative, after P. Verma and J. Smith, "A Framework for
Generative and Contrastive Learning of Audio Representations", 2020 (arXiv 2010.11459).

Two encoders, no labels. Contrastive: two altered views of a clip must find each other among all
other views (NT-Xent). Generative: an autoencoder and k-means turn slices of a spectrogram into a
sequence of codes, and a causal Transformer learns to predict the next one. Both are frozen and read
by a linear layer, fitted alike, beside random encoders and the encoder trained with labels.

Measured (demo: 1 120 generated clips, 224 held out, 3 seeds; accuracy): contrastive .929 ± .009,
generative .637 ± .031, both .938, supervised .897; random encoders .808 ± .027, .485 ± .020; mel
statistics .653. ESC-10, five folds, 3 seeds: contrastive .881 ± .008, generative .713 ± .009,
both .892 ± .008, supervised .869 ± .014, mel .808. The paper's order did not come back: its
generative row beats its contrastive one.

    python contrastive_generative.py                            demo: makes its own sounds
    python contrastive_generative.py --data ./ESC-50 --subset esc10
    python contrastive_generative.py --predict sound.wav        its three likeliest classes
    python contrastive_generative.py --predict sound.wav --sample 3       how it could go on

Differences from the paper, of which we had the abstract, a talk and one slide (supervised 71.3 %,
generative 60.1 %, contrastive 55.6 %, data not named); the sizes in `paper` are of similar work.
- The VGG-like encoder (after Fonseca 2021) ends in pooling over time alone: better on ESC-10.
- Views: "sound" alone (.881 on fold 1 of ESC-10, two seeds, weight decay .01; "image" .794, "sound
  image" .887, half a clip more); both are cropped from one excerpt of 2.5 s; no reverberation.
- A sequence is one excerpt, not packed: no attention across clips. An excerpt of a clip that is
  short, or filled up with zeros, repeats what there is.
- demo: half of a clip's mean spectrum is taken away, or the codes tell rooms apart, not sounds.
- The probe is L-BFGS; the loss on valid chooses the weight decay, of five, and then the row that
  --predict uses (of the first split). On FSD50K the classes of a clip share one softmax.
- "both": the generative features at their size, half or a quarter of it, as the loss on valid has
  it, or they outweigh the contrastive ones. Beside it the same with an untrained Transformer.
- One schedule for all arms (AdamW, one cycle); the supervised arm sees the same views.
- `data` and `demo` hold a smaller encoder and Transformer and frames of 20 ms, for CPUs.

Copy this file and common.py; nothing else is needed.
"""

import argparse
import csv
import itertools
import math
from collections import Counter
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.datasets import gtzan
from torchaudio.functional import mask_along_axis_iid
from torchaudio.transforms import GriffinLim, InverseMelScale

from common import (LogMel, die, end_run, find_audio, in_background, linear_probe, load_checkpoint,
                    make_folder, open_run, random_key, rank_and_size, read_audio, report, run,
                    save, save_first, scan_audio, start_run, training, write_whole)

# -----------------------------------------------------------------------------
# Hyper-parameters: `demo` applies without --data, `data` with it, `paper` by --setting alone.

HYPER_PARAMETERS = {  # name: (demo, data, paper, meaning)
    "steps": (150, 400, 16000, "optimiser steps of every trained arm"),
    "batch_size": (48, 64, 256, "N: clips in a step, two views of each"),
    "sequences": (64, 32, 64, "excerpts in a generative step; --batch-size, if it alone is given"),
    "lr": (2e-3, 2e-3, 1e-3, "peak learning rate of one cycle"),
    "temperature": (0.2, 0.2, 0.2, "tau of NT-Xent"),
    "codes": (256, 256, 256, "K: entries of the k-means dictionary"),
    "folds": (1, 5, 5, "folds, of 5, that are tested in turn"),
    "context": (48, 64, 512, "codes that the Transformer sees, at most those of the longest clip"),
    "transformer": ((2, 128, 4), (2, 128, 4), (6, 256, 8), "its blocks, width and heads"),
    "hop_length": (320, 320, 160, "samples at 16 kHz from frame to frame; a slice is two frames"),
    "width": (16, 16, 32, "channels of the encoder's first convolutions"),
    "flatten": (0.5, 0.0, 0.0, "share of a clip's mean spectrum taken from its slices"),
    "dictionary": ((40000, 1), (40000, 1), (2000000, 5), "k-means: slices, about; its restarts"),
}
LIMITS = {"steps": (2, 10**8), "batch_size": (2, 10**5), "sequences": (1, 10**5), "lr": (1e-9, 10),
          "temperature": (1e-3, 100), "codes": (2, 32767), "folds": (1, 5), "workers": (0, 64),
          "seed": (0, 2**32), "sample": (0, 100)}
SAMPLE_RATE, BANDS, EMBEDDING = 16000, 64, 512
WINDOW, EXCERPT_SECONDS = 16000, 2.5  # samples of a view (1 s); what it is cropped from
GENERATED_CLIPS = 1120  # of the demo
VERSION = "contrastive_generative 6"  # of the checkpoint's contents


def parse_args(argv=None) -> argparse.Namespace:
    """The command line, completed from the column of HYPER_PARAMETERS that applies."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0],
                                     epilog="Chosen by --setting alone: ")
    parser.error = die  # one line, without the usage
    add, objectives = parser.add_argument, ["contrastive", "generative"]
    add("--data", type=Path, metavar="DIR", help="recordings (default: makes its own)")
    add("--subset", choices=["esc10"], help="of ESC-50: the clips of its column esc10")
    add("--objectives", nargs="+", default=objectives, choices=objectives, help="arms (all)")
    add("--views", nargs="+", default=["sound"], choices=["sound", "image", "flip"], help="(sound)")
    add("--setting", choices=["demo", "data", "paper"], help="column of the defaults below")
    for name, (demo, data, paper, meaning) in HYPER_PARAMETERS.items():
        text = f"{meaning} (demo {demo}, data {data}, paper {paper})"
        if name in LIMITS:
            add("--" + name.replace("_", "-"), type=type(paper), help=text)
        else:
            parser.epilog += f"{name}: {text}. "
    add("--out", type=Path, default=Path("out/contrastive_generative"), metavar="DIR",
        help="results")
    add("--seed", type=int, nargs="+", default=[0], help="several give mean and sd")
    add("--device", default="", help="cpu, cuda or mps (default: the best)")
    add("--workers", type=int, default=2, help="threads that read audio; changes no result")
    add("--resume", action="store_true", help="go on from --out/checkpoint.pt, as started")
    add("--predict", nargs="+", metavar="FILE", help="print the three most likely classes")
    add("--sample", type=int, default=0, metavar="N", help="and N continuations, as wav files")
    args = parser.parse_args(argv)
    if args.sequences is None:
        args.sequences = args.batch_size  # if that is given, it holds for both halves
    column = ("demo", "data", "paper").index(args.setting or ("data" if args.data else "demo"))
    for name, columns in HYPER_PARAMETERS.items():
        if getattr(args, name, None) is None:
            setattr(args, name, columns[column])
    for name, (low, high) in LIMITS.items():
        if not all(low <= value <= high for value in np.ravel(getattr(args, name))):
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}")
    if args.sample and not args.predict:
        parser.error("--sample needs --predict FILE")
    if args.subset and not args.data:
        parser.error("--subset needs --data DIR")
    args.seed = list(dict.fromkeys(args.seed))
    args.objectives = list(dict.fromkeys(args.objectives))
    return args


# -----------------------------------------------------------------------------
# Data: the demo's own sounds; recordings in the layouts of the data sets; views, of all clips of a
# batch at once. Letters: B clips, S samples, C classes, F mel bands, T frames.

SOUNDS = "alarm bell clock drum engine rain siren whistle".split()


def write_sound(number: int, folder: Path):
    """Writes generated clip `number`, 2 s, into its class's folder: at a random pitch and pace,
    through a random filter (another room, another microphone), in noise."""
    kind, rng = SOUNDS[number % len(SOUNDS)], np.random.default_rng(number)
    t = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    noise, pitch, pace = rng.normal(size=len(t)), 250 * 10 ** rng.random(), rng.uniform(2, 6)
    tone = lambda hertz: np.sin(2 * np.pi * np.cumsum(hertz + 0 * t) / SAMPLE_RATE)
    since = lambda rate: (rate * t + rng.random()) % 1 / rate  # seconds since the last stroke
    strike, slow = since(pace), since(pace / 4)
    partials = rng.uniform(0.97, 1.03, 5) * (1, 2, 2.4, 3, 4.5)
    sound = {
        "alarm": tone(pitch) * (strike < rng.uniform(0.3, 0.7) / pace),
        "bell": sum(tone(pitch * k) * np.exp(-2 * k * slow) for k in partials),
        "clock": noise * np.exp(-strike / rng.uniform(0.004, 0.015)),
        "drum": (tone(100 * (1 + np.exp(-strike / 0.03))) + noise) * np.exp(-strike / 0.07),
        "engine": (1 + noise) * np.exp(-since(9 * pace) / 0.005),
        "rain": noise * (rng.random(len(t)) < 10 ** rng.uniform(-2, -0.5)),
        "siren": tone(pitch * 2 ** (0.5 * np.sin(2 * np.pi * pace / 4 * slow))),
        "whistle": tone(pitch * (1 - rng.random() / 3 * np.exp(-t / 0.15)))}[kind]
    frequency = np.linspace(1, 9, len(t) // 2 + 1)  # of each bin, in kHz, and 1
    colour = sum(rng.normal() * np.sin(frequency * k / 3 + 6 * rng.random()) for k in range(5))
    sound = np.fft.irfft(np.fft.rfft(sound) * np.exp(0.8 * colour), len(t))
    sound = sound / sound.std() + 10 ** rng.uniform(-1.1, 0) * rng.normal(size=len(t))
    sound *= 0.1 * 10 ** rng.uniform(-1.5, 0)
    soundfile.write(folder / kind / f"{number:04d}.wav", sound, SAMPLE_RATE)


def find_layout(folder: Path, paths: list[Path], subset: str | None) -> tuple[str, dict]:
    """The data set that a folder holds, and {path: (class names, part)}: the part a fold, or train,
    valid or test as the data set says, or '' where it says nothing."""
    tables = {file.name: file for file in find_audio(folder, {".csv"})}
    if subset and "esc50.csv" not in tables:
        die(f"--subset {subset}: no esc50.csv below {folder}")
    if "dev.csv" in tables and "eval.csv" not in tables:
        print(f"skip   {tables['dev.csv']}: without eval.csv this is not FSD50K's split")

    def read(name):
        """The rows of a table, less those in which a cell that is used is empty."""
        rows = list(csv.DictReader(tables[name].read_text("utf-8-sig").splitlines()))
        used = {"filename", "fold", "category", "esc10", "fname", "labels", "split"}
        whole = [row for row in rows if all(row[column] for column in used & row.keys())]
        if cut := len(rows) - len(whole):
            print(f"skip   {tables[name]}: {cut} of {len(rows)} rows are not whole")
        return whole

    stems = {path.stem: path for path in paths}
    find = lambda name: stems.get(name.rsplit(".", 1)[0], folder / name)  # or it is skipped
    try:
        if "esc50.csv" in tables:
            return f"ESC-50, official folds of {tables['esc50.csv']}", {
                find(row["filename"]): ([row["category"]], row["fold"])
                for row in read("esc50.csv") if not subset or row["esc10"].lower() == "true"}
        if {"dev.csv", "eval.csv"} <= set(tables):
            parts = {"train": "train", "val": "valid", None: "test"}  # eval.csv has no column split
            return f"FSD50K, official split of {tables['dev.csv']} and eval.csv", {
                find(row["fname"]): (row["labels"].split(","), parts[row.get("split")])
                for name in ("dev.csv", "eval.csv") for row in read(name)}
    except (KeyError, OSError, UnicodeDecodeError, csv.Error) as error:
        die(f"--data {folder}: not the data set's csv: {type(error).__name__} {error}")
    part_of = {name: part for part in ("train", "valid", "test")
               for name in getattr(gtzan, f"filtered_{part}")}
    names = [path.stem.removeprefix("gtzan_").replace("_", ".") for path in paths]
    songs = {path: ([name.split(".")[0]], part_of[name]) for path, name in zip(paths, names)
             if name in part_of}  # such as blues.00000
    if len(songs) > 0.8 * len(paths):
        return "GTZAN, fault-filtered split", songs
    return "class folders, stratified folds", {
        path: ([path.absolute().parent.name], "") for path in paths}


def load_clips(folder: Path, subset: str | None, workers: int) -> list[tuple]:
    """All to use below a folder: [(path, seconds, class names, part)], in parts that the data set
    states or in five folds; dies if there are too few."""
    if not folder.is_dir():
        die(f"--data {folder}: no such folder; expected ESC-50, FSD50K, GTZAN or class folders")
    paths = find_audio(folder)
    layout, rows = find_layout(folder, paths, subset)
    usable = scan_audio(list(rows), SAMPLE_RATE, 0.1, workers)
    sizes = Counter(name for path in usable for name in rows[path][0])
    dealt, clips, listed = Counter(), [], list(rows.items())
    single = [name for name in sizes if sizes[name] == 1]
    known = sorted(set(sizes) - set(single))
    scored = len(known) > 1  # classes that can be told apart
    for i in np.random.default_rng(0).permutation(len(rows)):
        path, (names, part) = listed[i]
        names = [name for name in names if name not in single] if scored else []
        # files of a class go to the five folds in turn; unusable ones count, so that mending one
        stratum = names[0] if names else ""  # moves no other clip to another fold
        dealt[stratum] += 1
        if path in usable and (names or not scored):
            clips.append((str(path), usable[path], names, part or str(dealt[stratum] % 5 + 1)))
    for name in single if scored else ():
        print(f"skip   class {name}: one clip is too few to learn from and to test")
    counts = dict(sorted(Counter(part for *_, part in clips).items()))
    if len(clips) < 8 or len(counts) < 3:  # train, valid and test
        die(f"--data {folder}: {len(clips)} clips, by part {counts}; expected at least 8, in class "
            "folders or as ESC-50, FSD50K or GTZAN, that make 3 folds or train, valid and test")
    what = f"{layout}, {len(known)} classes from {known[0]} to {known[-1]}" if scored else ""
    print(f"split  {what or 'no classes, no scores'}; clips by part {counts}; "
          f"{len(set(paths) - set(rows))} files are not in it")
    return sorted(clips)


def load_batch(step: int, clips: list, targets: Tensor, arm: str, items: range,
               excerpt=EXCERPT_SECONDS):
    """Batch `step` of an arm: (B, S) excerpts, tiled where a clip is too short, and (B, C) targets.
    No clip twice if they suffice; each item draws from (arm, step, item) alone."""
    order = np.random.default_rng(random_key(arm, step)).permutation(len(clips))
    chosen, waveforms = [order[item % len(clips)] for item in items], []
    samples = round(excerpt * SAMPLE_RATE)
    for item, i in zip(items, chosen):
        path, seconds, *_ = clips[i]
        rng = np.random.default_rng(random_key(arm, step, item))
        starts = rng.uniform(0, max(0.0, seconds - excerpt), 3)
        for start in (*starts, 0.0):  # some clips are padded with zeros: try until there is sound
            waveform = read_audio(path, SAMPLE_RATE, start, excerpt)
            sounding = (waveform.abs() > 1e-4).nonzero()  # (n, 1), which samples
            if len(sounding):  # cut the zeros at the end, but leave at least the length of a view
                waveform = waveform[: max(WINDOW, sounding[-1].item() + 1)]
                break
        waveforms.append(waveform.repeat(math.ceil(samples / len(waveform)))[:samples])
    return torch.stack(waveforms), targets[chosen]


class FrontEnd(LogMel):
    """Log-mel standardised by a mean and deviation that pretrain() sets; `frames`: of a view."""

    def __init__(self, hop_length: int):
        super().__init__(SAMPLE_RATE, n_fft=512, hop_length=hop_length, n_mels=BANDS,
                         win_length=400, f_min=60, f_max=7800, floor=1e-3)
        self.frames = WINDOW // hop_length
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("sd", torch.ones(()))

    def forward(self, waveform: Tensor) -> Tensor:
        return (super().forward(waveform) - self.mean) / self.sd  # (B, S) -> (B, F, T)


@torch.no_grad()
def make_views(waveform: Tensor, front: FrontEnd, families: list) -> Tensor:
    """(B, S) excerpts -> (B, F, frames): a random crop of each, altered by the named families:
    sound (the abstract's pitch and timbre): another clip mixed in, noise, gain, time-stretch, pitch
    (a shift of mel bands: 12 are 10 semitones at 2 kHz, more below), a high- or low-pass;
    image (the talk's): a band and a time mask, blur; flip (the talk's): backwards in time."""
    B, device = len(waveform), waveform.device
    within = lambda low, high: low + (high - low) * torch.rand(B, 1, device=device)
    some = lambda p: torch.rand(B, 1, device=device) < p  # (B, 1)
    rate, pitch = torch.ones(B, 1, device=device), torch.zeros(B, 1, device=device)
    if "sound" in families:
        level = waveform.square().mean(1, keepdim=True).sqrt() + 1e-5
        other = some(0.5) * within(0, 0.5) * (waveform / level).roll(1, 0)
        noise = some(0.5) * 10 ** (-within(0, 30) / 20) * torch.randn_like(waveform)
        waveform = (waveform + level * (other + noise)) * 10 ** -(some(0.5) * within(0, 20) / 20)
        rate, pitch = 1.7 ** (some(0.8) * within(-1, 1)), some(0.5) * within(-12, 12)
    x = front(waveform)  # (B, F, T)
    (bands, T), frames = x.shape[1:], front.frames
    start = within(0, 1) * (T - 1 - rate * (frames - 1)).clamp(min=0)
    time = (start + rate * torch.arange(frames, device=device)) / (T - 1)  # (B, frames), in 0 .. 1
    band = (torch.arange(bands, device=device) + pitch) / (bands - 1)  # (B, F)
    # each cell of a view is read off x at a (time, band) of its own: (B, F, frames, 2)
    at = torch.stack(torch.broadcast_tensors(time[:, None], band[:, :, None]), 3)
    x = F.grid_sample(x[:, None], 2 * at - 1, padding_mode="border", align_corners=True)[:, 0]
    if "sound" in families:  # high-pass below 0.2 to 1.2 kHz or low-pass above 2.2 to 4 kHz
        axis, low_cut = torch.linspace(0, 1, bands, device=device), some(0.5)
        beyond = torch.where(low_cut, within(0.07, 0.38) - axis, axis - within(0.55, 0.75)).relu()
        x = x - (within(0, 8) * beyond)[:, :, None] / front.sd  # to 18 dB per octave
    if "image" in families:
        for dim, share in ((1, 0.15), (2, 0.2)):  # what is masked becomes the mean, 0
            masked = mask_along_axis_iid(x, round(share * x.shape[dim]), 0.0, dim)
            x = torch.where(some(0.5)[:, :, None], masked, x)
        blurred = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        x = x.lerp(blurred, (some(0.2) * within(0, 1))[:, :, None])
    return torch.where(some(0.5)[:, :, None], x.flip(2), x) if "flip" in families else x


# -----------------------------------------------------------------------------
# Model. Letters: B items, F mel bands, T frames, D size of h, K codes, L codes in a sequence.


class Encoder(nn.Module):
    """VGG-like: (B, F, T) -> h (B, D). Stages of 3, 2 and 1 convolutions of 3 x 3, each with batch
    norm and ReLU; maximum and mean over time, of each band; a dense layer with ReLU."""

    def __init__(self, width: int):
        super().__init__()
        conv = lambda before, size: nn.Sequential(nn.Conv2d(before, size, 3, padding=1, bias=False),
                                                  nn.BatchNorm2d(size), nn.ReLU(inplace=True))
        w, pool = width, nn.MaxPool2d(2)
        self.convs = nn.Sequential(conv(1, w), conv(w, w), conv(w, w), pool, conv(w, 2 * w),
                                   conv(2 * w, 2 * w), pool, conv(2 * w, 4 * w), pool)
        self.convs.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self.dense = nn.Linear(2 * 4 * w * BANDS // 8, EMBEDDING)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(x[:, None].contiguous(memory_format=torch.channels_last))
        x = torch.cat([x.amax(3), x.mean(3)], 1).flatten(1)  # (B, C, F/8, T/8) -> (B, 2 C F/8)
        return F.relu(self.dense(x))


class Tokenizer(nn.Module):
    """Codes of a spectrogram: an autoencoder of slices, and a dictionary of what it makes of them.
    First the share `flatten` of the input's mean spectrum (an excerpt's in training, later a
    clip's) is subtracted: it tells rooms apart, not sounds, and would take up the codes."""

    def __init__(self, codes: int, flatten: float):
        super().__init__()
        stack = lambda a, b, c, d: nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c),
                                                 nn.ReLU(), nn.Linear(c, d))
        self.encoder, self.decoder = stack(2 * BANDS, 512, 256, 64), stack(64, 256, 512, 2 * BANDS)
        self.flatten = flatten
        self.register_buffer("centroids", torch.zeros(codes, 64))

    def slices(self, log_mel: Tensor) -> Tensor:
        """(B, F, T) -> (B T/2, 2 F): of two frames, full height, without overlap."""
        log_mel = log_mel - self.flatten * log_mel.mean(2, keepdim=True)
        return log_mel.unfold(2, 2, 2).transpose(1, 2).flatten(2).flatten(0, 1)

    @torch.no_grad()
    def codes(self, log_mel: Tensor) -> Tensor:
        """(B, F, T) -> (B, L), L = T/2: the entries that are nearest to the slices."""
        distance = torch.cdist(self.encoder(self.slices(log_mel)), self.centroids)
        return distance.argmin(1).view(len(log_mel), -1)

    def decode(self, codes: Tensor, log_mel: Tensor) -> Tensor:
        """(L,) codes of (1, F, T) -> (F, 2 L), with the mean spectrum back in its place."""
        slices = self.decoder(self.centroids[codes]).unflatten(1, (BANDS, 2))
        return slices.transpose(0, 1).flatten(1) + self.flatten * log_mel[0].mean(1, keepdim=True)

    def forward(self, slices: Tensor) -> Tensor:
        return self.decoder(self.encoder(slices))


def k_means(vectors: Tensor, codes: int, restarts: int) -> Tensor:
    """Ordinary k-means, (N, D) vectors -> (codes, D) centroids: of several k-means++ starts the one
    of least inertia; an entry that is nearest to no vector moves to a random one."""
    least = math.inf
    nearest = lambda centroids: [torch.cdist(v, centroids).min(1) for v in vectors.split(2**16)]
    for _ in range(restarts):
        centroids = vectors[torch.randint(len(vectors), (1,))]
        distance = torch.cdist(vectors, centroids)[:, 0].square()
        for _ in range(codes - 1):  # the next start is likely to be far from all so far
            new = vectors[torch.multinomial(distance + 1e-12, 1)]
            centroids = torch.cat([centroids, new])
            distance = torch.minimum(distance, torch.cdist(vectors, new)[:, 0].square())
        for _ in range(15):
            index = torch.cat([piece.indices for piece in nearest(centroids)])  # (N,)
            count = index.bincount(minlength=codes)[:, None]  # (codes, 1)
            mean = torch.zeros_like(centroids).index_add_(0, index, vectors) / count.clamp(min=1)
            centroids = torch.where(count > 0, mean, vectors[torch.randint(len(vectors), (codes,))])
        distance = torch.cat([piece.values for piece in nearest(centroids)])  # (N,)
        if (inertia := distance.square().sum().item()) < least:
            least, best = inertia, centroids
    return best


class Block(nn.Module):
    """GPT-2's: (B, L, D) -> same, each position from itself and those before it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(0.1)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv, is_causal=True)  # (B, heads, L, D / heads)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class CodeModel(nn.Module):
    """The causal Transformer: codes (B, L) -> logits (B, L, K) of each from those before it."""

    def __init__(self, codes: int, context: int, blocks: int, width: int, heads: int):
        super().__init__()
        self.context = context  # codes at once; with the start symbol they take one place more
        self.embed, self.place = nn.Embedding(codes + 1, width), nn.Embedding(context + 1, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, codes, bias=False)
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                nn.init.normal_(layer.weight, std=0.02)  # GPT-2's; biases as PyTorch makes them

    def states(self, codes: Tensor) -> list[Tensor]:
        """(B, L) -> of each block (B, L + 1, D), the last normalised: state 0 has seen the start
        symbol only, state L all codes."""
        # padding (-100) is read as code 0: it stands last, where no state before it sees it
        codes = F.pad(codes.clamp(min=0), (1, 0), value=self.embed.num_embeddings - 1)
        x, layers = self.embed(codes) + self.place.weight[: codes.shape[1]], []
        for block in self.blocks:
            layers.append(x := block(x))
        return [*layers[:-1], self.norm(x)]

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.states(codes)[-1][:, :-1])

    def go_on(self, codes: Tensor, count: int) -> Tensor:
        """(B, L) -> (B, L + count), each new code drawn from p(c_t | start, c_<t)."""
        for _ in range(count):
            seen = codes[:, 1 - self.context :]  # one less: forward() never trains the last state
            p = self.head(self.states(seen)[-1][:, -1]).softmax(1)  # (B, K)
            codes = torch.cat([codes, torch.multinomial(p, 1)], 1)
        return codes


# -----------------------------------------------------------------------------
# Loss. NT-Xent: SimCLR (Chen et al. 2020, arXiv 2002.05709), Eq. (1) and Algorithm 1.
# Letters: N clips, 2N views, D projection size, tau temperature, s_ij cosine similarity.


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of picking each view's partner out of the other 2N - 1 views, mean over all 2N.

    Eq. (1): l_ij = -log( exp(s_ij / tau) / sum over k != i of exp(s_ik / tau) )

    z1 and z2 are (N, D); rows k of both are a positive pair, every other row, those of other ranks
    too, is a negative. log(2N - 1) nats where all similarities are equal.
    """
    rank, size = rank_and_size()
    if z1.shape != z2.shape or z1.ndim != 2 or len(z1) * size < 2 or temperature <= 0:
        raise ValueError(f"nt_xent needs (N, D) twice, N >= 2, temperature > 0: got "
                         f"{tuple(z1.shape)} and {tuple(z2.shape)} at {temperature}")
    if size > 1:  # every rank works out the loss of all
        z = torch.stack([z1, z2])  # (2, N, D)
        parts = [torch.empty_like(z) for _ in range(size)]
        dist.all_gather(parts, z.detach())
        parts[rank] = size * z - (size - 1) * z.detach()  # DDP will divide its gradient by size
        z1, z2 = torch.cat(parts, 1)  # (2, N of all ranks, D)
    z, N = F.normalize(torch.cat([z1, z2]), dim=1), len(z1)  # (2N, D): z @ z.T is the cosine
    similarity = (z @ z.T / temperature).fill_diagonal_(-math.inf)  # (2N, 2N), s_ij / tau; k != i
    partner = torch.arange(2 * N, device=z.device).roll(N)  # view i pairs with i + N mod 2N
    return F.cross_entropy(similarity, partner)  # -log softmax is Eq. (1)


def next_code_loss(network, codes: Tensor) -> Tensor:
    """Mean of -log p(c_t | start, c_<t) over codes (B, L), in nats, less those that are -100."""
    return F.cross_entropy(network(codes).flatten(0, 1), codes.flatten())  # which leaves out -100


# -----------------------------------------------------------------------------
# Training: one loop for all arms; a loss makes its own input from the batch.


def train(arm: str, model: nn.Module, loss_of, load, batch_size: int, steps: int, lr: float,
          workers: int, state: dict):
    """Trains the model in place by loss_of(network, *batch) on batches load(step, arm, items)."""
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-4)  # training() sets lr
    for batch, network, losses in training(arm, model, optimiser, steps, batch_size,
                                           partial(load, arm=arm), workers, state):
        loss = loss_of(network, *batch)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.detach())


@torch.no_grad()
def fit_dictionary(key: str, front: FrontEnd, tokenizer: Tokenizer, batches, restarts: int):
    """k-means on the slices of all batches but those of silence, which would take up codes."""
    vectors, silence = [], (math.log(front.floor) - front.mean) / front.sd + 0.01
    for waveform, _ in batches:
        log_mel = front(waveform.to(front.mean.device))  # (B, F, T)
        loud = log_mel.unfold(2, 2, 2).amax((1, 3)).flatten() > silence
        vectors.append(tokenizer.encoder(tokenizer.slices(log_mel)[loud]))
    torch.manual_seed(random_key(key, "k-means"))
    tokenizer.centroids.copy_(k_means(torch.cat(vectors), len(tokenizer.centroids), restarts))
    if dist.is_initialized():
        dist.broadcast(tokenizer.centroids, 0)  # sums on a GPU differ in their last digits


def pretrain(key: str, models: nn.ModuleDict, labelled: nn.ModuleDict, clips: list, targets: Tensor,
             train_arm, objectives: list, families: list, temperature: float, sequences: int,
             dictionary: tuple, workers: int):
    """Trains all arms of a seed and a split on these clips: `models` without labels, `labelled`
    with them. The losses are of (B, S) excerpts and their (B, C) targets."""
    front, tokenizer, code_model = models["front"], models["tokenizer"], models["code_model"]
    load = partial(load_batch, clips=clips, targets=targets)
    x = front(load(0, arm=f"{key} front", items=range(256))[0].to(front.mean.device))
    front.mean.copy_(x.mean())
    front.sd.copy_(x.std())
    view = partial(make_views, front=front, families=families)

    def contrastive_loss(network, waveform, _):
        """NT-Xent of two views of each clip."""
        z1, z2 = network(view(waveform.repeat(2, 1))).chunk(2)  # (B, 128) each, of the same clips
        return nt_xent(z1, z2, temperature)

    def supervised_loss(network, waveform, truth):
        """Cross-entropy of a view's logits with its clip's classes."""
        return F.cross_entropy(network(view(waveform)), truth)

    def reconstruction_loss(network, waveform, _):
        """Mean squared error of the autoencoder."""
        slices = tokenizer.slices(front(waveform))  # (B T/2, 2 F)
        return F.mse_loss(network(slices), slices)

    def generative_loss(network, waveform, _):
        """Cross-entropy of each code with what the Transformer expects after those before it."""
        return next_code_loss(network, tokenizer.codes(front(waveform)))

    if "contrastive" in objectives:
        network = nn.Sequential(models["encoder"], models["projector"])
        train_arm(f"{key} contrastive", network, contrastive_loss, load)
    if targets.shape[1]:
        network = nn.Sequential(labelled["encoder"], labelled["classifier"])
        train_arm(f"{key} supervised", network, supervised_loss, load)
    if "generative" in objectives:  # one part after the other
        excerpt = 2 * code_model.context * front.spectrogram.hop_length / SAMPLE_RATE  # seconds
        load, train_arm = partial(load, excerpt=excerpt), partial(train_arm, batch_size=sequences)
        train_arm(f"{key} autoencoder", tokenizer, reconstruction_loss, load)
        slices, restarts = dictionary
        # batches of 64 excerpts: `slices` slices, but on average at most 4 excerpts of a clip
        count = math.ceil(min(slices / code_model.context, 4 * len(clips)) / 64)
        load_64 = partial(load, arm=f"{key} dictionary", items=range(64))
        batches = in_background(load_64, range(count), workers)
        fit_dictionary(key, front, tokenizer, batches, restarts)
        train_arm(f"{key} next code", code_model, generative_loss, load)


# -----------------------------------------------------------------------------
# Evaluation: one linear layer on frozen, standardised features of whole clips. Letters: N clips,
# D features, C classes, n windows of a clip, L codes of a clip.


@torch.no_grad()
def embed(front: FrontEnd, tokenizer: Tokenizer, variants: list, paths: list,
          workers: int) -> tuple[list[dict], list[Tensor]]:
    """For each variant of the models {name: (N, D)}: statistics of whole clips, and of what its
    encoder ("contrastive", however trained) and Transformer ("generative ...") give in windows
    that overlap by half. Then the codes of each clip, [(L,)]."""
    found, codes_of, size = [[] for _ in variants], [], len(tokenizer.centroids)
    nn.ModuleList(variants).eval()
    frames = front.frames  # of a window; it has half as many codes
    read = partial(read_audio, sample_rate=SAMPLE_RATE)
    for waveform in in_background(read, paths, workers, "embed"):
        waveform = waveform.repeat(math.ceil(WINDOW / len(waveform)))  # no shorter than a view
        log_mel = front(waveform[None].to(front.mean.device))  # (1, F, T)
        windows = log_mel[0].unfold(1, frames, frames // 2).transpose(0, 1)  # (n, F, frames)
        codes = tokenizer.codes(log_mel)[0]  # (L,)
        codes_of.append(codes.cpu())
        for models, rows in zip(variants, found):
            h = torch.cat([models["encoder"](part) for part in windows.split(256)]).mean(0)
            # as long, but whole codes apart (12, where 25 frames are 12.5): long clips have more
            parts = codes.unfold(0, frames // 2, frames // 4).split(256)  # of (n, frames / 2)
            states = [models["code_model"].states(part) for part in parts]  # [part][block]
            *lower, last = [torch.cat(x)[:, 1:] for x in zip(*states)]  # (n, frames / 2, D) each
            mean_sd = torch.cat([last.mean((0, 1)), last.std((0, 1))])
            new = {"mel statistics": torch.cat([log_mel[0].mean(1), log_mel[0].std(1)]),
                   "code histogram": codes.bincount(minlength=size) / len(codes),
                   "contrastive": h, "generative": last.mean((0, 1)),
                   "both": torch.cat([h, mean_sd]), "generative, mean + sd": mean_sd,
                   "generative, last position": last[:, -1].mean(0)}
            new |= {f"generative, layer {i}": x.mean((0, 1)) for i, x in enumerate(lower, 1)}
            rows.append({name: value.cpu() for name, value in new.items()})
    return [torch.utils.data.default_collate(rows) for rows in found], codes_of  # stacks by name


def fit_probe(x: Tensor, targets: Tensor, fit: Tensor, valid: Tensor, sizes=(1.0,)):
    """Linear(D, C) from features (N, D) to targets (N, C), and its loss on the `valid` clips: each
    weight decay, with the columns after the first EMBEDDING at each of `sizes`, is fitted to the
    clips of `fit`; the best on `valid` is fitted again, to both. fit, valid: masks (N,)."""
    def probe(use, decay, size):
        """Fitted to the clips of one mask."""
        scale = torch.ones(x.shape[1])
        scale[EMBEDDING:] = size
        return linear_probe(x[use], targets[use], decay, scale=scale)

    loss_of = lambda *choice: F.cross_entropy(probe(fit, *choice)(x[valid]), targets[valid]).item()
    choices = itertools.product((1, 0.1, 0.01, 1e-3, 1e-4), sizes)
    loss, best = min((loss_of(*choice), choice) for choice in choices)
    return probe(fit | valid, *best), loss


def score(logits: Tensor, targets: Tensor) -> dict:
    """Accuracy; of clips with several classes mAP, the mean over classes of the average precision,
    and how often the likeliest class is one of the clip's."""
    truth = targets > 0  # (N, C)
    hit = truth.gather(1, logits.argmax(1, keepdim=True)).float().mean().item()
    if (truth.sum(1) == 1).all():
        return {"accuracy": hit, "clips": len(truth)}
    shuffled = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))  # for ties
    order = shuffled[logits.log_softmax(1)[shuffled].argsort(stable=True, dim=0, descending=True)]
    ranked = truth.gather(0, order).float()
    precision = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)[:, None]
    average = ((precision * ranked).sum(0) / ranked.sum(0)).nanmean().item()  # nan: no such clip
    return {"mAP": average, "top1_hit": hit, "clips": len(truth)}


@torch.no_grad()
def count_codes(model: CodeModel, clips: list, test: Tensor) -> dict:
    """How many codes are in use and their perplexity in clips [(L,)] outside `test`; the nats per
    code of those in `test` by the unigrams and bigrams of the former, these smoothed as is best for
    the test, and by the model."""
    K, parts = model.head.out_features, ([], [])
    for codes, held_out in zip(clips, test):
        parts[int(held_out)].extend(codes.split(model.context))  # the last is shorter
    seen, new = (nn.utils.rnn.pad_sequence(part, True, -100) for part in parts)  # (n, context)
    before = lambda x: F.pad(x, (1, 0), value=K)[:, :-1][x >= 0]  # K: a sequence begins
    pairs = torch.zeros(K + 1, K)
    pairs.index_put_((before(seen), seen[seen >= 0]), torch.ones(()), accumulate=True)
    count = pairs.sum(0)  # (K,), of each code
    p = (count + 0.5) / (count + 0.5).sum()
    i, j = before(new), new[new >= 0]
    smooth = [(pairs[i, j] + a * p[j]) / (pairs.sum(1)[i] + a) for a in (1, 3, 10, 30, 100)]
    model.eval()
    loss = lambda part: next_code_loss(model, part.to(model.head.weight.device)).item()
    known = {"codes_used": count.count_nonzero().item(),
             "perplexity": torch.special.entr(count / pairs.sum()).sum().exp().item(),
             "unigram": -p[j].log().mean().item(),
             "bigram": min(-q.log().mean().item() for q in smooth),
             "next_code": sum(loss(part) / len(j) * (part >= 0).sum().item()
                              for part in new.split(64))}
    print("codes  " + ", ".join(f"{name} {value:.4g}" for name, value in known.items()))
    return known


def compare(key: str, variants: list, clips: list, targets: Tensor, parts: np.ndarray,
            objectives: list, classes: list, workers: int, picture: Path | None):
    """All rows of a seed and a split, and what --predict needs; draws the picture, if asked to."""
    models, _, labelled = variants  # trained without labels, not trained, trained with labels
    paths = [clip[0] for clip in clips]
    fit, valid, test = (torch.from_numpy(parts == part) for part in ("train", "valid", "test"))
    kept, rows = {"key": key, "models": models.state_dict(), "row": "", "loss": math.inf}, []
    (ours, random, *supervised), codes = embed(
        models["front"], models["tokenizer"], variants if classes else variants[:2], paths, workers)
    known = count_codes(models["code_model"], codes, test) if "generative" in objectives else {}
    features = {"chance": torch.zeros(len(clips), 1), "mel statistics": ours["mel statistics"]}
    if "contrastive" in objectives:
        features |= {"random VGG": random["contrastive"], "contrastive": ours["contrastive"]}
    if "generative" in objectives:
        features["code histogram"] = ours["code histogram"]
        for name in [name for name in ours if name.startswith("generative")]:
            features[name.replace("generative", "random Transformer")] = random[name]
            features[name] = ours[name]
    if len(objectives) == 2:
        control = [ours["contrastive"], random["generative, mean + sd"]]
        features["contrastive + random Transformer"] = torch.cat(control, 1)
        features["both"] = ours["both"]
    to_probe = list(features.items()) if classes else []
    for name, x in in_background(lambda pair: pair, to_probe, 0, "probe"):  # prints progress
        two = name in ("contrastive + random Transformer", "both")
        layer, loss = fit_probe(x, targets, fit, valid, (1, 0.5, 0.25) if two else (1,))
        more = known if name == "generative" else {}
        rows.append({"row": name, **score(layer(x[test]), targets[test]), **more})
        # the best of these is kept for --predict
        if name.split(",")[0] in (*objectives, "both") and loss < kept["loss"]:
            kept |= {"row": name, "loss": loss, "probe": layer.state_dict()}
    truth = targets[test].argmax(1) if classes else torch.zeros(int(test.sum()))  # all of one kind
    if classes:
        answer = F.linear(features[kept["row"]][test], **kept["probe"]).argmax(1)
        right = targets[test].gather(1, answer[:, None])[:, 0] > 0  # one of a clip's classes
        truth = torch.where(right, answer, truth)  # which the picture shows it as
        h = supervised[0]["contrastive"][test]  # of the encoder that was trained with labels
        logits = labelled["classifier"].cpu()(h)
        rows.append({"row": "supervised", **score(logits, targets[test])})
    else:  # --predict will name the clips that are most alike, out of 2000 at most
        row, every = objectives[0], len(clips) // 2000 + 1
        kept |= {"row": row, "embeddings": ours[row][::every].clone(), "paths": paths[::every]}
        rows.append({"row": "no classes", **known, "clips": int(test.sum())})
    if picture:
        held_out = {name: x[test] for name, x in features.items()}
        file = paths[test.nonzero()[0].item()]
        write_whole(picture, lambda path: draw(path, held_out, truth, classes, kept, models, file))
    return rows, kept


@torch.no_grad()
def draw(path: Path, features: dict, truth: Tensor, classes: list, kept: dict,
         models: nn.ModuleDict, file: str):
    """The PNG: embeddings of held-out clips, one of them as codes and back, the confusions."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # needs no display

    clip = models.cpu()["front"](read_audio(file, SAMPLE_RATE)[None])  # (1, F, T)
    codes = models["tokenizer"].codes(clip)  # (1, L)
    decoded = models["tokenizer"].decode(codes[0], clip)  # (F, 2 L)
    # to matplotlib $ begins a formula, and a label that begins with _ is not for the legend
    classes = [" " + name.replace("$", r"\$") for name in classes]
    picture = Figure(figsize=(14, 8), layout="constrained")
    top, bottom = picture.subplots(2, 3)
    for axis, name in zip(top, ("random VGG", "contrastive", "generative")):
        if name not in features:  # an arm that was not trained
            axis.set_axis_off()
            continue
        x = features[name]
        x = (x - x.mean(0)) / (x.std(0, correction=0) + 1e-6)
        x = x @ torch.linalg.svd(x, full_matrices=False)[2][:2].T  # (N, 2), principal components
        for c, label in enumerate(classes or [""]):
            axis.plot(*x[truth == c].T, ".", color=colormaps["tab20"](c % 20), label=label)
        axis.set(title=f"{name}, PCA", xticks=[], yticks=[])
    for axis, name, image in ((bottom[0], "log-mel", clip[0]), (bottom[1], "decoded", decoded)):
        axis.imshow(image.numpy(), aspect="auto", origin="lower", vmin=clip.min(), vmax=clip.max())
        axis.set(title=f"held-out clip, {name}", xlabel="frame", ylabel="mel band")
    bottom[1].set_visible("generative" in features)
    track = bottom[0].inset_axes([0, -0.25, 1, 0.08])
    track.set_visible("generative" in features)
    track.imshow(codes.numpy(), aspect="auto", cmap="prism", interpolation="nearest")
    track.set(xticks=[], yticks=[], xlabel="its codes as colours")
    bottom[2].set_visible(len(classes) > 0)
    if classes:
        found = F.linear(features[kept["row"]], **kept["probe"]).argmax(1)  # (N,), the answers
        counts = F.one_hot(truth, len(classes)).T @ F.one_hot(found, len(classes))  # (C, C)
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        bottom[2].imshow(shares.numpy(), cmap="Blues")
        bottom[2].set(title=f"{kept['row']}, {kept['key']}", xlabel="answer", ylabel="class")
    if 0 < len(classes) <= 20:
        top[1 if "contrastive" in features else 2].legend(fontsize=7)
        bottom[2].set_xticks(range(len(classes)), classes, rotation=90)
        bottom[2].set_yticks(range(len(classes)), classes)
    picture.savefig(path, dpi=90, format="png")


# -----------------------------------------------------------------------------
# Main


def make_models(classes: int, hop_length: int, width: int, codes: int, flatten: float,
                context: int, transformer: tuple, **_) -> nn.ModuleDict:
    """Everything with weights, out of a run's arguments, of which there are more (_)."""
    D = EMBEDDING
    return nn.ModuleDict({
        "front": FrontEnd(hop_length), "encoder": Encoder(width),
        "projector": nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.ReLU(),
                                   nn.Linear(D, 128)),
        "classifier": nn.Linear(D, max(1, classes)), "tokenizer": Tokenizer(codes, flatten),
        "code_model": CodeModel(codes, context, *transformer)})


def predict(files: list, count: int, out: Path, device, workers: int):
    """Prints the three likeliest classes of each file or, where a run had no classes, the three of
    its clips that are most alike; writes `count` continuations of each file."""
    state = load_checkpoint(out / "checkpoint.pt", VERSION)
    kept, classes = state["kept"], state["classes"]
    if not kept:
        die(f"{out}/checkpoint.pt: no probe is fitted yet; go on with --resume")
    if count and "generative" not in state["args"]["objectives"]:
        die(f"--sample: {out}/checkpoint.pt was trained without the generative half")
    usable = list(scan_audio(files, SAMPLE_RATE, 0.1, workers))
    if not usable:
        die("none of these files can be used")
    models = make_models(len(classes), **state["args"]).to(device).eval()
    models.load_state_dict(kept["models"])
    if count:
        make_folder(out / "samples")
        torch.manual_seed(0)
        for number, path in enumerate(map(Path, usable)):
            sample(models, path, count, out / "samples" / f"{number}_{path.stem[:50]}")
    (features,), _ = embed(models["front"], models["tokenizer"], [models], usable, 0)
    x, names, how = features[kept["row"]], classes, ""
    if classes:
        scores = F.linear(x, **kept["probe"]).softmax(1)  # (n, C)
    else:
        names, known, how = kept["paths"], kept["embeddings"], "; no classes: clips most alike"
        unit = lambda h: F.normalize((h - known.mean(0)) / (known.std(0, correction=0) + 1e-6))
        scores = unit(x) @ unit(known).T  # (n, N), cosines of standardised embeddings
    print(f"model  {kept['row']}, {kept['key']}{how}")
    for path, likely in zip(usable, scores):
        best = likely.argsort(descending=True)[:3]
        print(f"{path}: " + ", ".join(f"{names[i]} {likely[i]:.2f}" for i in best))


@torch.no_grad()
def sample(models: nn.ModuleDict, path: Path, count: int, out: Path):
    """Lets the Transformer go on `count` times after the first `context` / 2 codes of a file, for
    `context` more: out_0.wav, out_1.wav ... and their spectrograms beside the file's, out.png."""
    from matplotlib.figure import Figure  # needs no display

    front, tokenizer, model = models["front"], models["tokenizer"], models["code_model"]
    log_mel = front(read_audio(path, SAMPLE_RATE)[None].to(front.mean.device))  # (1, F, T)
    given = tokenizer.codes(log_mel)[0, : model.context // 2]  # (L,)
    codes = model.go_on(given.repeat(count, 1), model.context)  # (count, L + context)
    decoded = torch.stack([tokenizer.decode(row, log_mel) for row in codes])  # (count, F, T)
    for k, waveform in enumerate(to_waveform(decoded, front)):
        soundfile.write(f"{out}_{k}.wav", waveform.numpy(), SAMPLE_RATE)
    images = {"as recorded": log_mel[0, :, : decoded.shape[2]].cpu().numpy()}
    images |= {f"continuation {k}": image for k, image in enumerate(decoded.cpu().numpy())}
    picture = Figure(figsize=(3 + 3 * len(images), 3), layout="constrained")
    for axis, (title, image) in zip(picture.subplots(1, len(images)), images.items()):
        axis.imshow(image, aspect="auto", origin="lower", vmin=log_mel.min().item(),
                    vmax=log_mel.max().item())
        axis.axvline(2 * len(given), color="white")
        axis.set(title=title, xlabel="frame", ylabel="mel band")
    picture.savefig(f"{out}.png", dpi=90)
    print(f"wrote  {out}_0.wav to {out}_{count - 1}.wav and {out}.png: {path} goes on")


def to_waveform(log_mel: Tensor, front: FrontEnd) -> Tensor:
    """Standardised log-mel (B, F, T) -> (B, S), T hops long, less a rest of 100 samples; the phase
    is Griffin and Lim's."""
    magnitude = ((log_mel * front.sd + front.mean).exp() - front.floor).clamp(min=0).cpu()
    hop = front.spectrogram.hop_length
    linear = InverseMelScale(257, BANDS, SAMPLE_RATE, 60, 7800, driver="gelsd")(magnitude)
    finer = F.interpolate(linear, size=linear.shape[2] * hop // 100 + 1, mode="linear")
    waveform = GriffinLim(n_fft=512, n_iter=64, win_length=400, hop_length=100, power=1)(finer)
    return waveform / waveform.abs().amax(1, keepdim=True).clamp(min=1)


def main(args: argparse.Namespace):
    """Trains and compares every arm, or answers --predict."""
    device, (rank, size) = start_run(args.device), rank_and_size()
    if args.predict:
        return predict(args.predict, args.sample, args.out, device, args.workers)
    state = open_run(vars(args), VERSION)
    args = argparse.Namespace(**state["args"])  # on --resume those of its start
    if args.sequences % size:
        die(f"--sequences {args.sequences} cannot be shared by {size} processes")
    out, folder = Path(args.out), Path(args.data or Path(args.out, "audio"))
    if not args.data and rank == 0:
        for kind in SOUNDS:
            make_folder(folder / kind)
        write = partial(write_sound, folder=folder)
        list(in_background(write, range(GENERATED_CLIPS), args.workers))
        print(f"data   synthetic: {GENERATED_CLIPS} clips of 2 s in {folder} (--data: recordings)")
    if dist.is_initialized():
        dist.barrier()  # rank 0 made the demo's audio
    clips = load_clips(folder, args.subset, args.workers)
    classes = sorted({name for clip in clips for name in clip[2]})
    targets = torch.tensor([[name in clip[2] for name in classes] for clip in clips]).float()
    targets = targets / targets.sum(1, keepdim=True)  # (N, C), several classes share a clip evenly
    longest = SAMPLE_RATE * max(seconds for _, seconds, *_ in clips)  # samples
    # no more places than the longest clip fills; embed() reads the state behind a view's last code,
    # which only a sequence one code longer trains
    most = max(int(longest / args.hop_length) // 2, WINDOW // args.hop_length // 2 + 1)
    args.context = state["args"]["context"] = min(args.context, most)
    state["classes"], rows_of = classes, state.setdefault("rows", {})
    save_first(state, [(Path(path).name, *more) for path, *more in clips])
    part_of = np.array([part for *_, part in clips])  # (N,)
    folds = sorted(set(part_of) - {"train", "valid", "test"})
    splits = {} if folds else {"official split": part_of}
    tested = folds[: args.folds if classes else 1]
    for test, valid in zip(tested, folds[1:] + folds[:1]):  # the fold after the tested one is valid
        splits[f"fold {test}"] = np.select(
            [part_of == test, part_of == valid], ["test", "valid"], "train")
    train_arm = partial(train, batch_size=args.batch_size, steps=args.steps, lr=args.lr,
                        workers=args.workers, state=state)
    arms = len(args.objectives) + ("generative" in args.objectives) + bool(classes)  # of a split
    state["planned"] = len(args.seed) * len(splits) * arms
    table = []  # of each seed its rows
    for seed in args.seed:
        table.append([])
        for split, parts in splits.items():
            if (key := f"seed {seed} {split}") not in rows_of:
                torch.manual_seed(random_key("weights", seed))
                models = make_models(len(classes), **vars(args)).to(device)
                random, labelled = deepcopy(models), deepcopy(models)  # the same first weights
                seen = np.flatnonzero(parts != "test")
                pretrain(key, models, labelled, [clips[i] for i in seen], targets[seen], train_arm,
                         args.objectives, args.views, args.temperature, args.sequences,
                         args.dictionary, args.workers)
                rows_of[key], kept = compare(
                    key, [models, random, labelled], clips, targets, parts, args.objectives,
                    classes, args.workers, None if state["kept"] else out / "sounds.png")
                # --predict uses the first split; state["arms"] lacks front end and dictionary
                state["kept"] = state["kept"] or kept
                save(state)
        # a seed's row is the mean over its splits; their clips add up
        for same in zip(*[rows_of[f"seed {seed} {split}"] for split in splits]):
            mean = {k: float(np.mean([row[k] for row in same])) for k in same[0] if k != "row"}
            mean["clips"] = sum(row["clips"] for row in same)
            table[-1].append({"row": same[0]["row"], **mean})
    report(table, out / "results.json", state["args"], state["began"])
    end_run(out, "sounds.png", state["began"])


if __name__ == "__main__":
    run(main, parse_args())
