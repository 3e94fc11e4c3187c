"""Tempo from time-stretch equivariance, after E. Quinton, "Equivariant self-supervision for musical
tempo estimation", ISMIR 2022 (arXiv 2209.01478).

Play a recording a times faster and its tempo is a times higher, whatever it was. So make two views
of an unlabelled clip, stretched by a_i and a_j, let an encoder give each one number z, and ask that
z_i/z_j = a_i/a_j. The unknown tempo cancels; nothing collapses, for a constant z has the wrong
ratio. A head of 300 classes, or one constant from drum loops, gives BPM.

Measured, Accuracy 1 / 2, 3 seeds          demo: 400 generated clips      102 real excerpts
  periodicity, no labels, songs left out   .888 / .987                    .823 / .936
  the same, untrained                      .242 / .275                    .211 / .243
  autocorrelation, the same songs          .775 / .938                    .620 / .796
  a head with labels on its frozen h       .878 / .978                    .676 / .899
  the same head on an untrained h          .815 / .943                    .549 / .801
  the paper's TCN: head on its frozen h    .141 / .169                    .141 / .209
  the paper's TCN: head on an untrained h  .215 / .243                    .144 / .186
The demo takes 461 s on two cores for its three seeds. Trained on bare clicks, the TCN's z is the
tempo times a constant; on music z follows the stretch, as onset density does, but not the tempo.

    python tempo_equivariant.py                        demo: makes its own music
    python tempo_equivariant.py --data ./gtzan         your recordings
    python tempo_equivariant.py --predict song.mp3     the tempo of a file

Differences from the paper (in brackets: its released code, as its full text could not be obtained)
- Views are cropped out of more audio (padded: the silent tail gives the rate away).
- Stretch rates are log-uniform from 0.71 to 1.41 (uniform, 0.8 to 1.2): wide steps show more of z.
- WSOLA is batched, with the constants of SoX for slowing down; it is the TCN's only augmentation,
  as in the released model (no pitch shift, volume, polarity, noise or frequency mask).
- Variance-keeping initialisation of the TCN: with PyTorch's, even labels taught it nothing in 250
  steps. Flux views, a frequency mask and 6460 steps did not lift its frozen h above random either.
- The TCN sees 20 bands at 25 frames/s by default (81 at 100), to end in minutes.
- Both views in one forward pass: the batch norm of the input sees both.
- AdamW (weight decay 1e-4), one cycle, gradients clipped to 1 (Adam, constant rate): z_j near 0 is
  a pole of the ratio.
- Targets of the 300 classes are bumps of 2 % (one-hot); tempi above 299 BPM count as 299 (as class
  0). The head is fitted to a frozen encoder by L-BFGS (it trains all weights, though it calls the
  encoder frozen: our row "fine-tuned", not in the demo). Labelled training sees stretched views.
- A file is read in windows of 13.6 s, overlapping, up to its end (of a view's length, side by side,
  the rest dropped). Its tempo is the arg max of their mean (the slower of the two best classes,
  hence half the tempo wherever the octave is in doubt). Accuracy 2 counts 1/3 (0.33).
- Ours beside it: the periodicity encoder on flux views, and the label-free read-out by one constant
  from drum loops, its octave and a prior about 120 BPM.

Copy this file and common.py; nothing else is needed.
"""

import argparse
import csv
import json
import math
import os
import re
import unicodedata
from collections import defaultdict, deque, namedtuple
from functools import cache, partial
from itertools import compress
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common import (LogMel, die, end_run, find_audio, in_background, linear_probe, load_checkpoint,
                    make_folder, open_run, random_key, rank_and_size, read_audio, report, run,
                    save, save_first, scan_audio, start_run, training, write_whole)

# -----------------------------------------------------------------------------
# Hyper-parameters: `demo` applies without --data, `data` with it; `paper`: as published, but for
# the differences above.

HYPER_PARAMETERS = {  # name: (demo, data, paper, meaning)
    "steps": (250, 800, 6460, "optimiser steps of every trained arm"),
    "batch_size": (16, 16, 32, "pairs of views in a step"),
    "lr": (2e-3, 3e-3, 1e-3, "peak learning rate of one cycle (paper: constant)"),
    "view_seconds": (8.0, 9.6, 13.6, "seconds in a view"),
    "left_out_folds": (1, 2, 2, "how many of 5 folds of songs are left out of training in turn"),
    "fine_tune": (False, True, True, "a row for SSL and then labels (the demo has no time)"),
    "max_stretch": (1.41, 1.41, 1.25, "largest stretch rate a, smallest 1/a (paper: 0.8 to 1.2)"),
    "tcn_bands": (20, 20, 81, "mel bands of the tcn's input"),
    "tcn_frame_rate": (25, 25, 100, "frames per second of the tcn's input"),
    "sample_rate": (22050, 22050, 44100, "Hz"),
    "n_fft": (1024, 1024, 2048, "samples"),
}
LIMITS = {"steps": (2, 10**8), "batch_size": (1, 10**5), "lr": (1e-9, 10), "view_seconds": (2, 36),
          "left_out_folds": (1, 5), "workers": (0, 64), "seed": (0, 2**32)}
GENERATED_CLIPS = 400  # of the demo
WINDOW_SECONDS = 13.6  # whole files are read in windows of the paper's excerpt
VERSION = "tempo_equivariant 8"  # of the checkpoint's contents and of what trained them
CLASSES = 300  # class k of the head is k BPM
PRIOR_BPM, PRIOR_OCTAVES = 120.0, 0.5  # log-normal tempo prior: stated, not fitted to any recording
BPM_AXIS = 15 * 2 ** (torch.arange(145) / 24)  # log tempo, 24 bins to the octave: 15 to 960 BPM
H_BINS = slice(24, 121)  # of BPM_AXIS: the 97 bins of our encoder's h, 30 to 480 BPM


def parse_args(argv=None) -> argparse.Namespace:
    """The command line, completed from the column of HYPER_PARAMETERS that applies."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0],
                                     epilog="Chosen by --setting alone: ")
    parser.error = die  # one line, without the usage
    add, encoders = parser.add_argument, list(ENCODERS)
    add("--data", type=Path, metavar="DIR", help="recordings (default: makes its own)")
    add("--encoders", nargs="+", default=encoders, choices=encoders, help="the paper's, ours")
    add("--setting", choices=["demo", "data", "paper"], help="column of the defaults below")
    for name, (demo, data, paper, meaning) in HYPER_PARAMETERS.items():
        text = f"{meaning} (demo {demo}, data {data}, paper {paper})"
        if name in LIMITS:
            add("--" + name.replace("_", "-"), type=type(paper), help=text)
        else:
            parser.epilog += f"{name}: {text}. "
    add("--out", type=Path, default=Path("out/tempo_equivariant"), metavar="DIR", help="results")
    add("--seed", type=int, nargs="+", default=[0], help="several give mean and sd")
    add("--device", default="", help="cpu, cuda or mps (default: the best)")
    add("--workers", type=int, default=2, help="threads that read audio; changes no result")
    add("--resume", action="store_true", help="go on from --out/checkpoint.pt, as started")
    add("--predict", nargs="*", metavar="FILE", help="print tempi (of all of --data, without FILE)")
    args = parser.parse_args(argv)
    column = ("demo", "data", "paper").index(args.setting or ("data" if args.data else "demo"))
    for name, columns in HYPER_PARAMETERS.items():
        if getattr(args, name, None) is None:
            setattr(args, name, columns[column])
    for name, (low, high) in LIMITS.items():
        if not all(low <= value <= high for value in np.ravel(getattr(args, name))):
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}")
    args.seed, args.encoders = list(dict.fromkeys(args.seed)), list(dict.fromkeys(args.encoders))
    if args.predict == [] and not args.data:
        parser.error("--predict needs FILE... or --data DIR")
    return args


# -----------------------------------------------------------------------------
# Data: the demo's own music, patterns on a grid of ticks. Letters: S samples.


def drum(kind: str, rng, sample_rate: int) -> np.ndarray:
    """A random kick, snare or hat of 0.3 s: a falling sine, noise over a tone, bright noise."""
    t = np.arange(int(0.3 * sample_rate)) / sample_rate
    noise = rng.standard_normal(len(t))
    if kind == "kick":
        cycles = rng.uniform(40, 70) * t + rng.uniform(2, 5) * (1 - np.exp(-t / 0.03))
        return np.sin(2 * np.pi * cycles) * np.exp(-t / rng.uniform(0.04, 0.15))
    if kind == "snare":
        tone = np.sin(2 * np.pi * rng.uniform(150, 280) * t)
        return (rng.uniform(0.3, 1) * noise + tone) * np.exp(-t / rng.uniform(0.03, 0.1))
    return 0.5 * np.diff(noise, prepend=0) * np.exp(-t / rng.uniform(0.01, 0.08))


def instrument(rng, sample_rate: int):
    """A random instrument: a function that gives its sound of a chord of MIDI numbers."""
    t = np.arange(int(rng.uniform(0.2, 1.2) * sample_rate)) / sample_rate
    attack, decay = 10 ** rng.uniform(-2.5, -1.2), 10 ** rng.uniform(-1, 0.3)
    envelope = np.minimum(1, t / attack) * np.exp(-t / decay) * np.minimum(1, (t[-1] - t) / 0.02)
    k = np.arange(1, 8)[:, None]
    cycle = (np.sin(2 * np.pi * k * np.arange(1024) / 1024 + k) / k ** rng.uniform(0.7, 2.5)).sum(0)
    phase = lambda midi: (1024 * 440 * 2 ** ((midi - 69) / 12) * t).astype(int) % 1024
    return cache(lambda *chord: envelope * sum(cycle[phase(midi)] for midi in chord))


def make_track(bpm: float, seconds: float, rng, sample_rate: int) -> np.ndarray:
    """Music at `bpm`, (S,) float32: drums, bass, chords and melody or some of them, now and then
    swung, ternary or in 3, with early, late and missing notes, compression and noise."""
    beats, ticks = rng.choice([4] * 8 + [3]), rng.choice([4] * 15 + [3])  # in a bar, in a beat
    bar, tick = beats * ticks, 60 / bpm / ticks  # a bar in ticks, a tick in seconds
    every = lambda step, first=0: 1.0 * (np.arange(2 * bar) % step == first)  # patterns of two bars
    maybe = lambda p: 1.0 * (rng.random(2 * bar) < p)
    beat, half, downbeat = every(ticks), every(2 * ticks), every(bar)
    offbeat = every(ticks, (ticks + 1) // 2)
    eighths, back = beat + offbeat, beat - (half if beats == 4 else downbeat)
    accent = 1 - rng.uniform(0.3, 1) * (0.5 - 0.3 * beat - 0.2 * downbeat)
    scale = rng.choice([[0, 2, 4, 5, 7, 9, 11], [0, 2, 3, 5, 7, 8, 10]])  # major, minor
    roots = rng.integers(36, 48) + rng.choice(scale, 4)  # of a chord a bar, as MIDI numbers
    kick, snare, hat = (drum(kind, rng, sample_rate) for kind in ("kick", "snare", "hat"))
    bass, chords, lead = (instrument(rng, sample_rate) for _ in range(3))
    parts = [  # probability, loudness at each tick of two bars, what sounds over a root
        (0.95, rng.choice([beat, beat, beat - back]), lambda root: kick),
        (0.9, back, lambda root: snare),
        (0.9, rng.choice([eighths] * 8 + [every(1), offbeat]), lambda root: hat),
        (0.8, rng.choice([eighths, eighths, beat, half, np.maximum(downbeat, back)]),
         lambda root: bass(root + rng.choice([0, 0, 12]))),
        (0.6, rng.choice([eighths, eighths, downbeat, half, back, offbeat, beat]),
         lambda root: chords(root + 12, root + 16, root + 19)),
        (0.6, rng.choice([eighths, eighths * maybe(0.6), np.maximum(beat, maybe(0.3))]),
         lambda root: lead(root + 24 + rng.choice(scale)))]
    if rng.random() < 0.15:  # no drums, but all the others
        parts = [(1, pattern, sound) for _, pattern, sound in parts[3:]]
    parts = [(10 ** rng.uniform(-0.7, 0) * accent * pattern, sound) for p, pattern, sound in parts
             if rng.random() < p]
    swing = rng.choice([0, 0, 0, 0, 0.15, 0.3]) * (ticks == 4)  # of every other tick, in ticks
    jitter, skip = rng.uniform(0, 0.008), rng.uniform(0, 0.08)  # seconds, probability
    start = rng.integers(4 * bar) + rng.random()  # the clip is cut out of a longer piece
    waveform = np.zeros(int(sample_rate * (seconds + 4)))  # begins 1 s early: notes ring on
    for k in range(int(start - 1 / tick), int(start + seconds / tick) + 1):
        for loudness, sound in parts:
            if loudness[k % (2 * bar)] > 0 and rng.random() > skip:
                onset = 1 + (k - start + swing * (k % 2)) * tick + jitter * rng.normal()  # seconds
                at = max(0, int(sample_rate * onset))
                note = rng.uniform(0.7, 1) * loudness[k % (2 * bar)] * sound(roots[k // bar % 4])
                waveform[at : at + len(note)] += note
    waveform = waveform[sample_rate:][: int(seconds * sample_rate)]
    waveform = np.tanh(10 ** rng.uniform(-1.2, -0.3) * waveform / (waveform.std() + 1e-9))
    waveform = 0.8 * waveform / (np.abs(waveform).max() + 1e-9)
    noise = 10 ** rng.uniform(-4, -1.6) * rng.standard_normal(len(waveform))
    return (waveform + noise).astype(np.float32)


def make_demo(folder: Path, sample_rate: int, seconds: float, workers: int):
    """Writes the demo's tracks as wav files, and tempo.csv."""
    make_folder(folder)
    write = partial(write_track, folder=folder, sample_rate=sample_rate, seconds=seconds)
    lines = ["file,bpm", *in_background(write, range(GENERATED_CLIPS), workers)]
    (folder / "tempo.csv").write_text("\n".join(lines))
    print(f"data   synthetic: {GENERATED_CLIPS} clips of {seconds} s in {folder} "
          "(--data DIR: recordings)")


def write_track(number: int, folder: Path, sample_rate: int, seconds=16.0) -> str:
    """Writes a generated track: its line of tempo.csv."""
    rng, name = np.random.default_rng(number), f"track{number:04d}.wav"
    bpm = float(np.clip(rng.lognormal(math.log(115), 0.28), 50, 210))
    soundfile.write(folder / name, make_track(bpm, seconds, rng, sample_rate), sample_rate)
    return f"{name},{bpm:.3f}"


# -----------------------------------------------------------------------------
# Data: recordings and their tempo, in the layouts and annotation formats of the tempo data sets.

TRUTH_KINDS = "annotations_v2 .bpm .jams .beats .mf .json .csv .tsv".split()  # best first


def track_key(name: str) -> str:
    """gtzan_blues_00000.bpm, genres/blues/blues.00000.wav and the like -> blues.00000"""
    key = unicodedata.normalize("NFC", name).replace("\\", "/").split("/")[-1].lower()
    key = re.sub(r"^(giantsteps_|acm_mirum_|hainsworth_|hains|ballroom_|smc_)+", "", key)
    key = re.sub(r"(\.(wav|au|mp3|flac|ogg|oga|opus|aiff?|clip|lofi|jams|bpm|beats))+$", "", key)
    return re.sub(r"^(?:gtzan_)?([a-z]+)[._](\d{5})$", r"\1.\2", key)


def read_truth(path: Path) -> list[tuple]:
    """(track name, BPM, song or '') of each track in an annotation file; [] if it is none."""
    data, kind = path.read_bytes(), path.suffix.lower()  # in UTF-8, or a UTF-16 of Windows
    text = data.decode(json.detect_encoding(data), "replace").lstrip("\r\n")
    gap = lambda times: np.median(np.diff(np.array(times, float))) if times[1:] else 0
    beat_tempo = lambda times: 60 / (gap(times) or math.inf)  # 0: not known
    if kind == ".bpm":  # the first token
        return [(path.name, (text.split() or [""])[0], "")]
    if kind == ".beats":  # lines of time<TAB>position
        times = [line.split()[0] for line in text.splitlines() if line.strip()]
        return [(path.name, beat_tempo(times), "")]
    if kind == ".jams":  # a tempo if there is one, else beats
        parts = json.loads(text)["annotations"]
        tempi = [event["value"] for part in parts if part["namespace"] == "tempo"
                 for event in part["data"][:1]]
        tempi += [beat_tempo([event["time"] for event in part["data"]]) for part in parts
                  if (part.get("sandbox") or {}).get("annotation_type") == "beat"]
        return [(path.name, value, "") for value in tempi if not math.isnan(to_bpm(value))][:1]
    if kind == ".json":  # the index of the official code
        index = [r for r in json.loads(text) if "tempo" in r]
        return [(str(r["audio_filepath"]), r["tempo"], "") for r in index]
    if kind == ".mf":  # Marsyas' tables have no heading, and now and then two tabs
        text = "file\tbpm\n" + re.sub(r"\t+", "\t", text)
    for delimiter in ",;\t":
        rows = csv.DictReader(text.splitlines(), delimiter=delimiter, skipinitialspace=True)
        rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or []]
        if {"file", "bpm"} <= set(rows.fieldnames):
            return [((r["file"] or "").strip(), r["bpm"], r.get("song") or r.get("origin") or "")
                    for r in rows]
    return []  # a table of something else


def to_bpm(value) -> float:
    """A number from above 0 to below 1000, or nan for whatever else an annotation holds."""
    try:
        number = float(str(value).replace(",", "."))  # 68,5 beside a semicolon
    except ValueError:
        return math.nan
    return number if 0 < number < 1000 else math.nan


def find_truth(folder: Path, paths: list, unusable=()) -> dict[Path, tuple[float, str]]:
    """{path: (BPM or nan, song or '')} from the best kind of annotation below the folder that fits
    some of the paths; with the unusable ones' names known, theirs is not taken for another's."""
    named = defaultdict(list)  # what an annotation may call a file: the files that this can be
    for path in [*paths, *unusable]:
        named[os.path.normpath(path)].append(path)
        named[track_key(path.name)].append(path)
    files = find_audio(folder, TRUTH_KINDS)
    for kind in TRUTH_KINDS:
        found, used, strangers, numberless = {}, set(), 0, 0
        for file in [f for f in files if kind in (f.suffix.lower(), f.parent.parent.name)]:
            try:
                rows = read_truth(file)
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError,
                    ArithmeticError, csv.Error) as e:
                print(f"skip   {file}: not an annotation ({type(e).__name__})")
                continue
            for name, value, song in rows:
                alike = named[track_key(name)]
                sure = (named[os.path.normpath(folder / name)]
                        or named[os.path.normpath(file.parent / name)]
                        or [path for path in alike if path.parent == file.parent])
                meant, bpm = sure or alike, to_bpm(value)
                numberless += math.isnan(bpm)
                if len(meant) == 1:
                    found.setdefault(meant[0], ([], []))[not sure].append((bpm, song.strip()))
                else:
                    strangers += 1  # no such file, or several
            if rows:
                used.add(file if kind in (".mf", ".json", ".csv", ".tsv") else file.parent)
        truth = {}
        for path, (sure, alike) in found.items():  # a row for a namesake elsewhere does not count
            tempi, songs = zip(*(sure or alike))
            tempi = [bpm for bpm in tempi if not math.isnan(bpm)] or [math.nan]
            truth[path] = tempi[-1], max(songs)  # a song even without a number
        count = sum(path in truth and not math.isnan(truth[path][0]) for path in paths)
        if used:
            print(f"truth  {kind} in {', '.join(map(str, sorted(used)))}: {count} of "
                  f"{len(paths)} files have a tempo; {strangers} annotations fit no file or "
                  f"several, {numberless} hold no tempo")
        if count:
            return truth
    print("truth  none found. For GTZAN put the folder tempo of "
          f"github.com/TempoBeatDownbeat/gtzan_tempo_beat into {folder}; for your own write "
          f"{folder}/tempo.csv with the columns file,bpm")
    return {}


Clip = namedtuple("Clip", "path seconds bpm song", defaults=(math.nan, ""))  # nan: not known


def load_clips(folder: Path, sample_rate: int, min_seconds: float, workers: int) -> list[Clip]:
    """All audio to use below a folder; dies if there is nothing."""
    paths = find_audio(folder)
    seconds = scan_audio(paths, sample_rate, min_seconds, workers)
    if not seconds:
        found = f"{len(paths)} audio files, none to use" if folder.is_dir() else "no such folder"
        die(f"--data {folder}: {found}; expected wav au mp3 flac ogg opus aiff of "
            f"{min_seconds:.2f} s or more, at any depth, as genres/pop/pop.00001.wav")
    truth = find_truth(folder, list(seconds), set(paths) - set(seconds))
    clips = [Clip(str(path), s, *truth.get(path, ())) for path, s in seconds.items()]
    return [clip._replace(song=clip.song or os.path.relpath(clip.path, folder)) for clip in clips]


def load_batch(step: int, clips: list, arm: str, items: range, seconds: float, max_stretch: float,
               sample_rate: int):
    """Batch `step` of an arm: (B, S) excerpts; (2B,) log-uniform stretch rates, of the first views,
    then of the second; (2B,) BPM of these views, nan where unknown."""
    waveform = torch.zeros(len(items), round(seconds * sample_rate))  # (B, S)
    bpm, rates = [], []
    for row, item in zip(waveform, items):  # a seed per item: the same draws on any thread or rank
        rng = np.random.default_rng(random_key(arm, step, item))
        clip = clips[rng.integers(len(clips))]
        start = rng.uniform(0, max(0, clip.seconds - seconds))
        excerpt = read_audio(clip.path, sample_rate, start, seconds)[: len(row)]
        row[: len(excerpt)] = excerpt  # by rounding a few samples short at most
        bpm.append(clip.bpm)
        rates.append(np.exp(rng.uniform(-1, 1, 2) * math.log(max_stretch)))
    rate = torch.tensor(np.array(rates)).float().T.flatten()  # (B, 2) -> (2B,)
    return waveform, rate, torch.tensor(bpm).repeat(2) * rate


# -----------------------------------------------------------------------------
# Stretch without a leak: more is read than a view needs, and cropped; none is filled up.
# Letters: B clips, V views, S samples, M segments, T frames, a stretch rate (above 1 is faster).


def wsola(waveform: Tensor, rate: Tensor, sample_rate: int, samples: int) -> Tensor:
    """Waveform-similarity overlap-add: waveforms at tempi of their own, pitch kept, all at once.

    Verhelst & Roelands 1993 with the constants that SoX's `tempo -m` has for slowing down: segments
    of 82 ms overlap by a seventh; each begins where the rate wants it or up to a sixth of a segment
    later, wherever it best continues the one before (least squares, at about 5.5 kHz).

    Args:
        waveform: (B, S), S >= samples * rate + 0.2 s. rate: (V,) up to 1.48, V a multiple of B:
            view v is of clip v mod B. samples: length wanted.
    Returns:
        (V, samples); at rate 1 the waveform itself from the overlap (12 ms) on.
    """
    source = torch.arange(len(rate), device=rate.device) % len(waveform)  # (V,) the clip of a view
    coarse = round(sample_rate / 5500)
    low = waveform.unfold(1, coarse, coarse).mean(2)  # (B, S / coarse): for the search
    segment = round(0.082 * sample_rate / coarse)  # all lengths in samples of `low`
    overlap, search = segment // 7, segment // 6
    hop = segment - overlap
    numbers = torch.arange(math.ceil(samples / coarse / hop) + 1, device=rate.device)
    wanted = (rate[:, None] * hop * numbers).long()  # (V, M): where the rate wants them
    strips = low.unfold(1, overlap, 1)  # (B, ., overlap): one from each sample on
    offsets, starts = torch.arange(search, device=rate.device), [wanted[:, 0]]
    for k in range(1, len(numbers)):  # over segments: each continues the one before
        ending = strips[source, starts[-1] + hop]  # (V, overlap): of the one before
        candidates = strips[source[:, None], wanted[:, k, None] + offsets]  # (V, search, overlap)
        distance = (candidates - ending[:, None]).square_().sum(2)  # (V, search)
        starts.append(wanted[:, k] + distance.argmin(1))
    # from here on all lengths in samples of `waveform`
    segment, overlap, hop = segment * coarse, overlap * coarse, hop * coarse
    starts = torch.stack(starts, 1) * coarse  # (V, M)
    pieces = waveform.unfold(1, segment, 1)[source[:, None], starts]  # (V, M, segment)
    fade_in = (torch.arange(overlap, device=rate.device) + 0.5) / overlap
    pieces[:, 1:, :overlap] *= fade_in  # not the first: its overlap is cropped below
    pieces[:, 1:, :overlap] += (1 - fade_in) * pieces[:, :-1, hop:]
    return pieces[:, :, :hop].flatten(1)[:, overlap : overlap + samples]


def read_at(values: Tensor, at: Tensor) -> Tensor:
    """values (..., N) at fractional positions (..., T) on the last axis, interpolated linearly."""
    at = at.expand(*values.shape[:-1], -1)
    below = at.long().clamp(0, values.shape[-1] - 2)
    return torch.lerp(values.gather(-1, below), values.gather(-1, below + 1), at - below)


# -----------------------------------------------------------------------------
# Model. Letters: B views, F mel bands, T frames, C channels, K = 145 bins of BPM_AXIS.
# An encoder has sample_rate and seconds (of a view), views(), embed() -> h, forward() -> z for the
# loss; for the read-out pseudo_tempo(), from h the tempo up to one constant, and scores() per BPM.


class ResidualBlock(nn.Module):
    """(B, C, 1, T) -> same: the paper's dilated block; a learned shortcut, no normalisation."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.dilated = nn.Conv2d(channels, channels, (1, 5), padding="same", dilation=(1, dilation))
        self.mix, self.shortcut = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.mix(F.elu(self.dilated(x), inplace=True))


class TCN(nn.Module):
    """The paper's network, 23 235 parameters at F = 81: (B, F, T) -> z (B,), of any sign and scale.

    The published layers, but faster: the maximum before the ELU (which rises), the gain of the
    input's batch norm inside the first convolution (so that no gradient of the input is needed),
    channels-last memory.
    """

    def __init__(self, sample_rate: int, n_fft: int, seconds: float, bands: int, frame_rate: int):
        super().__init__()
        self.sample_rate, self.seconds, self.norm = sample_rate, seconds, nn.BatchNorm2d(1)
        self.log_mel = LogMel(sample_rate, n_fft, sample_rate // frame_rate, bands, f_min=30,
                              f_max=min(17000, sample_rate / 2))
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3)
        rest = ((bands - 2) // 3 - 2) // 3  # bands left behind the two poolings
        self.conv3 = nn.Conv2d(16, 16, (rest, 1))
        self.blocks = nn.Sequential(*[ResidualBlock(16, 2**i) for i in range(10)])
        self.to_h, self.to_z = nn.Linear(16, 16), nn.Linear(16, 1)
        for layer in self.modules():  # PyTorch's defaults let the signal fade over the ten blocks
            if isinstance(layer, nn.Conv2d):
                nn.init.zeros_(layer.bias)
                nn.init.normal_(layer.weight, std=1.3 / layer.weight[0].numel() ** 0.5)
        for block in self.blocks:
            nn.init.orthogonal_(block.shortcut.weight, 0.87)
            nn.init.orthogonal_(block.mix.weight, 0.7)

    def views(self, waveform: Tensor, rate: Tensor | None = None) -> Tensor:
        """(B, S), (2B,) rates -> (2B, F, T) views stretched by WSOLA; with no rates (B, F, T)."""
        if rate is not None:
            samples = int(self.seconds * self.sample_rate)
            waveform = wsola(waveform, rate, self.sample_rate, samples)
        return self.log_mel(waveform)

    def embed(self, x: Tensor) -> Tensor:
        """(B, F, T) -> h (B, 16), behind the ELU that is part of the paper's heads."""
        norm = self.norm
        x = F.batch_norm(x[:, None], norm.running_mean, norm.running_var, training=self.training)
        x = x[:, 0, :, :, None].permute(0, 3, 1, 2)  # (B, 1, F, T) whose strides say channels last
        bias = self.conv1.bias + norm.bias * self.conv1.weight.sum((1, 2, 3))
        weight = self.conv1.weight.flatten(1) * norm.weight  # flat, or DDP warns of its strides
        x = F.conv2d(x, weight.view_as(self.conv1.weight), bias)  # (B, 16, F - 2, T - 2)
        x = F.elu(F.max_pool2d(x, (3, 1)), inplace=True)
        x = F.elu(F.max_pool2d(self.conv2(x), (3, 1)), inplace=True)
        x = self.blocks(F.elu(self.conv3(x), inplace=True))  # (B, 16, 1, T - 4)
        return F.elu(self.to_h(F.elu(x).mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).float()  # no matmul below: autocast would round z once more
        return (h * self.to_z.weight).sum(1) + self.to_z.bias

    def pseudo_tempo(self, h: Tensor) -> Tensor:
        """h (B, 16) -> |z| (B,)."""
        return self.to_z(h)[:, 0].abs().clamp(min=1e-6)

    def scores(self, h: Tensor, calibration: float) -> Tensor:
        """h (B, 16) -> (B, K) on BPM_AXIS: a bump of 4 % about calibration * |z|."""
        bpm = calibration * self.pseudo_tempo(h)[:, None]
        return torch.exp(-0.5 * (torch.log2(BPM_AXIS.to(h.device) / bpm) / 0.057) ** 2)


class Periodicity(nn.Module):
    """Ours: in place of a mean over time, periods on an axis of log tempo: a stretch is a shift.

    A small TCN makes eight activations. Their autocorrelation peaks at the periods P, 2P, 3P ...,
    their spectrum at P, P/2, P/3 ...; the product leaves P. Two convolutions along log tempo, the
    same at every tempo, give logits h; z is the mean tempo of their softmax: always positive.
    """

    def __init__(self, sample_rate: int, n_fft: int, seconds: float):
        super().__init__()
        self.sample_rate, self.seconds = sample_rate, seconds
        self.log_mel = LogMel(sample_rate, n_fft, sample_rate // 50, 40, f_min=30,  # 50 frames/s
                              f_max=min(11000, sample_rate / 2), floor=1e-3)
        self.register_buffer("axis", BPM_AXIS, persistent=False)  # on the device: no copy in a step
        self.conv = nn.Conv2d(40, 8, (1, 5), padding="same")
        self.blocks = nn.Sequential(*[ResidualBlock(8, 2**i) for i in range(4)])
        self.context = nn.Conv1d(8, 16, 9, padding="same")
        self.to_h = nn.Conv1d(16, 1, 73, padding=12)  # 145 + 24 - 72 = the 97 of H_BINS

    def views(self, waveform: Tensor, rate: Tensor | None = None) -> Tensor:
        """(B, S), (2B,) rates -> (2B, F, T): rises of the log-mel at stretched positions, randomly
        blurred (decays and a fixed blur give the rate away); with no rates of the whole clip."""
        x = self.log_mel(waveform)  # (B, F, frames)
        if rate is not None:
            x, rate = x.repeat(2, 1, 1), rate[:, None]
            steps = torch.arange(round(self.seconds * 50), device=rate.device)
            slack = x.shape[2] - 7 - rate * steps[-1]  # 3 frames at either end are for the blur
            at = 3 + torch.rand_like(rate) * slack + rate * steps  # (2B, T + 1)
            blur = torch.empty_like(rate).uniform_(math.log(0.35), math.log(2.5)).exp()  # in frames
            now, before, after = (read_at(x, (at + b)[:, None]) for b in (0, -blur, blur))
            x = 0.5 * now + 0.25 * (before + after)  # (2B, F, T + 1)
        rise = x.diff(dim=2).relu()  # (2B, F, T)
        return rise / (rise.mean((1, 2), keepdim=True) + 1e-3)

    def embed(self, x: Tensor) -> Tensor:
        """(B, F, T) -> logits h (B, 97) of 30 to 480 BPM."""
        x = self.blocks(F.elu(self.conv(x[:, :, None])))[:, :, 0].float()  # (B, 8, T)
        window = torch.hann_window(x.shape[2], periodic=False, device=x.device).sqrt()
        # 2048: views of up to 36 s and the longest lag, or it would wrap round
        fourier = torch.fft.rfft((x - x.mean(2, keepdim=True)) * window, 2048)  # (B, 8, 1025)
        power = fourier.real.square() + fourier.imag.square()
        correlation = torch.fft.irfft(power)  # (B, 8, 2048) by lag (Wiener and Khinchin)
        beats = self.axis / 60 / 50  # (K,) per frame: periods of 1 / beats frames
        periodic = read_at(correlation / (correlation[:, :, :1] + 1e-4), 1 / beats)  # (B, 8, K)
        spectral = (read_at(power, 2048 * beats) + 1e-6).sqrt()  # bin 2048 f is frequency f
        spectral = spectral / (spectral.mean(2, keepdim=True) + 1e-4)
        return self.to_h(F.elu(self.context(F.relu(periodic) * spectral)))[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        return (self.embed(x).float().softmax(1) * self.axis[H_BINS]).sum(1)  # z (B,)

    def pseudo_tempo(self, h: Tensor) -> Tensor:
        """h (B, 97) -> the likeliest tempo (B,); not z, for a mean of two octaves is neither."""
        return self.axis[H_BINS][h.argmax(1)]

    def scores(self, h: Tensor, calibration: float) -> Tensor:
        """h (B, 97) -> (B, K): at b BPM the probability of pseudo-tempo b / calibration, at
        temperature 4 (trained h is too sure of its octave to leave the prior a say)."""
        at = 24 * torch.log2(self.axis / calibration / self.axis[24])  # (K,) positions in h
        return read_at((h / 4).softmax(1), at.clamp(0, 96)) * ((at >= 0) & (at <= 96))


ENCODERS = {"tcn": TCN, "periodicity": Periodicity}  # the paper's, ours


class TempoClassifier(nn.Module):
    """An encoder under the paper's head of 300 classes: (B, F, T) -> logits (B, 300)."""

    def __init__(self, encoder: nn.Module, width: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder.embed(x))


# -----------------------------------------------------------------------------
# Loss. Letters: B pairs of views, z_i and z_j their pseudo-tempi, a_i and a_j their stretch rates.


def tempo_ratio_loss(z_i: Tensor, z_j: Tensor, rate_i: Tensor, rate_j: Tensor) -> Tensor:
    """The ratio of two pseudo-tempi must be the ratio of the stretch rates (all (B,) -> ()).

    L = mean over pairs of ( |z_i/z_j - a_i/a_j| + |z_j/z_i - a_j/a_i| ) / 2

    The scale of z cancels, too: z = 0 is no refuge. Raises ValueError unless all are (B,).
    """
    shapes = [tuple(x.shape) for x in (z_i, z_j, rate_i, rate_j)]
    if shapes != 4 * [(z_i.numel(),)]:
        raise ValueError(f"tempo_ratio_loss needs (B,) four times: got {shapes}")
    q, r = z_i / z_j, rate_i / rate_j
    return 0.5 * ((q - r).abs() + (1 / q - 1 / r).abs()).mean()


def tempo_targets(bpm: Tensor) -> Tensor:
    """(B,) BPM -> (B, 300) probabilities: a bump of 2 % about each."""
    ratio = torch.arange(CLASSES, device=bpm.device) / bpm[:, None].clamp(1, CLASSES - 1)
    return torch.softmax(-0.5 * (torch.log(ratio) / 0.02) ** 2, 1)  # class 0: exp(-inf)


# -----------------------------------------------------------------------------
# Training: one loop for all arms, on the same views; only the loss differs.


def train(arm: str, model: nn.Module, clips: list, steps: int, batch_size: int, lr: float,
          max_stretch: float, workers: int, state: dict):
    """Trains the model in place: an encoder without labels, a classifier with them."""
    labelled = isinstance(model, TempoClassifier)
    encoder = model.encoder if labelled else model
    history = deque(maxlen=20)  # of the last steps: outputs, rates, BPM
    load = partial(load_batch, clips=clips, arm=arm, max_stretch=max_stretch,
                   seconds=encoder.seconds * max_stretch + 0.2, sample_rate=encoder.sample_rate)
    monitor = None if labelled else partial(describe, history)  # of z
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-4)  # training() sets lr
    for (waveform, rate, bpm), network, losses in training(
            arm, model, optimiser, steps, batch_size, load, workers, state, monitor):
        output = network(encoder.views(waveform, rate))  # z (2B,) or logits (2B, 300)
        if labelled:
            loss = F.cross_entropy(output, tempo_targets(bpm))
        else:  # first views, second views
            loss = tempo_ratio_loss(*output.chunk(2), *rate.chunk(2))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.detach())
        history.append((output.detach(), rate, bpm))


def describe(history: deque) -> str:
    """The last steps' mean ratio loss; slope of ln(z_i/z_j) over ln(a_i/a_j), 1 where z follows the
    stretch; and, which the loss cannot show, r of ln(|z|/a) with ln BPM, 1 where z is the tempo."""
    z, rate, bpm = (torch.stack(part, 1).flatten().cpu() for part in zip(*history))  # (2B * steps,)
    z_i, z_j, a_i, a_j = *z.chunk(2), *rate.chunk(2)  # of the first views, of the second
    loss, constant = tempo_ratio_loss(z_i, z_j, a_i, a_j), tempo_ratio_loss(z_i, z_i, a_i, a_j)
    stretch = (a_i / a_j).log()
    slope = ((z_i / z_j).abs().log() * stretch).sum() / stretch.square().sum()
    text = f"ratio loss {loss:.4f} (constant z {constant:.4f}) mean |z| {z.abs().mean():.3g}"
    tracks = torch.stack([z.abs() / rate, bpm / rate])  # without the stretch, which both have
    tracks = tracks[:, ~bpm.isnan()].log()
    truth = f" r(ln z/a, ln bpm) {torch.corrcoef(tracks)[0, 1]:.2f}" if tracks.shape[1] > 2 else ""
    return f"{text} slope {slope:.2f}{truth}"


# -----------------------------------------------------------------------------
# Evaluation. Letters: n clips, N windows of all of them, D embedding size, K bins of BPM_AXIS.
# `clip` (N,) is the number of the clip that a window belongs to.


def accuracies(estimates, bpm) -> dict:
    """Accuracy 1: within 4 % of the truth, edges included; 2: or of its 2, 3, 1/2, 1/3 fold. What
    is nan on either side is not counted."""
    ratio = np.divide(estimates, bpm)
    ratio = ratio[~np.isnan(ratio)]
    hits = [np.abs(ratio / factor - 1) <= 0.04 + 1e-9 for factor in (1, 2, 3, 1 / 2, 1 / 3)]
    return {"accuracy1": float(hits[0].mean()), "accuracy2": float(np.any(hits, 0).mean()),
            "clips": len(ratio)}


def load_windows(path: str, sample_rate: int) -> Tensor:
    """A whole file in overlapping windows of 13.6 s: (windows, S); one if it is shorter."""
    waveform, size = read_audio(path, sample_rate), round(WINDOW_SECONDS * sample_rate)
    last = max(0, len(waveform) - size)  # where the last begins
    hops = max(round(2 * last / size), int(last > 0))  # of about half a window, none if last is 0
    starts = np.linspace(0, last, 1 + hops).astype(int)
    return torch.stack([waveform[s : s + size] for s in starts])


@torch.no_grad()
def embed(model: nn.Module, paths: list, workers: int) -> tuple[Tensor, Tensor]:
    """h (N, D) of the windows of all files, on the CPU, by the model in eval mode; clip (N,)."""
    model.eval()
    load = partial(load_windows, sample_rate=model.sample_rate)
    device, h, clip, batch = next(model.parameters()).device, [], [], []
    answer = lambda: model.embed(model.views(torch.stack(batch).to(device))).cpu()
    for number, windows in enumerate(in_background(load, paths, workers, "embed")):
        for window in windows:  # up to 32 of one length at a time
            if batch and (len(batch) == 32 or len(batch[0]) != len(window)):
                h.append(answer())
                batch.clear()
            batch.append(window)
            clip.append(number)
    return torch.cat([*h, answer()]), torch.tensor(clip)


def song_folds(clips: list, seed: int) -> np.ndarray:
    """(n,) fold 0 to 4 of each clip; all excerpts of a song are in one."""
    songs = sorted({clip.song for clip in clips})
    with_tempo = {clip.song for clip in clips if not math.isnan(clip.bpm)}
    np.random.default_rng(random_key("folds", seed)).shuffle(songs)
    songs.sort(key=lambda song: song not in with_tempo)  # those are dealt first
    fold = {song: k % 5 for k, song in enumerate(songs)}
    return np.array([fold[clip.song] for clip in clips])


def head_tempi(h: Tensor, clip: Tensor, bpm: np.ndarray, folds: np.ndarray, test=range(5)):
    """(n,) BPM of the clips in the folds `test`, nan elsewhere, by a head of 300 classes fitted to
    the frozen h of the other folds: the likeliest, after the mean over a clip's windows."""
    estimates, known = np.full(len(bpm), np.nan), ~np.isnan(bpm)
    for fold in test:
        fit = torch.tensor((folds != fold) & known)[clip]  # (N,)
        # with more weight decay it could not read even an h that is the tempo itself
        head = linear_probe(h[fit], tempo_targets(torch.tensor(bpm).float()[clip[fit]]), 1e-4)
        mean = torch.segment_reduce(head(h).softmax(1), "mean", lengths=clip.bincount())  # (n, 300)
        likeliest = mean[:, 1:].argmax(1).numpy() + 1
        estimates[folds == fold] = likeliest[folds == fold]
    return estimates


@torch.no_grad()
def calibrate(model: nn.Module, h: Tensor) -> float:
    """c of BPM = c * pseudo-tempo, without labels. Twelve drum loops give it up to a factor of 2^k
    (bare clicks were now and then heard at 4/3 of their tempo); k brings the median over all
    windows, h (N, D), nearest to PRIOR_BPM."""
    device, sample_rate = next(model.parameters()).device, model.sample_rate
    rng, tempi = np.random.default_rng(0), np.geomspace(60, 170, 12)
    tracks = 1e-3 * rng.standard_normal((12, 14 * sample_rate))
    for track, bpm in zip(tracks, tempi):
        kick, snare, hat = (drum(kind, rng, sample_rate) for kind in ("kick", "snare", "hat"))
        bar = [0.7 * kick, 0, 0.5 * snare, 0]  # on eighths, over a hat on each
        for eighth in range(int(WINDOW_SECONDS * bpm / 30)):
            start = int(eighth * 30 / bpm * sample_rate)
            track[start : start + len(hat)] += 0.3 * hat + bar[eighth % 4]
    tracks = torch.tensor(tracks, dtype=torch.float32, device=device)
    pseudo = model.pseudo_tempo(model.eval().embed(model.views(tracks)))  # (12,)
    octaves = np.log2(tempi / pseudo.cpu().numpy())  # log2 c by each track, up to whole octaves
    middle = np.angle(np.exp(2j * np.pi * octaves).mean()) / (2 * np.pi)  # their mean on a circle
    fraction = middle + np.median((octaves - middle + 0.5) % 1 - 0.5)  # the median about it
    median = model.pseudo_tempo(h.to(device)).median().item()
    whole = np.round(np.log2(PRIOR_BPM / median) - fraction)
    return float(2 ** (fraction + whole))


def pick_tempo(scores: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, K) scores on BPM_AXIS, multiplied by the prior -> (n,) BPM of the highest bin, refined by
    a parabola through the logarithms of three bins; (n,) second BPM: the best peak (if none, bin)
    more than 0.3 octaves away; (n,) confidence: the share of those three bins in the whole."""
    prior = torch.exp(-0.5 * (torch.log2(BPM_AXIS / PRIOR_BPM) / PRIOR_OCTAVES) ** 2)
    p = scores.double() * prior + 1e-12
    p = p / p.sum(1, keepdim=True)
    k = p[:, 1:-1].argmax(1, keepdim=True) + 1  # (n, 1)
    peak = p.gather(1, k + torch.tensor([-1, 0, 1]))  # (n, 3)
    low, mid, high = peak.log().unbind(1)
    shift = (0.5 * (low - high) / (low - 2 * mid + high).clamp(max=-1e-9)).clamp(-0.5, 0.5)
    is_peak = F.pad((p[:, 1:-1] > p[:, :-2]) & (p[:, 1:-1] > p[:, 2:]), (1, 1))  # (n, K)
    far = torch.log2(BPM_AXIS / BPM_AXIS[k]).abs() > 0.3
    second = (p * far * (is_peak + 1e-9)).argmax(1)
    bpm = BPM_AXIS[k[:, 0]] * 2 ** (shift / 24)
    return bpm.numpy(), BPM_AXIS[second].numpy(), peak.sum(1).numpy()


@torch.no_grad()
def label_free_tempi(model: nn.Module, h: Tensor, clip: Tensor, calibration: float):
    """(n,) BPM, second candidates and confidences, from the mean over each clip's windows."""
    scores = model.scores(h.to(next(model.parameters()).device), calibration).cpu()
    return pick_tempo(torch.segment_reduce(scores, "mean", lengths=clip.bincount()))


def autocorrelation_tempo(path: str, sample_rate: int, n_fft: int) -> float:
    """What must be beaten: the period at which the onset strength (rectified flux, mean over 40 mel
    bands) correlates best with itself, from 30 to 320 BPM, under the same prior; in BPM."""
    hop = sample_rate // 100
    log_mel = LogMel(sample_rate, n_fft, hop, 40, f_min=30, f_max=11000, floor=1e-3)
    x = log_mel(read_audio(path, sample_rate)[None])[0]  # (F, T)
    onsets = x.diff(dim=1).relu().mean(0)  # (T - 1,)
    power = torch.fft.rfft(onsets - onsets.mean(), 2 * len(onsets) + 1000).abs().square()
    correlation = torch.fft.irfft(power)
    correlation = correlation / correlation[0].clamp(min=1e-12)  # 0 where nothing changes
    score = read_at(correlation, 60 * sample_rate / hop / BPM_AXIS).relu()  # (K,)
    bpm, _, _ = pick_tempo((score * ((BPM_AXIS >= 30) & (BPM_AXIS <= 320)))[None])
    return float(bpm[0])


def best_constant(bpm: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """(n,) the tempo that is right most often on the other folds: chance."""
    tempi = np.arange(30, CLASSES)
    right = np.abs(tempi[:, None] / bpm - 1) <= 0.04  # (tempi, n)
    best = [tempi[right[:, folds != fold].sum(1).argmax()] for fold in range(5)]
    return np.array(best)[folds]


def compare(name: str, seed: int, clips: list, build, train_arm, kept: dict, leave_out: list,
            fine_tune: bool, workers: int) -> tuple[dict, dict]:
    """Runs all arms of an encoder and seed: {row: (n,) BPM, nan where it has none}; tempi to draw.

    An SSL encoder is trained for each fold in `leave_out` (-1: on all songs). The first is probed,
    fine-tuned, drawn and, for the first seed, kept for --predict. The random encoder's label-free
    constant comes from all songs."""
    arm, paths = f"{name} seed {seed}", [clip.path for clip in clips]
    bpm, folds = np.array([clip.bpm for clip in clips]), song_folds(clips, seed)
    known, left_out, rows = ~np.isnan(bpm), np.full(len(clips), np.nan), {}

    def with_labels(kind, encoder):
        """Trains all weights on labels of folds 1 to 4, fits a new head: (n,) BPM of fold 0."""
        torch.manual_seed(random_key("head", name, seed))  # whatever was drawn or resumed before
        classifier = TempoClassifier(encoder, h.shape[1]).to(next(encoder.parameters()).device)
        train_arm(f"{arm} {kind}", classifier, list(compress(clips, known & (folds != 0))))
        return head_tempi(*embed(encoder, paths, workers), bpm, folds, [0])

    encoder = build(name, seed)
    h, clip = embed(encoder, paths, workers)
    untrained, *_ = label_free_tempi(encoder, h, clip, calibrate(encoder, h))
    if known.any():
        rows[f"{name}, random encoder + head"] = head_tempi(h, clip, bpm, folds)
        rows[f"{name}, supervised + head, fold 0"] = with_labels("supervised", encoder)
    for fold in leave_out:
        encoder, subset = build(name, seed), f"without fold {fold}" if fold >= 0 else "all songs"
        pretext, trained_on = f"{arm} SSL {subset}", folds != fold  # (n,) of the clips
        train_arm(pretext, encoder, list(compress(clips, trained_on)))
        h, clip = embed(encoder, paths, workers)
        calibration = calibrate(encoder, h[torch.tensor(trained_on)[clip]])
        tempi, *_ = label_free_tempi(encoder, h, clip, calibration)
        left_out[~trained_on] = tempi[~trained_on]
        if fold == leave_out[0]:
            kept.setdefault(name, {"arm": pretext, "calibration": calibration})
            shown = ~trained_on if fold >= 0 else trained_on  # the songs left out, or all
            figure = {"bpm": bpm[shown], "random": untrained[shown], "trained": tempi[shown]}
            row = f"{name}, SSL encoder ({subset})"
            if known.any():
                rows[f"{row} + head"] = head_tempi(h, clip, bpm, folds)
            if known.any() and fine_tune:
                rows[f"{row}, fine-tuned + head, fold 0"] = with_labels("fine-tuned", encoder)
        if fold < 0:
            rows[f"{name}, SSL label-free, same songs"] = tempi
    what = f"label-free, songs left out ({sum(fold >= 0 for fold in leave_out)} of 5 folds)"
    rows[f"{name}, random {what}"] = np.where(np.isnan(left_out), np.nan, untrained)
    rows[f"{name}, SSL {what}"] = left_out
    return rows, figure


@torch.no_grad()
def stretch_response(model: nn.Module, clips: list) -> tuple[np.ndarray, Tensor]:
    """Nine rates, and the median over 32 excerpts of z at each over z at rate 1: (9,), (9,)."""
    rates, device = 1.25 ** np.linspace(-1, 1, 9), next(model.parameters()).device
    waveform, _, _ = load_batch(0, clips, "response", range(32), 1.25 * model.seconds + 0.2, 1.0,
                                model.sample_rate)
    torch.manual_seed(0)
    views = [model.views(waveform.to(device), torch.full((64,), a, device=device)) for a in rates]
    z = torch.stack([model.eval()(x) for x in views]).abs().log()  # (9, 64)
    z = z.unflatten(1, (2, -1)).mean(1)  # (9, 32), of two views each
    return rates, (z - z[4]).exp().median(1).values.cpu()


def draw(path: Path, name: str, figure: dict, responses: dict):
    """The PNG: an encoder's label-free BPM, against the truth if there is one, and how z follows a
    stretch."""
    from matplotlib.figure import Figure  # of itself Agg: no screen needed

    picture = Figure(figsize=(11, 5), layout="constrained")
    left, right = picture.subplots(1, 2)
    if np.isnan(figure["bpm"]).all():
        left.hist(figure["trained"], bins=np.geomspace(30, 480, 49))
        left.set(xlabel="label-free tempo (BPM)", ylabel="clips", xscale="log", title=name)
    else:
        for factor in (1, 2, 0.5, 3, 1 / 3):
            style = "k-" if factor == 1 else "k:"
            left.loglog([40, 250], [40 * factor, 250 * factor], style, lw=0.7)
        for kind, marker in (("random", "x"), ("trained", "o")):
            score = accuracies(figure[kind], figure["bpm"])
            label = f"{kind}: {score['accuracy1']:.0%} / {score['accuracy2']:.0%}"
            left.plot(figure["bpm"], figure[kind], marker, ms=5, alpha=0.7, label=label)
        left.set(xlabel="true tempo (BPM)", ylabel="label-free tempo (BPM)", ylim=(25, 400),
                 title=f"{name} without labels, Accuracy 1 / 2",
                 yticks=[30, 50, 100, 150, 200, 300])
        left.legend()
    for label, (rates, response) in responses.items():
        right.loglog(rates, response, "o-" if "trained" in label else "x:", label=label)
    right.loglog([0.8, 1.25], [0.8, 1.25], "k-", lw=0.7)
    right.set(xlabel="stretch rate a", ylabel="z(a) / z(1), median of clips", ylim=(0.6, 1.6),
              title="pseudo-tempo under stretch", xticks=[0.8, 1, 1.25],
              yticks=[0.6, 0.8, 1, 1.25, 1.5])
    right.legend()
    left.set_xticks([50, 75, 100, 150, 200])
    for axes in (left, right):
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
    picture.savefig(path, dpi=100, format="png")


# -----------------------------------------------------------------------------
# Main


def make_encoder(name: str, sample_rate: int, n_fft: int, view_seconds: float, tcn_bands: int,
                 tcn_frame_rate: int, **_) -> nn.Module:
    """The encoder of that name; takes all arguments of a run and ignores the others (_)."""
    more = (tcn_bands, tcn_frame_rate) if name == "tcn" else ()
    return ENCODERS[name](sample_rate, n_fft, view_seconds, *more)


def predict(files: list, data: Path | None, out: Path, device: torch.device, workers: int):
    """Prints the label-free tempo of files, or of all files of a folder and its accuracies."""
    state = load_checkpoint(out / "checkpoint.pt", VERSION)
    if not state["kept"]:
        die(f"{out}/checkpoint.pt: no encoder is trained yet; go on with --resume")
    name = next(name for name in reversed(ENCODERS) if name in state["kept"])  # ours, if trained
    kept, model = state["kept"][name], make_encoder(name, **state["args"]).to(device)
    model.load_state_dict(state["arms"][kept["arm"]])
    print(f"model  {kept['arm']}, label-free")
    if files:
        clips = [Clip(*item) for item in scan_audio(files, model.sample_rate, 1.0, workers).items()]
    else:
        clips = load_clips(data, model.sample_rate, 1.0, workers)
    if not clips:
        die("none of these files can be used")
    paths, bpm = [clip.path for clip in clips], [clip.bpm for clip in clips]
    answers = label_free_tempi(model, *embed(model, paths, workers), kept["calibration"])
    for path, tempo, second, confidence in zip(paths, *answers):
        print(f"{path}: {tempo:.1f} BPM, or {second:.0f} BPM; confidence {confidence:.2f}")
    if not np.isnan(bpm).all():
        score = accuracies(answers[0], bpm)
        print(f"result accuracy1 {score['accuracy1']:.3f}, accuracy2 {score['accuracy2']:.3f} of "
              f"{score['clips']} clips")


def main(args: argparse.Namespace):
    """Trains and compares every arm, or answers --predict."""
    device = start_run(args.device)
    if args.predict is not None:
        return predict(args.predict, args.data, args.out, device, args.workers)
    state = open_run(vars(args), VERSION)
    args = argparse.Namespace(**state["args"])  # on --resume those of its start
    out = Path(args.out)
    folder = Path(args.data or out / "audio")
    min_seconds = args.view_seconds * args.max_stretch + 0.2
    if not args.data and rank_and_size()[0] == 0:
        make_demo(folder, args.sample_rate, max(16, math.ceil(min_seconds)), args.workers)
    if dist.is_initialized():
        dist.barrier()  # rank 0 made the demo's audio
    clips = load_clips(folder, args.sample_rate, min_seconds, args.workers)
    songs = {clip.song for clip in clips if not math.isnan(clip.bpm)}
    labelled = len(songs) >= 10
    if not labelled:
        print(f"truth  {len(songs)} songs have a tempo, 10 are needed: training without scores")
        clips = [clip._replace(bpm=math.nan) for clip in clips]
    found = [(Path(clip.path).name, clip.seconds, clip.bpm) for clip in clips]
    save_first(state, [*found, *song_folds(clips, 0)])
    leave_out = [-1] if args.data else []  # folds of songs; -1: none
    if labelled:
        leave_out += range(args.left_out_folds)
        bpm, paths = np.array([clip.bpm for clip in clips]), [clip.path for clip in clips]
        method = partial(autocorrelation_tempo, sample_rate=args.sample_rate, n_fft=args.n_fft)
        classical = np.array(list(in_background(method, paths, args.workers, "onset")))
    arms = len(leave_out) + labelled * (1 + args.fine_tune)  # of an encoder and seed
    state["planned"] = len(args.seed) * len(args.encoders) * arms

    def build(name, seed):
        """An encoder; random, supervised and SSL arms of a seed start from the same weights."""
        torch.manual_seed(random_key("weights", name, seed))
        return make_encoder(name, **state["args"]).to(device)

    train_arm = partial(train, steps=args.steps, batch_size=args.batch_size, lr=args.lr,
                        max_stretch=args.max_stretch, workers=args.workers, state=state)
    table, figures = [], {}
    for seed in args.seed:
        tempi, rows = {}, []  # {row: (n,) BPM, nan where it has none}; the rows of the table
        if labelled:
            folds = song_folds(clips, seed)
            row = f"autocorrelation, songs left out ({args.left_out_folds} of 5 folds)"
            tempi = {"best constant, 5 folds": best_constant(bpm, folds),
                     "autocorrelation of the onset strength": classical,
                     row: np.where(np.isin(folds, leave_out), classical, np.nan)}
        for name in args.encoders:
            more, figures[seed] = compare(name, seed, clips, build, train_arm, state["kept"],
                                          leave_out, args.fine_tune, args.workers)
            tempi |= more
            save(state)
        for row, found in tempi.items():
            if labelled:
                rows.append({"row": row, **accuracies(found, bpm)})
            elif not np.isnan(found).any():  # nothing to score with: what it hears, in BPM
                percentiles = {f"p{q}": float(np.percentile(found, q)) for q in (5, 25, 50, 75, 95)}
                rows.append({"row": row, **percentiles})
        table.append(rows)
    report(table, out / "results.json", state["args"], state["began"])
    responses = {}
    for name in args.encoders:
        model = build(name, args.seed[0])
        responses[f"{name}, random"] = stretch_response(model, clips)
        model.load_state_dict(state["arms"][state["kept"][name]["arm"]])
        responses[f"{name}, trained"] = stretch_response(model, clips)
    write_whole(out / "tempo.png", lambda path: draw(  # of the last encoder
        path, args.encoders[-1], figures[args.seed[0]], responses))
    end_run(out, "tempo.png", state["began"])


if __name__ == "__main__":
    run(main, parse_args())
