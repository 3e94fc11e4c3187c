"""DOCSTRING"""

import argparse
import csv
import json
import math
import time
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import mask_along_axis_iid

from common import (LogMel, check_audio, die, find_audio, in_background, linear_probe, load_checkpoint,
                    make_folder, random_key, rank_and_size, read_audio, report, scan_audio, start_run,
                    training, write_whole)  # fmt: skip

# -----------------------------------------------------------------------------
# Hyper-parameters: `demo` applies without --data, `data` with it, `paper` holds the published values.

HYPER_PARAMETERS = {  # name: (demo, data, paper, meaning)
    "steps": (250, 400, 6460, "optimiser steps of every trained arm"),
    "batch_size": (16, 32, 32, "pairs of views in a step"),
    "lr": (3e-3, 3e-3, 1e-3, "peak learning rate of one cycle (paper: constant)"),
    "view_seconds": (8.0, 9.6, 13.6, "length of a view"),
    "max_stretch": (1.41, 1.41, 1.25, "largest stretch rate a, smallest 1/a (paper: 0.8 to 1.2)"),
    "tcn_bands": (20, 20, 81, "mel bands of the tcn's input"),
    "tcn_frame_rate": (25, 25, 100, "frames per second of the tcn's input"),
    "tcn_views": ("flux", "flux", "wsola", "wsola: log-mel of stretched audio; flux: see FluxViews"),
    "sample_rate": (22050, 22050, 44100, "Hz"),
    "n_fft": (1024, 1024, 2048, "samples"),
    "left_out_folds": (1, 2, 2, "folds of songs, of 5, that are left out of training in turn"),
}
GENERATED_CLIPS = 400  # of the demo
WINDOW_SECONDS = 13.6  # whole files are read in windows of the paper's excerpt
CLASSES = 300  # class k of the head is k BPM
PRIOR_BPM, PRIOR_OCTAVES = 120.0, 0.5  # log-normal tempo prior: stated, not fitted to any recording
BPM_AXIS = 15 * 2 ** (torch.arange(145) / 24)  # log tempo, 24 bins to the octave: 15 to 960 BPM


def parse_args(argv=None) -> argparse.Namespace:
    """The command line, completed from the column of HYPER_PARAMETERS that applies."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    # data and model
    add("--data", type=Path, metavar="DIR", help="recordings (default: makes its own)")
    add("--encoders", nargs="+", default=["tcn", "periodicity"], choices=["tcn", "periodicity"],
        help="tcn: the paper's; periodicity: ours")  # fmt: skip
    # optimisation
    add("--setting", choices=["demo", "data", "paper"], help="column of defaults (data with --data)")
    for name, (*columns, meaning) in HYPER_PARAMETERS.items():
        kind = type(columns[2])
        add("--" + name.replace("_", "-"), type=kind, help=f"{meaning} ({', '.join(map(str, columns))})")
    # run
    add("--out", type=Path, default=Path("out/tempo_equivariant"), metavar="DIR", help="results")
    add("--seed", type=int, nargs="+", default=[0], help="several give mean ± sd")
    add("--device", default="", help="cpu, cuda or mps (default: the best)")
    add("--workers", type=int, default=2, help="processes that read audio; changes no result")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, with its arguments")
    add("--predict", nargs="*", metavar="FILE", help="print tempi (of all of --data, without FILE)")
    args = parser.parse_args(argv)
    args.setting = args.setting or ("data" if args.data else "demo")
    for name, columns in HYPER_PARAMETERS.items():
        if getattr(args, name) is None:
            setattr(args, name, columns[("demo", "data", "paper").index(args.setting)])
        elif isinstance(columns[0], (int, float)) and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0: got {getattr(args, name)}")
    if not 1 < args.max_stretch <= 2 or not 1 <= args.left_out_folds <= 5 or args.workers < 0:
        parser.error("--max-stretch is above 1, at most 2; --left-out-folds 1 to 5; --workers from 0")
    if args.tcn_views not in ("flux", "wsola") or args.tcn_bands < 17 or args.predict == [] and not args.data:
        parser.error("--tcn-views is flux or wsola; --tcn-bands from 17; --predict needs FILE or --data")
    return args


# -----------------------------------------------------------------------------
# Data: the demo's own music, patterns on a grid of ticks. Letters: S samples.


def drum(kind: str, rng, sample_rate: int) -> np.ndarray:
    """A random drum sound of 0.3 s: a falling sine, noise over a tone, bright noise, or a blip."""
    t = np.arange(int(0.3 * sample_rate)) / sample_rate
    noise = rng.standard_normal(len(t))
    if kind == "kick":
        cycles = rng.uniform(40, 70) * t + rng.uniform(2, 5) * (1 - np.exp(-t / 0.03))
        return np.sin(2 * np.pi * cycles) * np.exp(-t / rng.uniform(0.04, 0.15))
    if kind == "snare":
        tone = np.sin(2 * np.pi * rng.uniform(150, 280) * t)
        return (rng.uniform(0.3, 1) * noise + tone) * np.exp(-t / rng.uniform(0.03, 0.1))
    if kind == "hat":
        return 0.5 * np.diff(noise, prepend=0) * np.exp(-t / rng.uniform(0.01, 0.08))
    return np.sin(2 * np.pi * np.exp(rng.uniform(5.5, 8)) * t) * np.exp(-t / rng.uniform(0.01, 0.05))


def notes(pitches, seconds: float, rng, sample_rate: int) -> list[np.ndarray]:
    """One sound for each chord of MIDI numbers, all by one random instrument."""
    roll_off, attack, decay = rng.uniform(0.7, 2.5), 10 ** rng.uniform(-2.5, -1.2), 10 ** rng.uniform(-1, 0.3)
    t = np.arange(int(min(seconds, 2) * sample_rate)) / sample_rate
    envelope = np.minimum(1, t / attack) * np.exp(-t / decay) * np.minimum(1, (t[-1] - t) / 0.02)
    k = np.arange(1, 8)[:, None]
    wave = (np.sin(2 * np.pi * k * np.arange(1024) / 1024 + k) / k**roll_off).sum(0)  # one cycle
    cycles = [[440 * 2 ** ((midi - 69) / 12) * t for midi in chord] for chord in pitches]
    return [envelope * sum(wave[(1024 * c).astype(int) % 1024] for c in chord) for chord in cycles]


def make_track(bpm: float, seconds: float, rng, sample_rate: int) -> np.ndarray:
    """Music at `bpm`, (S,) float32: drums, bass, chords and melody, some of them silent; straight,
    swung or ternary, in 4 or in 3; with accents, wrong and missing notes, compression and noise."""
    beats, ticks = rng.choice([4] * 8 + [3]), rng.choice([4] * 15 + [3])  # in a bar, in a beat
    bar, tick = beats * ticks, 60 / bpm / ticks  # ticks, seconds
    every = lambda step, first=0: 1.0 * (np.arange(2 * bar) % step == first)  # patterns of two bars
    maybe = lambda p: 1.0 * (rng.random(2 * bar) < p)
    pick = lambda options: options[rng.integers(len(options))]
    beat, half, offbeat, downbeat = every(ticks), every(2 * ticks), every(ticks, (ticks + 1) // 2), every(bar)
    eighths, back = beat + offbeat, beat - half if beats == 4 else beat - downbeat
    accent = 1 + rng.uniform(0.3, 1) * (0.25 * beat + 0.15 * eighths + 0.2 * downbeat - 0.6)
    parts = []  # (loudness of each tick, the sounds to choose from under each of four chords)
    has_drums = rng.random() < 0.85
    kick = np.maximum(pick([beat, beat, beat - back]), pick([0, 1]) * maybe(0.15))
    hat = accent * pick([eighths] * 8 + [every(1), offbeat])
    for p, pattern, kind in ((0.95, kick, "kick"), (0.9, back, "snare"), (0.95, hat, "hat"), (0.2, maybe(0.3), "blip")):
        if has_drums and rng.random() < p:
            parts.append((10 ** rng.uniform(-0.5, 0) * pattern, [[drum(kind, rng, sample_rate)]] * 4))
    scale = np.array(pick([[0, 2, 4, 5, 7, 9, 11], [0, 2, 3, 5, 7, 8, 10]]))  # major, minor
    root, chords = rng.integers(36, 48), rng.choice(scale, 4)
    bass = [eighths, eighths, beat, half, np.maximum(downbeat, back), np.maximum(downbeat, maybe(0.2))]
    chord = [downbeat, half, back, offbeat, eighths, eighths, beat]
    melody = [eighths * maybe(0.6), eighths, beat * maybe(0.8) + offbeat * maybe(0.4), np.maximum(beat, maybe(0.3))]
    for p, patterns, octave, degrees in ((0.8, bass if has_drums else [eighths], 0, [[0], [0], [12]]),
                                         (0.6, chord, 12, [[0, 4, 7]]), (0.6, melody, 24, rng.choice(scale, (6, 1)))):
        if not has_drums or rng.random() < p:
            pitches = [np.add(degree, root + octave + c) for c in chords for degree in degrees]
            sounds = notes(pitches, tick * ticks * rng.choice([0.5, 1, 1.5]), rng, sample_rate)
            banks = [sounds[i * len(degrees) : (i + 1) * len(degrees)] for i in range(4)]
            parts.append((10 ** rng.uniform(-0.8, -0.1) * accent * pick(patterns), banks))
    swing = rng.choice([0, 0, 0, 0, 0.15, 0.3]) * (ticks == 4)  # how late every other tick is, in ticks
    jitter, skip, hold = rng.uniform(0, 0.008), rng.uniform(0, 0.08), bar * rng.choice([1, 2])
    start = rng.integers(4 * bar) + rng.random()  # the clip is cut out of a longer piece
    waveform = np.zeros(int(sample_rate * (seconds + 4)))
    for k in range(int(start), int(start + seconds / tick) + 1):
        for pattern, banks in parts:
            if pattern[k % (2 * bar)] > 0 and rng.random() > skip:
                sound = pick(banks[k // hold % 4])
                at = max(0, int(sample_rate * ((k - start + swing * (k % 2)) * tick + jitter * rng.normal())))
                waveform[at : at + len(sound)] += pattern[k % (2 * bar)] * rng.uniform(0.7, 1) * sound
    waveform = waveform[: int(seconds * sample_rate)]
    waveform = np.tanh(10 ** rng.uniform(-1.2, -0.3) * waveform / (waveform.std() + 1e-9))
    waveform = 0.8 * waveform / (np.abs(waveform).max() + 1e-9)
    return (waveform + 10 ** rng.uniform(-4, -1.6) * rng.standard_normal(len(waveform))).astype(np.float32)


def write_track(number: int, folder: Path, sample_rate: int) -> str:
    """Writes a generated track of 16 s as a wav file, if it is not there yet: its line of tempo.csv."""
    rng, path = np.random.default_rng(number), folder / f"track{number:04d}.wav"
    bpm = float(np.clip(rng.lognormal(math.log(115), 0.28), 50, 210))
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        soundfile.write(temporary, make_track(bpm, 16.0, rng, sample_rate), sample_rate, format="WAV")
        temporary.rename(path)
    return f"{path.name},{bpm:.3f}"


# -----------------------------------------------------------------------------
# Data: recordings and their tempo, in the layouts and annotation formats of the tempo data sets.

TRUTH_KINDS = ("annotations_v2", ".bpm", ".jams", ".beats", ".mf", ".json", ".csv", ".tsv")  # best first
SUFFIXES = (".wav .au .mp3 .flac .ogg .opus .aif .aiff .clip .lofi .jams .bpm .beats").split()
PREFIXES = ("giantsteps_", "acm_mirum_", "hainsworth_", "hains", "ballroom_", "smc_")


def track_key(name: str) -> str:
    """What all names of a track share: gtzan_blues_00000.bpm and blues.00000.wav -> blues.00000"""
    key = name.replace("\\", "/").split("/")[-1].lower()
    while key.endswith(tuple(SUFFIXES)):
        key = key.rpartition(".")[0]
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key.removeprefix("gtzan_").replace("_", ".") if key.startswith("gtzan_") else key


def beat_tempo(times: list) -> float:
    """Beat times in seconds -> BPM, from the median interval."""
    return 60 / float(np.median(np.diff(np.array(times, float))))


def to_bpm(value) -> float:
    """A number above 0, or nan for whatever else an annotation holds."""
    try:
        return float(value) if 0 < float(value) < math.inf else math.nan
    except (TypeError, ValueError):
        return math.nan


def read_truth(path: Path) -> list[tuple]:
    """(track name, BPM, song or '') of each track in an annotation file; [] if it is something else."""
    text, kind = path.read_text(encoding="utf-8-sig", errors="replace"), path.suffix.lower()
    if kind == ".bpm":
        return [(path.name, text.split()[0] if text.split() else "", "")]
    if kind == ".beats":  # lines of time<TAB>position
        return [(path.name, beat_tempo([line.split()[0] for line in text.splitlines() if line]), "")]
    if kind == ".jams":
        for part in json.loads(text)["annotations"]:
            if part["namespace"] == "tempo" and part["data"]:
                return [(path.name, part["data"][0]["value"], "")]
            if part.get("sandbox", {}).get("annotation_type") == "beat":
                return [(path.name, beat_tempo([event["time"] for event in part["data"]]), "")]
        return []
    if kind == ".json":  # the index of the official code
        return [(row["audio_filepath"], row["tempo"], "") for row in json.loads(text) if "tempo" in row]
    text = "file\tbpm\n" * (kind == ".mf") + text  # Marsyas' tables have no heading
    rows = list(csv.DictReader(text.splitlines(), delimiter="," if kind == ".csv" else "\t"))
    rows = rows if rows and {"file", "bpm"} <= set(rows[0]) else []
    return [(row["file"] or "", row["bpm"], row.get("song") or row.get("origin") or "") for row in rows]


def find_truth(folder: Path, paths: list[Path]) -> dict[Path, tuple[float, str]]:
    """{path: (BPM, song)} from the best kind of annotation below the folder that fits its audio."""
    named = {}  # what an annotation may call a file -> the files that this can be
    for path in paths:
        for name in {track_key(path.name), path.relative_to(folder).as_posix()}:
            named.setdefault(name, []).append(path)
    files = [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in TRUTH_KINDS and f.name[0] != "."]
    for kind in TRUTH_KINDS:
        truth, strangers, numberless = {}, 0, 0
        for file in files:
            if kind not in (file.suffix.lower(), file.parent.parent.name):
                continue
            try:
                rows = [(name, to_bpm(value), song) for name, value, song in read_truth(file)]
            except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
                print(f"skip   {file}: not an annotation ({type(error).__name__})")
                continue
            for name, bpm, song in rows:
                meant = named.get(name, named.get(track_key(name), []))
                numberless += math.isnan(bpm)
                strangers += len(meant) != 1  # no such file, or several of that name
                if len(meant) == 1 and not math.isnan(bpm):
                    truth[meant[0]] = (bpm, song or track_key(meant[0].name))
        if truth:
            print(f"truth  {kind}: {len(truth)} of {len(paths)} files have a tempo; {strangers} annotations"
                  f" fit no file, {numberless} hold no number")  # fmt: skip
            return truth
    print(f"truth  none found: training without scores. For GTZAN put the tempo/ folder of github.com/"
          f"TempoBeatDownbeat/gtzan_tempo_beat into {folder}, or write {folder}/tempo.csv: file,bpm")  # fmt: skip
    return {}


def load_clips(folder: Path, sample_rate: int, min_seconds: float, workers: int) -> list[tuple]:
    """All that can be used below a folder: [(path, seconds, BPM or nan, song)]; dies if nothing can."""
    if not folder.is_dir():
        die(f"--data {folder}: no such folder; expected audio at any depth, e.g. genres/blues/blues.00000.wav")
    paths = find_audio(folder)
    seconds = scan_audio(paths, sample_rate, min_seconds, workers)
    if not seconds:
        die(f"--data {folder}: none of its {len(paths)} audio files can be used (wav au mp3 flac ogg opus aiff)")
    truth = find_truth(folder, list(seconds))
    songs = {song for _, song in truth.values()}
    if 0 < len(songs) < 10:
        print(f"truth  {len(songs)} songs are too few to score on: training without scores")
        truth = {}
    return [(str(path), s, *truth.get(path, (math.nan, str(path)))) for path, s in seconds.items()]


def load_batch(step: int, clips: list, arm: str, items: range, seconds: float, max_stretch: float, sample_rate: int):
    """Batch `step` of an arm; each item draws from (arm, step, item) alone, whoever reads it.

    Returns:
        (B, S) excerpts; (2B,) stretch rates, log-uniform, of the first views then the second;
        (2B,) BPM of these views, nan where unknown.
    """
    waveforms, rates, tempi, samples = [], [], [], round(seconds * sample_rate)
    for item in items:
        rng = np.random.default_rng(random_key(arm, step, item))
        path, length, bpm, _ = clips[rng.integers(len(clips))]
        waveform = read_audio(path, sample_rate, rng.uniform(0, max(0, length - seconds)), seconds)[:samples]
        waveforms.append(F.pad(waveform, (0, samples - len(waveform))))  # rounding: a few samples at most
        rates.append(torch.tensor(np.exp(rng.uniform(-1, 1, 2) * math.log(max_stretch))).float())
        tempi.append(bpm * rates[-1])
    return torch.stack(waveforms), torch.stack(rates, 1).flatten(), torch.stack(tempi, 1).flatten()


# -----------------------------------------------------------------------------
# Views: stretch without a leak. More is read than a view needs, and cropped; nothing is padded.
# Letters: B clips, S samples, F mel bands, T frames, a stretch rate (above 1 is faster).


def wsola(waveform: Tensor, rate: Tensor, sample_rate: int, samples: int) -> Tensor:
    """Waveform-similarity overlap-add: each waveform at its own tempo, pitch kept, all clips at once.

    Verhelst & Roelands 1993 with the constants of SoX's `tempo -m`: segments of 82 ms overlap by a
    seventh; each is taken, within a sixth of a segment of where the rate wants it, there where it
    continues the last one best (least squares, searched at about 5.5 kHz).

    Args:
        waveform: (B, S), S >= samples * rate + 0.1 s. rate: (B,). samples: length wanted.
    Returns:
        (B, samples); at rate 1 the waveform itself, later by the overlap.
    """
    coarse = max(1, round(sample_rate / 5500))  # the search's step in samples
    segment, steps = round(0.082 * sample_rate / coarse), torch.arange  # lengths below in coarse steps
    overlap, search = segment // 7, segment // 6
    hop, count = segment - overlap, math.ceil(samples / coarse / (segment - overlap)) + 1
    low = F.avg_pool1d(waveform[:, None], coarse)[:, 0]  # (B, S / coarse)
    wanted = (rate[:, None] * hop * steps(count, device=rate.device)).long()  # (B, count)
    wanted = wanted.clamp(max=low.shape[1] - segment - search)
    starts, span = [wanted[:, 0]], steps(search + overlap - 1, device=rate.device)
    for k in range(1, count):  # over segments: each continues the one before
        last = low.gather(1, starts[-1][:, None] + hop + span[:overlap])  # (B, overlap), to continue
        near = low.gather(1, wanted[:, k, None] + span).unfold(1, overlap, 1)  # (B, search, overlap)
        distance = near.square().sum(2) - 2 * torch.bmm(near, last[:, :, None])[:, :, 0]
        starts.append(wanted[:, k] + distance.argmin(1))
    starts, segment, overlap, hop = torch.stack(starts, 1) * coarse, segment * coarse, overlap * coarse, hop * coarse
    pieces = waveform.unfold(1, segment, 1)[steps(len(rate), device=rate.device)[:, None], starts]
    fade = (steps(overlap, device=rate.device) + 0.5) / overlap
    window = torch.cat([fade, fade.new_ones(hop - overlap), 1 - fade])
    pieces = (pieces * window).transpose(1, 2)  # (B, segment, count)
    total = F.fold(pieces, (1, hop * (count - 1) + segment), (1, segment), stride=(1, hop))
    return total[:, 0, 0, overlap : overlap + samples]


def read_at(values: Tensor, at: Tensor) -> Tensor:
    """values (..., N) at fractional positions (..., T) on the last axis, interpolated linearly."""
    below = at.long().clamp(0, values.shape[-1] - 2)
    return torch.lerp(values.gather(-1, below), values.gather(-1, below + 1), (at - below).to(values.dtype))


class WsolaViews(nn.Module):
    """The paper's input: log-mel of audio that WSOLA stretched, so that onsets keep their length."""

    def __init__(self, sample_rate: int, n_fft: int, bands: int, frame_rate: int):
        super().__init__()
        self.sample_rate = sample_rate
        self.log_mel = LogMel(sample_rate, n_fft, sample_rate // frame_rate, bands, f_min=30,
                              f_max=min(17000, sample_rate / 2))  # fmt: skip

    @torch.no_grad()
    def forward(self, waveform: Tensor, rate: Tensor | None = None, seconds=0.0) -> Tensor:
        """(B, S), (2B,) -> (2B, F, T), two views of `seconds`; without rates (B, F, T), the clip as it is."""
        if rate is not None:
            waveform = wsola(waveform.repeat(2, 1), rate, self.sample_rate, int(seconds * self.sample_rate))
        return self.log_mel(waveform)


class FluxViews(nn.Module):
    """Ours: frames of a log-mel read at stretched positions, blurred in time by a random amount, and
    only their rises kept. On plain log-mel a network reads the rate off decays and off the blur of
    the interpolation, and solves the pretext task without a notion of tempo."""

    def __init__(self, sample_rate: int, n_fft: int, bands: int, frame_rate: int, mask=0.0):
        super().__init__()
        self.frame_rate, self.mask = frame_rate, mask
        self.log_mel = LogMel(sample_rate, n_fft, sample_rate // frame_rate, bands, f_min=30,
                              f_max=min(11000, sample_rate / 2), floor=1e-3)  # fmt: skip

    @torch.no_grad()
    def forward(self, waveform: Tensor, rate: Tensor | None = None, seconds=0.0) -> Tensor:
        """(B, S), (2B,) -> (2B, F, T), two views of `seconds`; without rates (B, F, T), the clip as it is."""
        view = frames = self.log_mel(waveform)  # (B, F, T of the clip)
        if rate is not None:
            T, frames, rate = round(seconds * self.frame_rate), frames.repeat(2, 1, 1), rate[:, None]
            slack = frames.shape[2] - 4 - rate * (T - 1)  # views start anywhere: alignment tells nothing
            at = 1 + torch.rand_like(rate) * slack.clamp(min=0) + rate * torch.arange(T, device=rate.device)
            blur = torch.exp(torch.empty_like(rate).uniform_(math.log(0.35), math.log(2.5)))  # frames
            taps = [read_at(frames, (at + b)[:, None].expand(-1, frames.shape[1], -1)) for b in (0, -blur, blur)]
            view = 0.5 * taps[0] + 0.25 * (taps[1] + taps[2])  # (2B, F, T)
        rise = F.relu(view[:, :, 1:] - view[:, :, :-1])  # (2B, F, T - 1)
        if rate is not None and self.mask:  # a run of bands falls silent, another one in each view
            widest = round(self.mask * rise.shape[1])
            rise = mask_along_axis_iid(rise[:, None], widest, 0.0, 2)[:, 0]
        return rise / (rise.mean((1, 2), keepdim=True) + 1e-3)


# -----------------------------------------------------------------------------
# Model. Letters: B views, F mel bands, T frames, C channels, K = 145 bins of BPM_AXIS.


class ResidualBlock(nn.Module):
    """(B, C, 1, T) -> same: the paper's dilated block, with a learned shortcut and no normalisation."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.dilated = nn.Conv2d(channels, channels, (1, 5), padding=(0, 2 * dilation), dilation=(1, dilation))
        self.mix, self.shortcut = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.mix(F.elu(self.dilated(x), inplace=True))


class TCN(nn.Module):
    """The paper's network, 23 235 parameters at F = 81: (B, F, T) -> z (B,), of any sign and scale.

    Same values as its layers in the published order, three times as fast: the maximum before the ELU
    (which rises), the gain of the input's batch norm inside the first convolution (so that no
    gradient of the input is needed), channels-last memory, both views in one pass.
    """

    tie = 0.0  # the paper's loss alone

    def __init__(self, views: nn.Module, bands: int, channels=16):
        super().__init__()
        self.views, self.norm = views, nn.BatchNorm2d(1)
        self.conv1, self.conv2 = nn.Conv2d(1, channels, 3), nn.Conv2d(channels, channels, 3)
        self.conv3 = nn.Conv2d(channels, channels, (((bands - 2) // 3 - 2) // 3, 1))  # over all bands left
        self.blocks = nn.Sequential(*[ResidualBlock(channels, 2**i) for i in range(10)])
        self.to_h, self.to_z = nn.Linear(channels, 16), nn.Linear(16, 1)
        for layer in self.modules():  # PyTorch's defaults let the signal fade over the ten blocks
            if isinstance(layer, nn.Conv2d):
                nn.init.zeros_(layer.bias)
                nn.init.normal_(layer.weight, std=1.3 / layer.weight[0].numel() ** 0.5)
        for block in self.blocks:
            nn.init.orthogonal_(block.shortcut.weight, 0.87)
            nn.init.orthogonal_(block.mix.weight, 0.7)

    def embed(self, x: Tensor) -> Tensor:
        """(B, F, T) -> h (B, 16), behind the ELU that is part of the paper's heads."""
        x = F.batch_norm(x[:, None], self.norm.running_mean, self.norm.running_var, training=self.training)
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # (B, 1, F, T), channels last
        offset = self.norm.bias * self.conv1.weight.sum((1, 2, 3))
        x = F.conv2d(x, self.conv1.weight * self.norm.weight, self.conv1.bias + offset)
        x = F.elu(F.max_pool2d(x, (3, 1)), inplace=True)  # (B, 16, (F - 2) // 3, T - 2)
        x = F.elu(F.max_pool2d(self.conv2(x), (3, 1)), inplace=True)
        x = self.blocks(F.elu(self.conv3(x), inplace=True))  # (B, 16, 1, T - 4)
        return F.elu(self.to_h(F.elu(x).mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        return self.to_z(self.embed(x))[:, 0]

    def log_tempo(self, h: Tensor, calibration: float) -> tuple[Tensor, Tensor]:
        """h (B, 16) -> (B,) tempo |z| up to a constant; (B, K) probabilities, a bump of 4 % about
        calibration * |z| on BPM_AXIS."""
        z = self.to_z(h)[:, 0].abs().clamp(min=1e-6)
        distance = torch.log2(BPM_AXIS.to(z.device) / (calibration * z[:, None]))
        return z, torch.softmax(-0.5 * (distance / 0.057) ** 2, 1)


class Periodicity(nn.Module):
    """Ours: periods on an axis of log tempo, where a stretch is a shift, in place of a mean over time.

    A small TCN makes eight activations. Their autocorrelation answers at the periods P, 2P, 3P ...,
    their spectrum at P, P/2, P/3 ...; the product leaves P. Two convolutions along log tempo, alike
    for all tempi, give logits h; z is the mean tempo of their softmax, positive: no pole in z_i/z_j.
    """

    tie = 0.2  # weight of `spread`: a weak bond between tracks, which the ratio alone leaves free

    def __init__(self, views: nn.Module, bands: int, channels=8):
        super().__init__()
        self.views = views
        self.conv = nn.Conv2d(bands, channels, (1, 5), padding=(0, 2))
        self.blocks = nn.Sequential(*[ResidualBlock(channels, 2**i) for i in range(4)])
        self.context, self.to_h = nn.Conv1d(channels, 16, 9, padding=4), nn.Conv1d(16, 1, 73, padding=12)
        with torch.no_grad():  # starts near the identity, so that a bin stands for its own tempo
            self.to_h.weight.mul_(0.3)[:, :, 35:38] += torch.tensor([0.3, 0.6, 0.3])

    def embed(self, x: Tensor) -> Tensor:
        """(B, F, T) -> logits h (B, 97) of 30 to 480 BPM."""
        x = self.blocks(F.elu(self.conv(x[:, :, None])))[:, :, 0].float()  # (B, 8, T)
        window = torch.hann_window(x.shape[2], periodic=False, device=x.device).sqrt()
        power = torch.fft.rfft((x - x.mean(2, keepdim=True)) * window, 2048)  # (B, 8, 1025)
        power = torch.view_as_real(power).square().sum(-1)
        axis = BPM_AXIS.to(x.device).expand(*x.shape[:2], -1) / 60 / self.views.frame_rate  # 1 / frames
        correlation = torch.fft.irfft(power)  # (B, 8, 2048), Wiener and Khinchin
        correlation = read_at(correlation / (correlation[:, :, :1] + 1e-4), 1 / axis)  # (B, 8, 145)
        spectrum = (read_at(power, 2048 * axis) + 1e-6).sqrt()
        spectrum = spectrum / (spectrum.mean(2, keepdim=True) + 1e-4)
        return self.to_h(F.elu(self.context(F.relu(correlation) * spectrum)))[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return h.softmax(1) @ BPM_AXIS[24:121].to(h.device)  # z (B,)

    def log_tempo(self, h: Tensor, calibration: float) -> tuple[Tensor, Tensor]:
        """h (B, 97) -> (B,) likeliest tempo up to a constant; (B, K) probabilities on BPM_AXIS, times
        calibration: the axis moved by that many bins."""
        axis = BPM_AXIS.to(h.device)
        at = 24 * torch.log2(axis / calibration / axis[24])  # (K,) positions in h
        inside = (at >= 0) & (at <= 96)
        p = read_at(h.softmax(1), at.clamp(0, 96).expand(len(h), -1)) * inside
        return axis[24:121][h.argmax(1)], p / p.sum(1, keepdim=True).clamp(min=1e-9)


class TempoClassifier(nn.Module):
    """An encoder under the paper's head of 300 classes: (B, F, T) -> logits (B, 300)."""

    def __init__(self, encoder: nn.Module, head: nn.Linear):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder.embed(x))


# -----------------------------------------------------------------------------
# Loss. Letters: B pairs of views, z_i and z_j their pseudo-tempi, a_i and a_j their stretch rates.


def tempo_ratio_loss(z_i: Tensor, z_j: Tensor, rate_i: Tensor, rate_j: Tensor) -> Tensor:
    """The ratio of two pseudo-tempi must be the ratio of the stretch rates (all (B,) -> ()).

    L = mean over pairs of ( |z_i/z_j - a_i/a_j| + |z_j/z_i - a_j/a_i| ) / 2

    The clip's unknown tempo cancels, and so does the scale of z: no negatives, and z = 0 is no refuge.
    A constant z stays at the value of z_i/z_j = 1. Raises ValueError unless all are (B,).
    """
    if not z_i.shape == z_j.shape == rate_i.shape == rate_j.shape == (len(z_i),):
        raise ValueError(f"tempo_ratio_loss needs (B,) four times: got {z_i.shape}, {rate_i.shape}")
    q, r = z_i / z_j, rate_i / rate_j
    return 0.5 * ((q - r).abs() + (1 / q - 1 / r).abs()).mean()


def spread(z: Tensor, rate: Tensor) -> Tensor:
    """Ours, what the ratio leaves free: mean distance of ln(z/a) from its median over the batch ((B,) -> ())."""
    v = z.abs().log() - rate.log()
    return (v - v.median().detach()).abs().mean()


def pretext_loss(z: Tensor, rate: Tensor, bpm: Tensor, tie: float) -> Tensor:
    """(2B,) each, first views first; the BPM are not used."""
    loss = tempo_ratio_loss(*z.chunk(2), *rate.chunk(2))
    return loss + tie * spread(z, rate) if tie else loss


def tempo_targets(bpm: Tensor) -> Tensor:
    """(B,) BPM -> (B, 300) probabilities: a bump of 2 % about each."""
    distance = torch.log(torch.arange(1, CLASSES, device=bpm.device) / bpm[:, None].clamp(1, CLASSES - 1))
    return F.pad(torch.softmax(-0.5 * (distance / 0.02) ** 2, 1), (1, 0))


def supervised_loss(logits: Tensor, rate: Tensor, bpm: Tensor) -> Tensor:
    """(2B, 300) logits, (2B,) BPM of the views; the rates are in these already."""
    return F.cross_entropy(logits, tempo_targets(bpm))


# -----------------------------------------------------------------------------
# Training: one loop for all arms, on the same views; only the loss differs.


def train(arm: str, model: nn.Module, views: nn.Module, loss_of, clips: list, steps: int, batch_size: int,
          lr: float, view_seconds: float, max_stretch: float, sample_rate: int, workers: int, state: dict,
          checkpoint: Path):  # fmt: skip
    """Trains the model in place: its output, z (2B,) or logits (2B, 300), goes to loss_of(out, rate, bpm)."""
    rank, size = rank_and_size()
    items = range(rank * batch_size // size, (rank + 1) * batch_size // size)
    load = partial(load_batch, clips=clips, arm=arm, items=items, max_stretch=max_stretch,
                   seconds=view_seconds * max_stretch + 0.2, sample_rate=sample_rate)  # fmt: skip
    device, history = next(model.parameters()).device, deque(maxlen=20)
    for batch, network, update in training(arm, model, lr, steps, batch_size, load, workers, state, checkpoint,
                                           lambda: describe(history)):  # fmt: skip
        waveform, rate, bpm = (tensor.to(device) for tensor in batch)
        out = network(views(waveform, rate, view_seconds))
        loss = loss_of(out, rate, bpm)
        update(loss)
        history.append((loss.detach(), out.detach(), rate, bpm))


def describe(history: deque) -> str:
    """The last steps' loss and, for z, what the loss cannot show: reading off the stretch lowers it too."""
    loss, out, rate, bpm = (torch.stack(column).double() for column in zip(*history))  # (20,), (20, 2B) ...
    if out.ndim == 3:
        return f"loss {loss.mean():.4f}"
    (z_i, z_j), (a_i, a_j) = out.abs().chunk(2, 1), rate.chunk(2, 1)  # (20, B)
    constant = tempo_ratio_loss(a_i.flatten() ** 0, a_i.flatten() ** 0, a_i.flatten(), a_j.flatten())
    slope = ((z_i / z_j).log() * (a_i / a_j).log()).sum() / (a_i / a_j).log().square().sum()
    r = torch.corrcoef(torch.stack([out.abs().log().flatten(), bpm.log().flatten()]))[0, 1]
    return (f"loss {loss.mean():.4f} (constant z {constant:.4f}) mean |z| {out.abs().mean():.3g} slope {slope:.2f}"
            + ("" if r.isnan() else f" r(ln z, ln bpm) {r:.2f}"))  # fmt: skip


# -----------------------------------------------------------------------------
# Evaluation. Letters: n windows of a file, S samples, D embedding size.


def accuracies(estimates, bpm) -> dict:
    """Accuracy 1: within 4 % of the truth, edges included; Accuracy 2: or of its 2, 3, 1/2, 1/3 fold."""
    ratio = np.asarray(estimates, float) / np.asarray(bpm, float)
    hits = [np.abs(ratio / fold - 1) <= 0.04 + 1e-9 for fold in (1, 2, 3, 1 / 2, 1 / 3)]
    return {"accuracy1": float(hits[0].mean()), "accuracy2": float(np.any(hits, 0).mean()), "clips": len(ratio)}


def load_windows(path: str, sample_rate: int) -> Tensor:
    """A whole file as (n, S) windows of 13.6 s, about half overlapping; a shorter file is one window."""
    waveform, size = read_audio(path, sample_rate), round(WINDOW_SECONDS * sample_rate)
    spare = max(0, len(waveform) - size)
    starts = np.linspace(0, spare, round(2 * spare / size) + 1).astype(int)
    return torch.stack([waveform[s : s + size] for s in starts])


@torch.no_grad()
def embed(model: nn.Module, clips: list, sample_rate: int, workers: int) -> list[Tensor]:
    """h (n, D) of each clip, on the CPU, by the model in eval mode."""
    model.eval()
    device = next(model.parameters()).device
    files = in_background(partial(load_windows, sample_rate=sample_rate), [clip[0] for clip in clips], workers)
    return [torch.cat([model.embed(model.views(part.to(device))).cpu() for part in windows.split(32)])
            for windows in files]  # fmt: skip


def song_folds(clips: list, seed: int) -> np.ndarray:
    """(clips,) fold 0 to 4; all excerpts of a song share one, and folds are about equally large."""
    songs, sizes = np.unique([clip[3] for clip in clips], return_counts=True)
    order = np.random.default_rng(random_key("folds", seed)).permutation(len(songs))
    fold_of, filled = {}, np.zeros(5)
    for i in order[np.argsort(-sizes[order], kind="stable")]:
        fold_of[songs[i]] = int(filled.argmin())
        filled[fold_of[songs[i]]] += sizes[i]
    return np.array([fold_of[clip[3]] for clip in clips])


def fit_head(encoder: nn.Module, embeddings: list[Tensor], bpm: np.ndarray, end_to_end=None) -> TempoClassifier:
    """The head of 300 classes: on frozen h (n, D) of clips with these BPM, or, given the function
    end_to_end(classifier), trained by it together with the encoder."""
    if end_to_end is None:
        targets = tempo_targets(torch.tensor(np.repeat(bpm, [len(h) for h in embeddings])).float())
        return TempoClassifier(encoder, linear_probe(torch.cat(embeddings), targets))
    classifier = TempoClassifier(encoder, nn.Linear(embeddings[0].shape[1], CLASSES)).to(next(encoder.parameters()).device)
    end_to_end(classifier)
    return classifier


@torch.no_grad()
def head_tempo(classifier: TempoClassifier, embeddings: list[Tensor]) -> np.ndarray:
    """(clips,) BPM: the likeliest class, after the mean over a clip's windows."""
    head = classifier.head.cpu()
    return np.array([head(h).softmax(1).mean(0)[1:].argmax().item() + 1 for h in embeddings])


@torch.no_grad()
def calibrate(model: nn.Module, embeddings: list[Tensor], sample_rate: int) -> float:
    """The constant c of BPM = c * pseudo-tempo, without labels: six generated click tracks give it up
    to its octave; that is chosen so that the corpus' median tempo comes nearest PRIOR_BPM."""
    rng, tempi, S = np.random.default_rng(0), np.array([60, 80, 100, 120, 140, 160]), 14 * sample_rate
    device, clicks = next(model.parameters()).device, 1e-3 * rng.standard_normal((6, S))
    for waveform, bpm in zip(clicks, tempi):
        click = drum("blip", rng, sample_rate)
        for at in np.arange(0, S - len(click), 60 / bpm * sample_rate).astype(int):
            waveform[at : at + len(click)] += 0.7 * click
    h = model.eval().embed(model.views(torch.tensor(clicks, device=device).float()))
    octaves = np.log2(tempi / model.log_tempo(h, 1.0)[0].cpu().numpy())
    middle = np.angle(np.exp(2j * np.pi * octaves).mean()) / (2 * np.pi)  # fractions lie on a circle
    octave = middle + np.median((octaves - middle + 0.5) % 1 - 0.5)
    corpus = np.median([model.log_tempo(h.to(device), 1.0)[0].median().item() for h in embeddings])
    return float(2 ** (octave + np.round(np.log2(PRIOR_BPM / corpus) - octave)))


def pick_tempo(score: Tensor) -> tuple[float, float, float]:
    """(K,) scores on BPM_AXIS -> BPM, second candidate, share of the first: times the prior, arg max,
    refined by a parabola through the logarithms; the second is at least 8 % away."""
    p = score.double() * torch.exp(-0.5 * (torch.log2(BPM_AXIS / PRIOR_BPM) / PRIOR_OCTAVES) ** 2) + 1e-12
    p = p / p.sum()
    k = int(p[1:-1].argmax()) + 1
    low, mid, high = p[k - 1 : k + 2].log().tolist()
    shift = max(-0.5, min(0.5, 0.5 * (low - high) / min(low - 2 * mid + high, -1e-9)))
    second = (p * (torch.log2(BPM_AXIS / BPM_AXIS[k]).abs() > 0.12)).argmax()
    return BPM_AXIS[k].item() * 2 ** (shift / 24), BPM_AXIS[second].item(), p[k - 1 : k + 2].sum().item()


@torch.no_grad()
def label_free_tempo(model: nn.Module, h: Tensor, calibration: float) -> tuple[float, float, float]:
    """h (n, D) of a file -> BPM, second candidate, confidence; the mean over its windows is read."""
    return pick_tempo(model.log_tempo(h.to(next(model.parameters()).device), calibration)[1].mean(0).cpu())


def autocorrelation_tempo(path: str, sample_rate: int, n_fft: int) -> float:
    """What must be beaten: the period at which the onset strength (rectified flux, mean over 40 mel
    bands) correlates best with itself, under the same prior; in BPM."""
    hop = sample_rate // 100
    frames = LogMel(sample_rate, n_fft, hop, 40, f_min=30, f_max=11000, floor=1e-3)(read_audio(path, sample_rate)[None])
    onsets = F.relu(frames[0, :, 1:] - frames[0, :, :-1]).mean(0)  # (T,)
    power = torch.fft.rfft(onsets - onsets.mean(), 2 * len(onsets) + 1000).abs().square()
    correlation = torch.fft.irfft(power)
    score = read_at(correlation / correlation[0], 60 * sample_rate / hop / BPM_AXIS).relu()
    return pick_tempo(score * ((BPM_AXIS >= 30) & (BPM_AXIS <= 320)))[0]


def best_constant(bpm: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """(clips,) the tempo that is right most often on the other folds: chance."""
    right = {fold: [accuracies(np.full((folds != fold).sum(), c), bpm[folds != fold])["accuracy1"]
                    for c in range(30, CLASSES)] for fold in range(5)}  # fmt: skip
    return np.array([30 + int(np.argmax(right[fold])) for fold in folds])


def compare(name: str, seed: int, clips: list, build, train_arm, state: dict, sample_rate: int, workers: int,
            same_clips: bool, left_out_folds: int) -> list[dict]:  # fmt: skip
    """All rows of an encoder and seed. The SSL encoder that is probed, fine-tuned and kept is trained on
    all clips (same_clips) or, in the demo, on the songs outside fold 0; the row on left-out songs
    trains one more for each fold that it scores."""
    arm, rows, folds = f"{name} seed {seed}", [], song_folds(clips, seed)
    bpm = np.array([clip[2] for clip in clips])
    known, test = ~np.isnan(bpm), ~np.isnan(bpm) & (folds == 0)
    chosen = lambda items, mask: [item for item, take in zip(items, mask) if take]

    def add(row, estimates, mask):
        if mask.any():
            rows.append({"row": f"{name}, {row}", **accuracies(estimates[mask], bpm[mask])})

    def add_head(row, encoder, embeddings):  # frozen encoder, 5 folds of songs
        estimates = np.zeros(len(clips))
        for fold in range(5 * known.any()):
            head = fit_head(encoder, chosen(embeddings, known & (folds != fold)), bpm[known & (folds != fold)])
            estimates[folds == fold] = head_tempo(head, chosen(embeddings, folds == fold))
        add(row, estimates, known)

    def add_end_to_end(row, encoder, embeddings):  # fold 0 left out
        if known.any():
            estimates, fit = np.zeros(len(clips)), known & ~test
            head = fit_head(encoder, embeddings, bpm[fit], lambda classifier: train_arm(
                f"{arm} {row}", classifier, encoder.views, supervised_loss, chosen(clips, fit)))  # fmt: skip
            estimates[test] = head_tempo(head, embed(encoder, chosen(clips, test), sample_rate, workers))
            add(f"{row}, fold 0", estimates, test)

    def free(encoder, embeddings, calibration):
        return np.array([label_free_tempo(encoder, h, calibration)[0] for h in embeddings])

    encoder = build(name, seed)
    embeddings = embed(encoder, clips, sample_rate, workers)
    add_head("random encoder + head", encoder, embeddings)
    figure = {"bpm": bpm[test].tolist(), "random": free(
        encoder, chosen(embeddings, test), calibrate(encoder, embeddings, sample_rate)).tolist()}  # fmt: skip
    add_end_to_end("supervised", encoder, embeddings)
    left_out, scored = np.zeros(len(clips)), np.zeros(len(clips), bool)
    kept = -1 if same_clips else 0  # the fold without which the kept encoder is trained
    for fold in [-1] * same_clips + list(range(left_out_folds * known.any())):
        encoder, subset = build(name, seed), "all songs" if fold < 0 else f"without fold {fold}"
        train_arm(f"{arm} SSL {subset}", encoder, encoder.views, partial(pretext_loss, tie=encoder.tie),
                  chosen(clips, folds != fold))  # fmt: skip
        embeddings = embed(encoder, clips, sample_rate, workers)
        calibration = calibrate(encoder, chosen(embeddings, folds != fold), sample_rate)
        estimates = free(encoder, embeddings, calibration)
        left_out[folds == fold], scored = estimates[folds == fold], scored | (known & (folds == fold))
        if fold == kept:
            figure |= {"trained": estimates[test].tolist(), "all": estimates.tolist()}
            state["kept"].setdefault(name, {"arm": f"{arm} SSL {subset}", "calibration": calibration, "figure": figure})
            add_head("SSL encoder + head", encoder, embeddings)
            if same_clips:
                add("SSL label-free, same songs", estimates, known)
    add(f"SSL label-free, songs left out ({left_out_folds} of 5 folds)", left_out, scored)
    return rows


def draw(path: Path, figures: dict, stretched: dict):
    """The PNG: label-free BPM against the truth (or their histogram), and how z follows a stretch.

    figures: of one encoder, {"bpm", "random", "trained", "all"}; stretched: {label: (rates, z(a)/z(1))}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    if figures["bpm"]:
        for fold in (1, 2, 0.5, 3, 1 / 3):
            left.plot([40, 250], [40 * fold, 250 * fold], "k-" if fold == 1 else "k:", lw=0.7)
        for kind, marker in (("random", "x"), ("trained", "o")):
            score = accuracies(figures[kind], figures["bpm"])
            left.plot(figures["bpm"], figures[kind], marker, ms=5, alpha=0.7,
                      label=f"{kind}: {score['accuracy1']:.0%} / {score['accuracy2']:.0%}")  # fmt: skip
        left.set(xlabel="true tempo (BPM)", ylabel="label-free tempo (BPM)", title="without labels, Accuracy 1 / 2")
        left.set(xscale="log", yscale="log", xticks=[50, 75, 100, 150, 200], yticks=[30, 50, 100, 150, 200, 300])
        left.set(xlim=(40, 250), ylim=(25, 400))
        left.legend()
    else:
        left.hist(figures["all"], bins=np.geomspace(30, 480, 49))
        left.set(xscale="log", xlabel="label-free tempo (BPM)", ylabel="clips", xticks=[30, 60, 120, 240, 480])
    for label, (rates, response) in stretched.items():
        right.plot(rates, np.median(response, 1), "o-" if "trained" in label else "x:", label=label)
    right.plot(rates, rates, "k-", lw=0.7)
    right.set(xlabel="stretch rate a", ylabel="z(a) / z(1), median of clips", title="pseudo-tempo under stretch")
    right.set(xscale="log", yscale="log", xticks=rates[::2], yticks=[0.6, 0.8, 1, 1.25, 1.5], ylim=(0.6, 1.6))
    right.legend()
    for axis in (left.xaxis, left.yaxis, right.xaxis, right.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
    picture.savefig(path, dpi=100, format="png")
    plt.close(picture)


@torch.no_grad()
def stretch_response(model: nn.Module, clips: list, sample_rate: int, seconds: float):
    """Rates (9,) and z of each clip at these, over its z at rate 1: (9, clips)."""
    rates, device = 1.25 ** np.linspace(-1, 1, 9), next(model.parameters()).device
    waveform = torch.stack([read_audio(clip[0], sample_rate, 0, 1.25 * seconds + 0.2) for clip in clips]).to(device)
    torch.manual_seed(0)
    z = [model.eval()(model.views(waveform, torch.full((2 * len(clips),), r, device=device), seconds)) for r in rates]
    z = torch.stack(z).abs().log().unflatten(1, (2, -1)).mean(1)  # (9, clips), of two views each
    return rates, (z - z[4]).exp().cpu().numpy()


def predict(args: argparse.Namespace, device: torch.device):
    """Prints the label-free tempo of files, or of all of a folder and its accuracies."""
    state = load_checkpoint(args.out / "checkpoint.pt")
    if not state["kept"]:
        die(f"{args.out}/checkpoint.pt: no encoder is trained yet; go on with --resume")
    name = "periodicity" if "periodicity" in state["kept"] else "tcn"
    settings, kept = argparse.Namespace(**state["args"]), state["kept"][name]
    model = make_encoder(name, settings, device)
    model.load_state_dict(state["arms"][kept["arm"]])
    print(f"model  {kept['arm']}, label-free")
    clips = [(path, 0.0, math.nan, "") for path in args.predict]
    clips = clips or load_clips(args.data, settings.sample_rate, 1.0, args.workers)
    results = []
    for path, _, bpm, _ in clips:
        reason = check_audio(path, settings.sample_rate, 1.0)[1]
        if reason:
            print(f"skip   {reason}")
            continue
        tempo, second, confidence = label_free_tempo(model, embed(model, [(path,)], settings.sample_rate, 0)[0],
                                                     kept["calibration"])  # fmt: skip
        print(f"{path}: {tempo:.1f} BPM, or {second:.0f} BPM; confidence {confidence:.2f}", flush=True)
        results.append((tempo, bpm))
    if not results:
        die("none of these files can be used")
    if scored := [result for result in results if not math.isnan(result[1])]:
        print(f"result {accuracies(*zip(*scored))}")


# -----------------------------------------------------------------------------
# Main


def make_encoder(name: str, args: argparse.Namespace, device) -> nn.Module:
    """The encoder of that name with the input that the settings give it."""
    if name == "periodicity":
        return Periodicity(FluxViews(args.sample_rate, args.n_fft, 40, 50), 40).to(device)
    size = (args.sample_rate, args.n_fft, args.tcn_bands, args.tcn_frame_rate)
    views = WsolaViews(*size) if args.tcn_views == "wsola" else FluxViews(*size, mask=0.9)
    return TCN(views, args.tcn_bands).to(device)


def main(args: argparse.Namespace):
    """Trains and compares every arm, or answers --predict."""
    began, device = time.time(), start_run(args.device)
    if args.predict is not None:
        return predict(args, device)
    checkpoint = args.out / "checkpoint.pt"
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    state = {"args": plain, "arms": {}, "running": {}, "rows": {}, "kept": {}}
    if args.resume:
        state, out = load_checkpoint(checkpoint), args.out
        args = argparse.Namespace(**{**state["args"], "out": out})
    if args.batch_size % rank_and_size()[1]:
        die(f"--batch-size {args.batch_size} is not a multiple of the {rank_and_size()[1]} processes")
    make_folder(args.out)
    folder = Path(args.data) if args.data else args.out / "audio"
    if not args.data:
        make_folder(folder)
        write = partial(write_track, folder=folder, sample_rate=args.sample_rate)
        lines = list(in_background(write, range(GENERATED_CLIPS), args.workers))
        (folder / "tempo.csv").write_text("\n".join(["file,bpm", *lines]))
        print(f"data   synthetic: {len(lines)} clips of 16 s in {folder} (pass --data DIR for recordings)")
    clips = load_clips(folder, args.sample_rate, args.view_seconds * args.max_stretch + 0.2, args.workers)
    known = [clip for clip in clips if not math.isnan(clip[2])]

    def build(name, seed):  # random, supervised and SSL arms of a seed start from the same weights
        torch.manual_seed(random_key("weights", name, seed))
        return make_encoder(name, args, device)

    train_arm = partial(train, steps=args.steps, batch_size=args.batch_size, lr=args.lr, max_stretch=args.max_stretch,
                        view_seconds=args.view_seconds, sample_rate=args.sample_rate, workers=args.workers, state=state,
                        checkpoint=checkpoint)  # fmt: skip
    table = []
    for seed in args.seed:
        table.append([])
        if known:
            bpm, classical = [clip[2] for clip in known], partial(autocorrelation_tempo, sample_rate=args.sample_rate, n_fft=args.n_fft)
            estimates = list(in_background(classical, [clip[0] for clip in known], args.workers))
            table[-1] += [{"row": "best constant, 5 folds", **accuracies(best_constant(np.array(bpm), song_folds(known, seed)), bpm)},
                          {"row": "autocorrelation of the onset strength", **accuracies(estimates, bpm)}]  # fmt: skip
        for name in args.encoders:
            if f"{name} {seed}" not in state["rows"]:
                count = sum(p.numel() for p in build(name, seed).parameters())
                print(f"model  {name} {count} parameters on {device}, seed {seed}")
                state["rows"][f"{name} {seed}"] = compare(name, seed, clips, build, train_arm, state, args.sample_rate, args.workers,
                                                          bool(args.data), args.left_out_folds)  # fmt: skip
                write_whole(checkpoint, partial(torch.save, state))
            table[-1] += state["rows"][f"{name} {seed}"]
    if not known:
        for name in args.encoders:
            estimates = state["kept"][name]["figure"]["all"]
            quantiles = dict(zip(("p5", "p25", "median", "p75", "p95"), np.quantile(estimates, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()))
            table[0].append({"row": f"{name}, SSL label-free BPM", **quantiles})
    report(table, args.out / "results.json", state["args"], round(time.time() - began, 1))
    stretched, sample = {}, clips[:: max(1, len(clips) // 32)][:32]
    for name in args.encoders:
        trained = build(name, args.seed[0])
        trained.load_state_dict(state["arms"][state["kept"][name]["arm"]])
        for kind, model in (("random", build(name, args.seed[0])), ("trained", trained)):
            stretched[f"{name}, {kind}"] = stretch_response(model, sample, args.sample_rate, args.view_seconds / 1.25)
    write_whole(args.out / "tempo.png", partial(draw, figures=state["kept"][args.encoders[-1]]["figure"],
                                                stretched=stretched))  # fmt: skip
    print(f"wrote  {args.out}/results.json, checkpoint.pt and tempo.png in {time.time() - began:.0f} s")


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        raise SystemExit("stopped; --resume goes on")
    except ValueError as error:  # a file that has changed since the start
        die(str(error).strip().splitlines()[-1])
