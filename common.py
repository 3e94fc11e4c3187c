"""What the scripts share: audio in, log-mel front end, soft_rank, linear probe, run plumbing.

Copy this file beside the script that you read. `python common.py` measures the front end
and soft_rank.
"""

import ctypes
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache, partial
from numbers import Real
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.transforms import MelScale, MelSpectrogram, Resample, Spectrogram

AUDIO = {".wav", ".au", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".aif", ".aiff"}
RUN_LOCK = ".run.lock"  # a file in the folder that a run writes to: open_run()
LOCKS = []  # their open handles, until the run ends: run()


def die(message: str):
    """Ends the program as bad input does: one line on stderr, exit code 2."""
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one speaks
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class AudioError(ValueError):
    """A file that cannot be used as audio, and why."""


# -----------------------------------------------------------------------------
# Audio in. Letters: S samples.


def find_audio(folder: Path, suffixes=AUDIO) -> list[Path]:
    """All audio (or other) files below a folder, sorted, without the litter of unpacking and what
    runs wrote; each once, by the shortest way, however many links lead to it."""
    folders, found = [Path(folder)], {}
    seen = {str(parent) for parent in Path(os.path.realpath(folder)).parents}  # no link leads up
    for here in folders:  # grows during the loop: folders nearer the top come first
        real = os.path.realpath(here)
        if real not in seen:
            seen.add(real)
            _, below, names = next(os.walk(here), ("", [], []))  # () if unreadable
            if RUN_LOCK in names and here != folders[0]:  # what a run wrote is not data
                continue
            folders += [here / name for name in sorted(below)
                        if name not in ("__MACOSX", "images_original")]
            for path in [here / name for name in sorted(names) if not name.startswith("._")]:
                if path.suffix.lower() in suffixes:
                    found.setdefault(os.path.realpath(path), path)
    return sorted(found.values())


@lru_cache
def resampler(source_rate: int, sample_rate: int) -> nn.Module:
    """torchaudio's Resample. Its kernel grows with the terms of the ratio, and 44101 -> 16000 takes
    a minute: a ratio of terms above 1000 is rounded to one below, by less than 0.06 %."""
    most = 1000 * sample_rate // max(source_rate, sample_rate)  # so that no term is above 1000
    ratio = Fraction(source_rate, sample_rate).limit_denominator(most)
    return Resample(ratio.numerator, ratio.denominator)


def resample(waveform: Tensor, source_rate: int, sample_rate: int) -> Tensor:
    """(S,) at source_rate -> at sample_rate, in pieces of about a minute: as a whole, a file of
    20 minutes takes gigabytes. The pieces overlap, so that no edge is heard."""
    transform = resampler(source_rate, sample_rate)
    up, down = transform.new_freq, transform.orig_freq  # in lowest terms
    if up == down:
        return waveform
    piece = math.ceil(60 * source_rate / down) * down  # samples, a multiple of `down`
    margin = math.ceil(transform.width / down) * down
    pieces = []
    for first in range(0, len(waveform), piece):
        before = min(first, margin)
        part = transform(waveform[first - before : first + piece + margin])
        pieces.append(part[before // down * up :][: piece // down * up])
    return torch.cat(pieces)


def read_audio(path, sample_rate: int, start=0.0, seconds: float | None = None) -> Tensor:
    """Reads a file, or `seconds` of it from `start` on, as a mono waveform.

    Args:
        path: whatever libsndfile reads, at any rate and with any number of channels.
        sample_rate: of the result, in Hz.
    Returns:
        (S,) float32, the mean of the channels; shorter than asked where the file ends.
    Raises:
        AudioError: the file is missing, unreadable, empty there, or holds NaN or samples above 1e6.
    """
    try:
        with soundfile.SoundFile(path) as file:
            source_rate, first = file.samplerate, round(start * file.samplerate)
            if not 1000 <= source_rate <= 10**6:
                raise ValueError(f"{source_rate} samples per second")
            frames = -1 if seconds is None else math.ceil(seconds * source_rate)
            options = {"dtype": "float32", "always_2d": True}
            if file.format == "MP3":  # exact to the sample only if read from the start in one go
                whole = file.read(-1 if frames < 0 else first + frames, **options)[first:]
                parts = np.array_split(whole, 64)
                del whole
            else:  # in parts: the channels of an hour are not held at once
                file.seek(min(first, file.frames))
                parts = file.blocks(2**20, frames=frames, **options)
            mono = [sum(part.T) / file.channels for part in parts]  # mean(1) takes far longer
            del parts  # what is held twice at once decides how long a file can be
            samples = np.concatenate([np.zeros(0, "float32"), *mono])
            del mono
    except (OSError, RuntimeError, TypeError, ValueError, MemoryError) as error:  # soundfile's too
        found = "a folder" if os.path.isdir(path) else "no such file"
        raise AudioError(f"{path}: {error if os.path.isfile(path) else found}") from None
    waveform = torch.from_numpy(samples)
    # beyond 1e6 squares could overflow; the norm is the largest magnitude
    if len(waveform) == 0 or not torch.linalg.vector_norm(waveform, torch.inf) < 1e6:
        raise AudioError(f"{path}: {'NaN or samples above 1e6' if len(waveform) else 'empty'}")
    return resample(waveform, source_rate, sample_rate)


def check_audio(path, sample_rate: int, min_seconds: float) -> float | str:
    """Reads a whole file: its seconds, or the reason why it cannot be used."""
    try:
        waveform = read_audio(path, sample_rate)
    except AudioError as error:
        return str(error)
    seconds = len(waveform) / sample_rate
    if seconds < min_seconds:
        return f"{path}: {seconds:.2f} s long, {min_seconds:.2f} s are needed"
    return f"{path}: silent" if waveform.abs().max() < 1e-5 else seconds  # -100 dB


def scan_audio(paths: list, sample_rate: int, min_seconds: float, workers: int) -> dict:
    """Reads every file once: {path: seconds} of those to use; the others are named and counted."""
    check = partial(check_audio, sample_rate=sample_rate, min_seconds=min_seconds)
    usable, paths = {}, list(dict.fromkeys(paths))
    for path, found in zip(paths, in_background(check, paths, workers, "scan")):
        if isinstance(found, str):
            print(f"skip   {found}")
        else:
            usable[path] = found
    minutes = sum(usable.values()) / 60
    print(f"data   {len(usable)} of {len(paths)} files can be used, {minutes:.1f} minutes")
    return usable


def in_background(function, items, workers: int, doing=""):
    """Yields function(item) for every item, in order, computed ahead by `workers` threads (0:
    none). `doing`, if given, is printed every 20 s with the items done and the time left."""
    began = shown = time.time()
    results = compute_ahead(function, items, workers) if workers else map(function, items)
    for done, result in enumerate(results, 1):
        yield result
        if doing and time.time() - shown > 20:
            shown = time.time()
            left = (shown - began) / done * (len(items) - done)
            print(f"{doing:6} {done}/{len(items)} | {left:.0f} s left", flush=True)


def compute_ahead(function, items, workers: int):
    """in_background() by threads: processes would take seconds to start where there is no fork and
    have to copy what they read; libsndfile, NumPy and torch let threads work side by side."""
    torch.get_num_threads()  # or a reader's set_num_threads(1) would hold for this thread, too
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    begun = deque()
    try:
        for item in items:
            begun.append(pool.submit(function, item))
            if len(begun) > 2 * workers:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# -----------------------------------------------------------------------------
# Front end. Letters: B clips, S samples, F bands, T frames.


class LogMel(nn.Module):
    """Waveform (B, S) -> log(magnitude + floor) (B, F, T) in mel bands, T = 1 + S // hop_length.

    n_mels=None leaves the F = n_fft / 2 + 1 linear bins. The values of torchaudio's Spectrogram
    (power 1, centred, Hann window) and MelScale (HTK, peaks of 1), which it is made of. Rates and
    frequencies are in Hz, lengths in samples.
    """

    def __init__(self, sample_rate, n_fft, hop_length, n_mels=None, win_length=None, f_min=0.0,
                 f_max=None, floor=1e-7):
        super().__init__()
        self.spectrogram = Spectrogram(n_fft, win_length, hop_length, power=None)
        self.floor = floor
        self.mel = MelScale(n_mels, sample_rate, f_min, f_max, n_fft // 2 + 1) if n_mels else None

    @torch.no_grad()
    def forward(self, waveform: Tensor) -> Tensor:
        # on a CPU a few at a time: to fill fresh memory with all spectra takes twice as long
        size = max(1, 2**20 // waveform.shape[1]) if waveform.is_cpu else len(waveform)
        parts = []
        for part in waveform.split(size):
            spectrum = self.spectrogram(part).transpose(1, 2)  # (size, T, bins)
            magnitude = torch.hypot(spectrum.real, spectrum.imag)  # faster than a complex abs()
            parts.append(magnitude if self.mel is None else magnitude @ self.mel.fb)
        return torch.cat(parts).add_(self.floor).log_().transpose(1, 2)  # (B, F, T)


# -----------------------------------------------------------------------------
# Differentiable ranks. Blondel et al. 2020 (arXiv:2002.08871), l2: the projection of
# values / strength onto the permutahedron, by isotonic regression. Letters: R rows of n values.
# Written once for NumPy arrays (CPU: a quarter of PyTorch's overhead, and its argsort is SIMD) and
# for CUDA tensors: `xp` is the library, and the names used are those that both have.


def soft_rank(values: Tensor, regularization_strength=1.0, direction="ascending") -> Tensor:
    """Differentiable ranks 1..n along the last dimension, exact, in O(n log n).

    With z = values / strength sorted and w = 1..n: rank = z - v, where v is the non-decreasing
    sequence closest to z - w. v is constant in blocks; of a block the gradient loses its mean and
    is divided by the strength. Where all sorted values lie further apart than the strength, each is
    a block: ranks are hard and the gradient is zero, also of a wrong order. Equal values share one.

    Args:
        values: (..., n), any real dtype, on any device.
        regularization_strength: 1e-30 to 1e30, in the unit of the values; the smaller, the harder
            the ranks; the larger, the nearer are all to (n + 1) / 2.
        direction: "ascending" gives the smallest value rank 1, "descending" the largest.
    Returns:
        (..., n) in the dtype of the values, float32 for half, bfloat16 and integers; a row adds up
        to n (n + 1) / 2. Twice differentiable.
    Raises:
        ValueError: names the argument that is not as above.
    """
    if not isinstance(values, Tensor) or values.ndim == 0 or values.is_complex():
        raise ValueError("soft_rank: values must be a real tensor of at least one dimension")
    if (not isinstance(regularization_strength, Real)
            or not 1e-30 <= regularization_strength <= 1e30):  # beyond, not all would be finite
        raise ValueError(f"soft_rank: {regularization_strength=} must be from 1e-30 to 1e30")
    if direction not in ("ascending", "descending"):
        raise ValueError(f"soft_rank: {direction=} must be 'ascending' or 'descending'")
    x = values if values.dtype in (torch.float32, torch.float64) else values.float()
    x = (x if direction == "ascending" else -x).contiguous()
    if x.numel() == 0:
        return x.clone()
    x = x if x.device.type in ("cpu", "cuda") else x.cpu()  # mps has no float64
    apply = SoftRank.apply
    if torch.compiler.is_compiling():  # leaves it as it is: what it makes of NumPy's calls fails
        apply = torch.compiler.disable(apply)
    return apply(x, float(regularization_strength)).to(values.device)


class SoftRank(torch.autograd.Function):
    """Ranks of x (..., n)."""

    @staticmethod
    def forward(ctx, x, strength):
        xp, array = (np, x.numpy()) if x.is_cpu else (torch, x)
        ranks, block = project(array.reshape(-1, x.shape[-1]), strength, xp)
        ctx.constants = strength, block
        return torch.asarray(ranks.reshape(x.shape))

    @staticmethod
    def backward(ctx, grad):
        """The Jacobian's product with the gradient."""
        return Centre.apply(grad, *ctx.constants), None


class Centre(torch.autograd.Function):
    """(grad - its mean over each block) / strength: the product with the Jacobian of the ranks,
    which is constant and symmetric, so that the backward pass is the same once more."""

    @staticmethod
    def forward(ctx, grad, strength, block):
        xp, g = (np, grad.numpy().ravel()) if grad.is_cpu else (torch, grad.ravel())
        mean = xp.asarray(xp.bincount(block, g) / xp.bincount(block), dtype=g.dtype)
        centred = g - mean[block]
        centred /= strength
        ctx.constants = strength, block
        return torch.asarray(centred.reshape(grad.shape))

    @staticmethod
    def backward(ctx, grad):
        """The same product, of the gradient's gradient."""
        return Centre.apply(grad, *ctx.constants), None, None


def project(rows, strength, xp):
    """The ranks of rows, (R, n) -> (R, n), and (R n,) the number of the block of each element."""
    n = rows.shape[1]
    order = rows.argsort(1)
    order += xp.arange(0, len(rows) * n, n, device=rows.device)[:, None]  # into flattened rows
    w = xp.arange(1, n + 1, dtype=xp.float64, device=rows.device)
    y = rows.take(order)  # (R, n), sorted
    largest = float(abs(y[:, [0, -1]]).max())  # of the ends of the rows
    if not largest <= 1e9 * strength:  # (or nan) float64 would lose strength * w
        y = xp.asarray(y, dtype=w.dtype).clip(-1e307, 1e307)  # infinities tie
        # a gap above n * strength separates blocks, however wide it is: cut to that
        y[:, 1:] = (y[:, 1:] - y[:, :-1]).clip(max=n * strength).cumsum(1)
        y[:, 0] = 0
    y = y - strength * w  # strength (z - w), in float64: float32 values add up exactly
    cost = n * n * len(rows)  # of minmax: fewer calls, but not for long rows
    short = (n <= 32 and cost <= 2**20) if xp is np else cost <= 2**25
    fit = minmax(y, xp) if short else pool(y, xp)  # strength v
    level = fit.ravel()
    new = xp.ones_like(level, dtype=bool)  # whether an element is the first of its block
    new[1:] = level[1:] > level[:-1]
    new[::n] = True  # no block reaches into the next row
    new[0] = False  # so that blocks are numbered from 0
    sorted_block = new.cumsum(0)
    y -= fit
    y /= strength
    y += w  # z - w - v + w: z - v, without the cancellation
    ranks, block = xp.empty_like(rows), xp.empty_like(order)
    ranks.ravel()[order] = xp.asarray(y, dtype=rows.dtype)
    block.ravel()[order.ravel()] = sorted_block
    return ranks, block.ravel()


def minmax(y, xp):
    """The fit of short rows, v[i] = max over j <= i of min over d of mean(y[j..j+d]), in O(n^2): at
    the first element of a block that minimum is v; further in it can be less, hence the max."""
    n = y.shape[1]
    if xp is torch:
        ahead = F.pad(y, (0, n - 1), value=math.inf).unfold(1, n, 1)  # (R, n, n)
        low = (ahead.cumsum(2) / torch.arange(1, n + 1, device=y.device)).amin(2)
        return low.cummax(1).values
    total = column = y.T.copy()  # (n, R): one call for all rows
    low = column.copy()
    for d in range(1, n):
        total = total[:-1] + column[d:]
        np.minimum(low[:-d], total / (d + 1), out=low[:-d])
    return torch.from_numpy(low.T.copy()).cummax(1).values.numpy()  # NumPy's is slow here


def pool(y, xp):
    """The fit of long rows by pooling adjacent violators, each run of them in all rows at once."""
    rows, n = y.shape
    total = xp.full((rows, n + 1), math.nan, dtype=y.dtype, device=y.device)
    total[:, 1:] = y  # nan parts the rows: it violates nothing
    total = level = total.ravel()  # of blocks, at first of one element each
    size = xp.ones_like(total)
    for _ in range(16):
        new = xp.zeros_like(level, dtype=bool)
        new[1:] = ~(level[:-1] >= level[1:])
        group = new.cumsum(0)  # which of the next blocks each block falls into
        if group[-1] + 1 == len(group):  # each into one of its own: done
            break
        total, size = xp.bincount(group, total), xp.bincount(group, size)
        level = total / size
    else:  # long chains are left that would lose one block a round: the textbook's stack instead
        blocks = []  # (sum, size)
        for a_sum, a_size in zip(total.tolist(), size.tolist()):
            while blocks and blocks[-1][0] / blocks[-1][1] >= a_sum / a_size:
                b_sum, b_size = blocks.pop()
                a_sum, a_size = a_sum + b_sum, a_size + b_size
            blocks.append((a_sum, a_size))
        total, size = xp.asarray(blocks, dtype=y.dtype, device=y.device).T
        level = total / size
    repeat = np.repeat if xp is np else torch.repeat_interleave
    return repeat(level, xp.asarray(size, dtype=int)).reshape(rows, n + 1)[:, 1:]  # less the nans


# -----------------------------------------------------------------------------
# Probe on frozen features. Letters: N items, D features, C classes.


def linear_probe(features: Tensor, targets: Tensor, weight_decay=1e-3, iterations=100,
                 scale=1.0) -> nn.Linear:
    """Softmax regression on standardised frozen features with an L2 penalty, by L-BFGS from zero.

    Convex, so that no seed and no learning rate matters.
    Args:
        features: (N, D). targets: (N, C) probabilities, float.
        scale: of the standardised features, a number or (D,): the smaller, the less one counts.
    Returns:
        Linear(D, C), logits for features as they come (the standardisation is in its weights).
    """
    mean, unit = features.mean(0), (features.std(0, correction=0) + 1e-6) / scale  # (D,)
    standardised = (features - mean) / unit
    layer = nn.Linear(features.shape[1], targets.shape[1], device=features.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=iterations,
                                  line_search_fn="strong_wolfe")

    def loss():
        """The objective that L-BFGS evaluates, with its gradient."""
        optimiser.zero_grad()
        value = F.cross_entropy(layer(standardised), targets)
        value = value + weight_decay * layer.weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    layer.weight.data /= unit
    layer.bias.data -= layer.weight.data @ mean
    return layer.requires_grad_(False)


# -----------------------------------------------------------------------------
# Run plumbing


def start_run(device: str = "") -> torch.device:
    """Picks the device (cuda, else mps, else cpu) and joins torchrun's group, if there is one: then
    only rank 0 goes on printing."""
    try:  # keep freed memory: fresh pages for every large tensor cost half of the front end's time
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0), mallopt(-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # another C library: as fast as it is
    device = device or ("cuda" if torch.cuda.is_available() else
                        "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        if device == "cuda" and "LOCAL_RANK" in os.environ:
            if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
                die("torchrun: more processes than GPUs; --device cpu takes any number")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        die(f"--device {device} cannot be used here: {str(error).splitlines()[0]}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w", errors="replace")  # any name, as in run()
    return torch.device(device)


def run(main, args):
    """main(args); what is no fault of the program ends in one line, not in a traceback: Ctrl-C, a
    full disk, too little memory, files that cannot be read (any more)."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout lacks it
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        main(args)
    except KeyboardInterrupt:
        raise SystemExit("stopped; if there is a checkpoint, --resume goes on from it")
    except AudioError as error:
        print(f"error: {error}", file=sys.stderr)  # of any rank: each reads files of its own
        raise SystemExit(2)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        die("nobody reads the output any more; if there is a checkpoint, --resume goes on from it")
    except (OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "to allocate" in str(error):  # "tried to allocate"
            die("too little memory; a smaller --batch-size needs less")
        # a full disk is no more than a RuntimeError to soundfile and torch
        if os.path.isdir(args.out) and shutil.disk_usage(args.out).free <= 2**20:
            die(f"the disk of {args.out} is full; a checkpoint there is whole (--resume)")
        if isinstance(error, OSError) and error.filename:
            die(f"{error.filename}: {error.strerror}")
        raise
    finally:  # a notebook's process goes on
        while LOCKS:
            os.close(LOCKS.pop())


def rank_and_size() -> tuple[int, int]:
    """This process and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def random_key(*names) -> int:
    """A seed for what is named, such as (seed, arm, step, item): no draw depends on another."""
    return zlib.crc32("/".join(map(str, names)).encode())


def write_whole(path: Path, write):
    """write(temporary path), then a rename: a kill leaves the old file or the new, never half."""
    if rank_and_size()[0] == 0:
        temporary = path.with_suffix(".tmp")
        write(temporary)
        os.replace(temporary, path)


def load_checkpoint(path: Path, made_by: str) -> dict:
    """The state saved there by a script of this name and version; dies if it is something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        die(f"{path}: no checkpoint; train first, or name its folder with --out")
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        die(f"{path}: not a checkpoint ({type(error).__name__})")
    if not isinstance(state, dict) or state.get("made_by") != made_by:
        die(f"{path}: not a checkpoint of {made_by}")
    return state


def save_first(state: dict, found: list):
    """Saves a run before its first step. An earlier run's checkpoint and results in its folder are
    renamed, to `old` if it was finished, to `unfinished` if not; without any finished arm they are
    overwritten. Dies if a resumed run began with other data than `found`: a clip that is left out
    of training now may have been trained on."""
    if state.setdefault("found", random_key(*found)) != random_key(*found):
        die(f"--resume: {state['args']['data'] or 'the audio'} has changed since the run began")
    results, checkpoint = (Path(state["args"]["out"], f) for f in ("results.json", "checkpoint.pt"))
    if "seconds" not in state and rank_and_size()[0] == 0:  # not resumed
        kind = "old" if results.exists() else "unfinished"
        try:
            worth = kind == "old" or torch.load(checkpoint, "cpu", weights_only=True)["arms"]
        except Exception:  # whatever it is, if there is one, it is not ours to lose
            worth = True
        for file in (results, checkpoint):
            if worth and file.exists():
                aside = file.replace(file.with_stem(f"{file.stem}.{kind}"))
                print(f"kept   the last run's {file.name} as {aside}")
    save(state)


def save(state: dict):
    """Writes the state of a run, with the seconds that it took so far, over all its sessions."""
    state["seconds"] = time.time() - state["began"]
    write_whole(Path(state["args"]["out"], "checkpoint.pt"), partial(torch.save, state))


def make_folder(path: Path):
    """Makes the folder that a run writes to; dies if it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        die(f"{path} cannot be written: {error.strerror}")


def open_run(arguments: dict, made_by: str) -> dict:
    """The state of a run, as its checkpoint holds it: new, with these arguments (among them `out`,
    `data`, `resume`, `batch_size`), or, with `resume`, that of out/checkpoint.pt, whose own
    arguments then apply, but for `out`, `workers` and `device`. Its keys: "arms", the weights of
    each finished arm; "running", the arm in progress; "kept", what --predict needs; "planned", the
    number of arms to come, which the script sets. Dies if another process runs in `out`."""
    out = Path(arguments["out"])
    plain = {name: str(v) if isinstance(v, Path) else v for name, v in arguments.items()}
    state = {"made_by": made_by, "args": plain, "arms": {}, "running": {}, "kept": {},
             "planned": 1, "began": time.time()}
    if plain["resume"]:
        state = load_checkpoint(out / "checkpoint.pt", made_by)
        given, began_with = plain["data"], state["args"]["data"]
        if given and not (began_with and os.path.realpath(given) == os.path.realpath(began_with)):
            die(f"--resume: {out}/checkpoint.pt is of {began_with or 'the demo'}; another --out "
                "starts anew")
        state["args"] |= {name: plain[name] for name in ("out", "workers", "device")}
        state["began"] = time.time() - state["seconds"]  # as if it had never paused
        print(f"resume {out}/checkpoint.pt, with the arguments that it was started with")
    batch_size, (rank, size) = state["args"]["batch_size"], rank_and_size()
    if batch_size % size:
        die(f"--batch-size {batch_size} cannot be shared by {size} processes")
    make_folder(out)
    if rank == 0:
        LOCKS.append(os.open(out / RUN_LOCK, os.O_RDWR | os.O_CREAT))
        with suppress(ImportError, OSError):  # Windows has no such locks, nor has every disk
            import fcntl

            try:  # until run() or this process ends, however it ends
                fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                die(f"another run writes to {out}; give this one a folder of its own by --out")
    return state


def training(arm: str, model: nn.Module, optimiser, steps: int, batch_size: int, load, workers: int,
             state: dict, monitor=None):
    """Yields (batch, network, losses) for each remaining step of an arm. The script's loop computes
    the loss with `network` (the model; data-parallel under torchrun, bf16 on CUDA), takes the
    optimiser's step and appends the loss to `losses`. Done here: the learning rate's one cycle, a
    seed for every step, reading batches ahead by load(step, items=this process's share), a line of
    progress with monitor() or the mean of the last losses, and a checkpoint once a minute, at the
    end and on Ctrl-C. A finished arm yields nothing: its weights are loaded into the model.
    """
    if arm in state["arms"]:
        model.load_state_dict(state["arms"][arm])
        return
    (rank, size), losses = rank_and_size(), deque(maxlen=20)
    load = partial(load, items=range(rank * batch_size // size, (rank + 1) * batch_size // size))
    began = saved = time.time()
    first, shown, stop = 0, 0.0, []
    if state["running"].get("arm") == arm:
        first = state["running"]["step"]
        model.load_state_dict(state["running"]["model"])
        optimiser.load_state_dict(state["running"]["optimiser"])
    parallel, device = model.train(), next(model.parameters()).device
    print(f"model  {arm}: {sum(p.numel() for p in model.parameters())} parameters on {device}")
    if dist.is_initialized():  # batch norm by each rank's batch; running means are rank 0's
        parallel = nn.parallel.DistributedDataParallel(model, static_graph=True)

    def network(*inputs):
        """The model's output in float32, computed in bf16 on CUDA."""
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return parallel(*inputs).float()

    before = signal.signal(signal.SIGINT, lambda *_: stop.append(1))  # a step is finished and saved
    try:
        for step, batch in enumerate(in_background(load, range(first, steps), workers), first):
            torch.manual_seed(random_key(arm, step, rank))
            fifths = (step + 1) / (0.2 * steps)  # of all steps: one up to the peak, four down to 0
            factor = min(fifths, 0.5 + 0.5 * math.cos(math.pi * max(0.0, fifths - 1) / 4))
            for group in optimiser.param_groups:
                group["lr"] = optimiser.defaults["lr"] * factor
            yield [part.to(device) for part in batch], network, losses
            now = time.time()
            if step + 1 == steps or now - shown > 20:  # `shown` is 0 at first
                shown, pace = now, (step + 1 - first) / (now - began)  # steps a second
                loss = torch.stack(tuple(losses)).mean().item()
                if not math.isfinite(loss):
                    die(f"{arm}: the loss is {loss} after {step + 1} steps; try a lower --lr")
                text = monitor() if monitor else f"loss {loss:.4f}"
                print(f"step   {arm} {step + 1}/{steps} | {text} | "
                      f"{pace * batch_size:.0f} clips/s | {(steps - step - 1) / pace:.0f} s left "
                      f"of arm {len(state['arms']) + 1}/{state['planned']}", flush=True)
            if stop or now - saved > 60:
                saved = now
                state["running"] = {"arm": arm, "step": step + 1, "model": model.state_dict(),
                                    "optimiser": optimiser.state_dict()}
                save(state)
            if stop:
                raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)
    state["arms"][arm] = {k: v.cpu().clone() for k, v in model.state_dict().items()}
    state["running"] = {}
    save(state)


def report(rows_of_seeds: list, path: Path, args: dict, began: float) -> list[dict]:
    """Prints the table, mean ± sd over seeds; writes its rows, with <metric>_sd, to results.json
    and returns them."""
    rows, names = [], [name for name in rows_of_seeds[0][0] if name != "row"]
    width = max(len(row["row"]) for row in rows_of_seeds[0]) + 2
    print("result".ljust(width) + "".join(f"  {name:>15}" for name in names))
    for same in zip(*rows_of_seeds, strict=True):
        row, line = dict(same[0]), f"  {same[0]['row']}".ljust(width)
        assert all(other["row"] == row["row"] for other in same), "seeds with different rows"
        for name in [name for name in row if name != "row"]:
            values = [other[name] for other in same]
            if values[0] is None:  # this row has no such score
                cell = "-"
            elif isinstance(values[0], float):
                row[name] = float(np.mean(values))
                cell = f"{row[name]:.3f}"
                if len(same) > 1:
                    row[f"{name}_sd"] = float(np.std(values, ddof=1))
                    cell += f" ± {row[f'{name}_sd']:.3f}"
            else:  # a count
                several = len(set(values)) > 1
                cell = row[name] = f"{min(values)} to {max(values)}" if several else values[0]
            line += f"  {cell:>15}" if name in names else ""  # the rest is for results.json
        print(line)
        rows.append(row)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    seconds = round(time.time() - began, 1)
    results = {"args": args, "versions": versions, "seconds": seconds, "rows": rows}
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(results, indent=1)))
    return rows


def end_run(out: Path, picture: str, began: float):
    """Prints the last line of a run and ends torchrun's processes: all together, for one that left
    early could abort those still talking to it; and by os._exit, for threads that DDP leaves behind
    now and then abort Python's ordinary exit."""
    print(f"wrote  {out}/results.json, checkpoint.pt and {picture} in {time.time() - began:.0f} s")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)


def median_times(contestants: dict, make, rounds: int) -> dict:
    """Median CPU seconds of each function after a fifth of the rounds, called in turn, each with
    inputs of its own: replaying one input lets the branch predictor learn it."""
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, function in contestants.items():
            inputs = make()
            began = time.thread_time()
            function(*inputs)
            times[name].append(time.thread_time() - began)
    return {name: float(np.median(taken[rounds // 5 :])) for name, taken in times.items()}


def benchmark():
    """Prints what the front end and soft_rank cost on one thread, beside what others offer."""
    torch.set_num_threads(1)
    shape = dict(n_fft=1024, hop_length=220, f_min=30, f_max=11000, n_mels=40)
    theirs = MelSpectrogram(22050, power=1, **shape)
    front_ends = {"LogMel": LogMel(22050, **shape), "torchaudio": lambda x: torch.log(theirs(x))}
    for name, taken in median_times(front_ends, lambda: [torch.randn(32, 220500)], 10).items():
        print(f"front end, clips of 10 s per second: {name} {32 / taken:.0f}")
    backward = lambda rank: lambda x, grad, strength: rank(x, strength).backward(grad)
    contestants = {"soft_rank": backward(soft_rank), "torch.sort": lambda x, *_: torch.sort(x)}
    try:
        import torchsort

        contestants["torchsort"] = backward(lambda x, s: torchsort.soft_rank(x, "l2", s))
    except ImportError:
        print("torchsort is not installed here: soft_rank is measured without it")
    print("soft_rank, forward + backward, and torch.sort alone: microseconds and ours / theirs")
    ratios = []
    for rows, n in ((64, 4), (64, 8), (64, 16), (128, 10), (64, 64), (1024, 4), (1024, 10),
                    (512, 16), (512, 32), (4096, 8), (4096, 16), (4096, 64), (1, 10), (128, 100),
                    (32, 1000), (8, 10000), (1, 100000)):
        for strength in (1.0, 0.1, 0.001):
            noise = partial(torch.randn, rows, n)
            make = lambda: (noise(requires_grad=True), noise(), strength)
            taken = median_times(contestants, make, max(10, min(100, 2_000_000 // (rows * n))))
            mine, others = taken.pop("soft_rank"), taken.items()
            cells = [f"  {name} {1e6 * s:6.0f}, ratio {mine / s:5.2f}" for name, s in others]
            print(f"  {f'({rows}, {n})':12} strength {strength:<5}  {1e6 * mine:6.0f}", *cells)
            if n <= 64 <= rows and "torchsort" in taken:
                ratios.append(mine / taken["torchsort"])
    if ratios:
        print(f"soft_rank / torchsort over rows 64 to 4096, n 4 to 64: geometric mean "
              f"{np.exp(np.log(ratios).mean()):.2f}, largest {max(ratios):.2f}")


if __name__ == "__main__":
    benchmark()
