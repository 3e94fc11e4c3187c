"""Properties of common.py. Run from the project's folder: python -m pytest tests"""

import io
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import common


def test_log_mel_equals_torchaudios_transforms():
    waveform = torch.randn(3, 22050)
    mel = torchaudio.transforms.MelSpectrogram(22050, 1024, hop_length=220, f_min=30, f_max=11000,
                                               n_mels=40, power=1.0)
    expected = torch.log(mel(waveform) + 1e-7)
    ours = common.LogMel(22050, 1024, 220, 40, f_min=30, f_max=11000)(waveform)
    assert ours.shape == (3, 40, 1 + 22050 // 220)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)  # logs of 513-term sums


def test_linear_spectrogram_equals_torchaudios_with_a_short_window():
    waveform = torch.randn(2, 16000)
    linear = torchaudio.transforms.Spectrogram(1024, 400, 160, power=1.0)
    ours = common.LogMel(16000, 1024, 160, win_length=400, floor=1e-5)(waveform)
    torch.testing.assert_close(ours, torch.log(linear(waveform) + 1e-5), atol=1e-4, rtol=0)


def test_log_mel_of_a_long_batch_taken_apart_equals_that_of_each_waveform():
    log_mel = common.LogMel(22050, 1024, 441, 40)
    waveforms = torch.randn(7, 2**18)  # four at a time, and three
    each = torch.cat([log_mel(waveform[None]) for waveform in waveforms])
    torch.testing.assert_close(log_mel(waveforms), each, atol=1e-6, rtol=0)


def test_log_mel_of_a_sine_peaks_in_its_band_and_silence_is_the_floor():
    log_mel = common.LogMel(16000, 1024, 160, 64, f_min=60, f_max=7800)
    sine = torch.sin(2 * torch.pi * 1000 * torch.arange(16000) / 16000)[None]
    peak = log_mel(sine)[0].mean(1).argmax()
    assert log_mel.mel.fb[64, peak] == log_mel.mel.fb[64].max()  # bin 64 is 1000 Hz
    assert log_mel(torch.zeros(1, 16000)).allclose(torch.tensor(1e-7).log())


@pytest.mark.parametrize("suffix, subtype, rate, channels", [
    ("wav", "PCM_U8", 8000, 1), ("wav", "PCM_16", 96000, 2), ("flac", "PCM_24", 44100, 1),
    ("ogg", "VORBIS", 44100, 2), ("aiff", "PCM_16", 22050, 1),
    ("mp3", "MPEG_LAYER_III", 44100, 2)])
def test_read_audio_gives_the_same_sine_from_any_format(tmp_path, suffix, subtype, rate, channels):
    t = np.arange(2 * rate) / rate
    sine = 0.5 * np.sin(2 * np.pi * 440 * t)
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.stack([sine] * channels, 1), rate, subtype=subtype)
    waveform = common.read_audio(path, 16000)
    assert waveform.dtype == torch.float32
    assert abs(len(waveform) - 32000) < 3000  # mp3 pads its ends
    spectrum = torch.fft.rfft(waveform[8000:24000]).abs()  # bins of 1 Hz
    assert spectrum.argmax() == 440
    assert abs(spectrum.max() / 8000 - 0.5) < 0.02  # 8-bit noise, mp3 loss


def test_a_file_that_several_links_lead_to_is_found_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.wav").touch()
    for link in ("itself", "again", "and again"):  # ways around multiply
        (tmp_path / "a" / link).symlink_to(tmp_path / "a")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert common.find_audio(tmp_path) == [tmp_path / "a" / "x.wav"]
    (tmp_path / "z.wav").symlink_to(tmp_path / "a" / "x.wav")
    assert common.find_audio(tmp_path) == [tmp_path / "z.wav"]  # by the shortest way


def test_no_link_leads_out_to_what_lies_beside_the_folder(tmp_path):
    for folder in ("mine", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.wav").touch()
    (tmp_path / "mine" / "up").symlink_to(tmp_path)
    assert common.find_audio(tmp_path / "mine") == [tmp_path / "mine" / "x.wav"]


def test_folders_that_all_link_to_each_other_are_looked_through_once(tmp_path):
    for here, there in itertools.product("abcd", repeat=2):  # 3 ** 40 ways round
        (tmp_path / here).mkdir(exist_ok=True)
        (tmp_path / here / f"{here}.wav").touch()
        (tmp_path / here / there).symlink_to(tmp_path / there)
    assert common.find_audio(tmp_path) == [tmp_path / here / f"{here}.wav" for here in "abcd"]


def test_litter_of_unpacking_is_left_out_unless_the_folder_asked_for_lies_in_it(tmp_path):
    for folder in ("mine", "mine/__MACOSX", "mine/images_original/deep"):
        (tmp_path / "images_original" / folder).mkdir(parents=True)
        (tmp_path / "images_original" / folder / "x.wav").touch()
    mine = tmp_path / "images_original" / "mine"
    (mine / "._x.wav").touch()
    assert common.find_audio(mine) == [mine / "x.wav"]


def test_names_that_are_not_utf_8_can_be_printed():
    code = "import common; common.run(lambda name: print(name), 'caf\\udce9.wav')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert result.returncode == 0 and result.stdout == "caf\\udce9.wav\n"


def test_a_run_prints_in_a_notebook_whose_stdout_is_no_ordinary_one(monkeypatch):
    printed = io.StringIO()  # has no reconfigure() either
    monkeypatch.setattr(sys, "stdout", printed)
    common.run(print, "hello")
    assert printed.getvalue() == "hello\n"


def test_ctrl_c_waits_for_the_end_of_a_step_and_no_longer_once_training_has_stopped(tmp_path):
    arguments = {"out": tmp_path, "data": None, "resume": False, "batch_size": 2, "workers": 0}
    state, model = common.open_run(arguments, "test"), torch.nn.Linear(1, 1)
    load = lambda step, items: [torch.ones(len(items), 1)]
    optimiser, ended = torch.optim.AdamW(model.parameters()), []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
    with pytest.raises(KeyboardInterrupt):
        for _, _, losses in common.training("arm", model, optimiser, 3, 2, load, 0, state):
            signal.raise_signal(signal.SIGINT)
            losses.append(torch.zeros(()))
            ended.append("step")
    assert ended == ["step"] and state["running"]["step"] == 1
    with pytest.raises(KeyboardInterrupt):  # at once, or a notebook could not be interrupted again
        signal.raise_signal(signal.SIGINT)


def test_a_run_is_not_resumed_with_other_data(tmp_path, capsys):
    arguments = {"out": tmp_path, "data": "songs", "resume": False, "batch_size": 8,
                 "workers": 0, "device": ""}
    common.save(common.open_run(arguments, "test"))
    for data in (None, "songs", "./songs", Path("songs").absolute()):
        common.open_run(arguments | {"resume": True, "data": data}, "test")
    with pytest.raises(SystemExit):
        common.open_run(arguments | {"resume": True, "data": "other"}, "test")
    assert "is of songs;" in capsys.readouterr().err
    state = common.open_run(arguments, "test")
    common.save_first(state, [("a.wav", 1.0), ("b.wav", 2.0)])
    saved = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit):  # a file is gone
        common.save_first(common.open_run(arguments | {"resume": True}, "test"), [("a.wav", 1.0)])
    assert "songs has changed" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved


def test_what_a_run_wrote_is_not_data_unless_it_is_asked_for(tmp_path):
    arguments = {"out": tmp_path / "out", "data": None, "resume": False, "batch_size": 8}
    common.open_run(arguments, "test")
    for path in (tmp_path / "mine.wav", tmp_path / "out" / "audio" / "generated.wav"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    names = lambda folder: [path.name for path in common.find_audio(folder)]
    assert names(tmp_path) == ["mine.wav"]
    assert names(tmp_path / "out") == names(tmp_path / "out" / "audio") == ["generated.wav"]


def test_two_processes_do_not_run_in_one_folder(tmp_path, capsys):
    arguments = {"out": tmp_path, "data": None, "resume": False, "batch_size": 8}
    for _ in range(2):  # one after the other, as in a notebook
        common.open_run(arguments, "test")
    code = f"""import common, sys
common.open_run({arguments | {"out": str(tmp_path)}}, "test")"""
    second = [sys.executable, "-c", code]
    refused = subprocess.run(second, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith(f"error: another run writes to {tmp_path}")
    common.run(lambda args: common.open_run(arguments, "test"), SimpleNamespace(out=tmp_path))
    assert subprocess.run(second, cwd=ROOT, capture_output=True).returncode == 0  # it is done


def test_more_processes_than_gpus_end_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        common.start_run("cuda")
    assert "more processes than GPUs" in capsys.readouterr().err


def test_a_new_run_puts_the_checkpoint_of_an_earlier_one_aside(tmp_path):
    arguments = {"out": tmp_path, "data": "songs", "resume": False, "batch_size": 8,
                 "workers": 0, "device": ""}
    checkpoint, old = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.old.pt"
    first = common.open_run(arguments, "test")
    common.save_first(first, [])
    assert not old.exists()
    torch.save(first | {"arms": {"done": 1}}, checkpoint)
    common.save_first(common.open_run(arguments | {"resume": True}, "test"), [])
    assert [*tmp_path.glob("c*")] == [checkpoint]  # the same run, going on
    (tmp_path / "results.json").write_text("its results")
    for _ in range(3):  # what has learnt nothing does not take its place
        common.save_first(common.open_run(arguments, "test"), [])
        assert common.load_checkpoint(old, "test")["arms"] == {"done": 1}
        assert (tmp_path / "results.old.json").read_text() == "its results"
    checkpoint.write_text("an unfinished run's, of another version")
    common.save_first(common.open_run(arguments, "test"), [])
    assert "unfinished" in (tmp_path / "checkpoint.unfinished.pt").read_text()
    assert common.load_checkpoint(old, "test")["arms"] == {"done": 1}  # the finished run stays
    checkpoint.unlink()
    (tmp_path / "results.json").write_text("results whose checkpoint was deleted")
    common.save_first(common.open_run(arguments, "test"), [])
    assert "deleted" in (tmp_path / "results.old.json").read_text()


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_sessions(tmp_path):
    arguments = {"out": tmp_path, "data": "songs", "resume": False, "batch_size": 8,
                 "workers": 0, "device": ""}
    first = common.open_run(arguments, "test")
    first["began"] -= 1000  # this session has lasted that long
    common.save(first)
    state = common.open_run(arguments | {"resume": True}, "test")
    common.report([[{"row": "chance"}]], tmp_path / "results.json", {}, state["began"])
    seconds = json.loads((tmp_path / "results.json").read_text())["seconds"]
    assert 1000 <= seconds < 1060


def test_of_several_processes_one_says_why_they_end(monkeypatch, capsys):
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            common.die("why")
    assert capsys.readouterr().err == "error: why\n"


def test_long_work_in_the_background_says_how_far_it_is(monkeypatch, capsys):
    clock = iter(range(0, 1000, 8))  # seconds
    monkeypatch.setattr(common.time, "time", lambda: next(clock))
    assert list(common.in_background(str, range(7), 0, "count")) == list("0123456")
    assert capsys.readouterr().out == "count  3/7 | 43 s left\ncount  6/7 | 11 s left\n"


def test_readers_keep_the_order_and_begin_no_more_than_twice_their_number_ahead():
    begun = []

    def read(number):
        begun.append(number)
        time.sleep(0.02 * (number % 2))  # the odd ones end later
        return number

    results = common.in_background(read, range(50), 2)
    assert next(results) == 0
    time.sleep(0.3)
    assert sorted(begun) == [0, 1, 2, 3, 4]
    assert list(results) == list(range(1, 50))


def test_a_run_that_ends_early_leaves_unread_what_was_still_ahead():
    begun, may_end = [], [threading.Event() for _ in range(3)]

    def read(number):
        begun.append(number)
        may_end[number].wait(5)

    may_end[0].set(), may_end[2].set()
    results = common.in_background(read, range(3), 1)
    next(results)  # 1 is being read, 2 waits
    threading.Timer(0.3, may_end[1].set).start()
    results.close()
    assert begun == [0, 1]


def test_readers_work_on_one_core_each_and_leave_the_step_all_of_its_own():
    reads = "print(*common.in_background(lambda _: torch.get_num_threads(), range(3), 2))"
    own = []
    for line in ("print(1, 1, 1)", reads):  # each in a process where torch has not yet begun
        code = f"import torch, common\n{line}\nprint(torch.get_num_threads())"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                cwd=ROOT)
        own.append(result.stdout.splitlines())
    assert own[0] == own[1] and own[0][0] == "1 1 1"


def test_training_is_the_same_whether_threads_read_or_not(tmp_path):
    arguments = {"out": tmp_path, "data": None, "resume": False, "batch_size": 2, "workers": 0}
    weights = []

    def load(step, items):
        """Noise that the step and the item alone decide; whether a thread drew it."""
        draws = [np.random.default_rng([step, item]).normal(size=3) for item in items]
        other = threading.current_thread() is not threading.main_thread()
        return [torch.tensor(np.array(draws)).float(), torch.tensor(other)]

    for workers in (0, 2):
        torch.manual_seed(0)
        model, state = torch.nn.Linear(3, 1), common.open_run(arguments, "test")
        optimiser = torch.optim.AdamW(model.parameters(), 0.1)
        for (x, other), network, losses in common.training(
                "arm", model, optimiser, 5, 2, load, workers, state):
            assert other == (workers > 0)
            losses.append(network(x + torch.rand_like(x)).square().mean())
            optimiser.zero_grad()
            losses[-1].backward()
            optimiser.step()
        weights.append(model.weight.detach().clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize("suffix", ["wav", "mp3"])
def test_an_excerpt_equals_the_slice_of_the_whole_file(tmp_path, suffix):
    noise = np.random.default_rng(0).standard_normal(3 * 16000) * 0.1
    soundfile.write(tmp_path / f"a.{suffix}", noise, 16000)
    whole = common.read_audio(tmp_path / f"a.{suffix}", 16000)
    part = common.read_audio(tmp_path / f"a.{suffix}", 16000, 1.25, 0.5)
    assert torch.equal(part, whole[20000:28000])


@pytest.mark.parametrize("suffix, rate", [("wav", 22050), ("mp3", 22050), ("mp3", 44100),
                                          ("ogg", 22050), ("opus", 24000)])
def test_a_file_of_minutes_is_read_as_libsndfile_decodes_it_in_one_go(tmp_path, suffix, rate):
    rng, form = np.random.default_rng(0), {"format": "OGG", "subtype": "OPUS"}
    with soundfile.SoundFile(tmp_path / f"a.{suffix}", "w", rate, 1,
                             **(form if suffix == "opus" else {})) as file:
        for _ in range(23):  # in all three times what is read at once
            file.write(0.1 * rng.standard_normal(100_000))
    whole, _ = soundfile.read(tmp_path / f"a.{suffix}", dtype="float32")
    difference = np.abs(common.read_audio(tmp_path / f"a.{suffix}", rate).numpy() - whole)
    assert difference.max() < 1e-6  # of float32; read in parts an mp3 is off by 0.05


def test_a_long_stereo_mp3_is_held_three_times_as_large_as_one_channel_at_most(tmp_path):
    soundfile.write(tmp_path / "a.mp3", np.zeros((3_000_000, 2)), 44100)
    tracemalloc.start()
    size = common.read_audio(tmp_path / "a.mp3", 44100).nbytes
    peak = tracemalloc.get_traced_memory()[1]  # NumPy's; both channels come whole
    tracemalloc.stop()
    assert size >= 4 * 3_000_000 and peak < 3.2 * size


def test_a_co_prime_rate_is_resampled_within_seconds_and_keeps_its_length(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(44101) * 0.05), 44101)
    began = time.time()
    assert abs(len(common.read_audio(tmp_path / "a.wav", 16000)) - 16000) <= 5
    assert time.time() - began < 5


@pytest.mark.parametrize("source_rate, rate", [(44100, 16000), (8000, 22050), (44101, 16000),
                                               (22051, 22050)])
def test_a_long_file_is_resampled_in_pieces_without_a_seam(source_rate, rate):
    waveform = torch.randn(source_rate * 61 + 17)
    whole = common.resampler(source_rate, rate)(waveform)
    assert torch.equal(common.resample(waveform, source_rate, rate), whole)


def test_unusable_files_raise_one_line_that_names_them(tmp_path):
    (tmp_path / "text.wav").write_text("not audio")
    (tmp_path / "zero.wav").write_bytes(b"")
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan, 0.2]), 8000, subtype="FLOAT")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 8000)
    soundfile.write(tmp_path / "slow.wav", np.ones(100), 8)
    (tmp_path / "folder.wav").mkdir()
    soundfile.write(tmp_path / "huge.wav", np.array([0.1, 1e20, 0.2]), 8000, subtype="FLOAT")
    (tmp_path / "samples.raw").write_bytes(bytes(100))
    bad = ("text", "zero", "nan", "none", "slow", "missing", "folder", "huge")
    for name in (*(f"{word}.wav" for word in bad), "samples.raw"):
        with pytest.raises(ValueError, match=name) as error:
            common.read_audio(tmp_path / name, 8000)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("free", [0, 10**9])
def test_a_full_disk_ends_a_run_in_one_line_and_any_other_error_is_shown(
        tmp_path, capsys, monkeypatch, free):
    def main(args):
        raise RuntimeError("file write failed")  # as torch.save says it

    monkeypatch.setattr(common.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    expected = SystemExit if free == 0 else RuntimeError
    with pytest.raises(expected) as ended:
        common.run(main, SimpleNamespace(out=tmp_path))
    lines = capsys.readouterr().err.splitlines()
    if free == 0:
        assert ended.value.code == 2 and len(lines) == 1
        assert lines[0].startswith(f"error: the disk of {tmp_path} is full")


@pytest.mark.parametrize("cause, message", [
    (lambda: torch.empty(2**50), "too little memory"),
    (lambda: np.empty(2**50), "too little memory"),
    (lambda: Path(300 * "x").is_dir(), 300 * "x" + ": File name too long")])
def test_too_little_memory_and_a_file_out_of_reach_end_a_run_in_one_line(
        tmp_path, capsys, cause, message):
    with pytest.raises(SystemExit) as ended:
        common.run(lambda args: cause(), SimpleNamespace(out=tmp_path))
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"error: {message}")


def test_a_run_whose_output_nobody_reads_ends_in_one_line():
    code = "import common; common.run(lambda args: [print(i, flush=True) for i in range(10**6)], 0)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()  # as `| head` does
    line, *more = process.stderr.read().splitlines()
    assert line.startswith("error: nobody reads") and not more and process.wait(60) == 2


@pytest.mark.parametrize("name", [300 * "x" + ".wav", "gone.wav", "."])
def test_read_audio_names_what_it_cannot_reach(tmp_path, name):
    with pytest.raises(common.AudioError, match="no such file|a folder"):
        common.read_audio(tmp_path / name, 8000)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_gone_in_the_middle_of_a_run_ends_it_in_one_line(tmp_path, capsys, workers):
    soundfile.write(tmp_path / "here.wav", np.ones(100), 8000)
    read = lambda name: len(common.read_audio(tmp_path / name, 8000))
    names, heard = ["here.wav", "here.wav", "gone.wav", "here.wav"], []

    def main(items):
        for length in common.in_background(read, items, workers):
            heard.append(length)

    with pytest.raises(SystemExit) as ended:
        common.run(main, names)
    assert heard == [100, 100] and ended.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'gone.wav'}: no such file\n"



def test_scan_keeps_the_usable_files_and_names_the_others(tmp_path, capsys):
    soundfile.write(tmp_path / "good.wav", np.sin(np.arange(16000)), 8000)
    soundfile.write(tmp_path / "short.wav", np.sin(np.arange(800)), 8000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 8000)
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "litter.wav").write_text("")
    (tmp_path / "._good.wav").write_text("")
    paths = common.find_audio(tmp_path)
    assert [p.name for p in paths] == ["good.wav", "short.wav", "silent.wav"]
    assert common.scan_audio([*paths, paths[0]], 8000, 1.0, workers=0) == {paths[0]: 2.0}
    out = capsys.readouterr().out
    assert "short.wav: 0.10 s long, 1.00 s" in out and "silent.wav: silent" in out
    assert "1 of 3 files" in out


# soft_rank


def projection(values, strength):
    """Soft ranks of a row by pool-adjacent-violators, one block after the other, in float64."""
    order = np.argsort(values, kind="stable")
    z, blocks = np.asarray(values, float)[order] / strength, []  # blocks of (sum, size)
    for y in z - np.arange(1, len(z) + 1):
        blocks.append((y, 1))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [(a + b, n + m)]
    ranks = np.empty(len(z))
    ranks[order] = z - np.concatenate([np.full(n, a / n) for a, n in blocks])
    return ranks


ROWS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "tails": lambda rng, n: rng.standard_cauchy(n),
    "ties": lambda rng, n: rng.integers(0, 3, n) * 1.0,
    "sorted": lambda rng, n: np.arange(n) * 0.3,
    "reversed": lambda rng, n: -np.arange(n) * 1.7,
    "constant": lambda rng, n: np.full(n, 2.5),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("n", [1, 2, 3, 10, 33, 200])  # both algorithms, and their border
def test_soft_rank_equals_pool_adjacent_violators(kind, n):
    rows = np.stack([ROWS[kind](np.random.default_rng(k), n) for k in range(3)])
    for strength in (100.0, 1.0, 0.1, 1e-3):
        expected = np.stack([projection(row, strength) for row in rows])
        for sign, direction in ((1, "ascending"), (-1, "descending")):
            ours = common.soft_rank(torch.tensor(sign * rows), strength, direction)
            rounding = 1e-10 * np.abs(rows).max() / strength + 1e-9
            np.testing.assert_allclose(ours, expected, rtol=0, atol=rounding)
        np.testing.assert_allclose(ours.sum(1), n * (n + 1) / 2, rtol=1e-6)  # the sum of the ranks


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_soft_rank_is_the_nearest_point_of_the_permutahedron(n):
    rng = np.random.default_rng(n)
    corners = np.array(list(itertools.permutations(range(1, n + 1))), float)
    for z in rng.standard_normal((20, n)) * 2:
        r = common.soft_rank(torch.tensor(z)).numpy()
        assert ((z - r) @ (corners - r).T).max() < 1e-9  # no corner lies further towards z: optimal
        points = rng.dirichlet(np.full(len(corners), 0.3), 2000) @ corners  # in it, as r must be
        assert np.linalg.norm(points - z, axis=1).min() >= np.linalg.norm(r - z) - 1e-9
        ordered = np.sort(r)[::-1]
        assert (np.cumsum(ordered) <= np.cumsum(np.arange(n, 0, -1)) + 1e-9).all()


@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 2, 7), (1, 40)])
@pytest.mark.parametrize("direction", ["ascending", "descending"])
def test_soft_rank_has_exact_first_and_second_derivatives(shape, direction):
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    for strength in (0.1, 3.0):
        square = lambda x: common.soft_rank(x, strength, direction).square()
        assert torch.autograd.gradcheck(square, x)
        assert torch.autograd.gradgradcheck(square, x)


def test_soft_rank_of_well_separated_scores_is_the_hard_rank_without_gradient():
    reverse = torch.arange(10.0).flip(0).requires_grad_()  # gaps of 1, every one in the wrong order
    for strength, silent in ((0.99, True), (1.01, False)):
        ranks = common.soft_rank(reverse, strength)
        loss = 0.5 * (ranks - torch.arange(1.0, 11)).square().sum()
        grad = torch.autograd.grad(loss, reverse)[0]
        assert (grad == 0).all() == silent
    torch.manual_seed(0)
    x = torch.randn(5, 1000)
    for strength in (1e-9, 1e-12):
        assert torch.equal(common.soft_rank(x, strength), x.argsort(1).argsort(1) + 1.0)
    assert common.soft_rank(torch.tensor([3.0, 1.0, 3.0, 2.0]), 1e-9).tolist() == [3.5, 1, 3.5, 2]


def test_soft_rank_takes_any_shape_layout_and_dtype():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 6)
    rows = torch.stack([common.soft_rank(row) for row in x.view(-1, 6)]).view(x.shape)
    assert torch.equal(common.soft_rank(x), rows) and common.soft_rank(x[0, 0, 0]).shape == (6,)
    turned, repeated = x.transpose(1, 3), lambda x: x[:, :1, :1].expand(2, 3, 5, 6)
    assert torch.equal(common.soft_rank(turned), common.soft_rank(turned.contiguous()))
    assert torch.equal(common.soft_rank(repeated(x)), repeated(rows))
    columns, row = torch.randn(40, 3), torch.randn(40)  # as they lie, and as they are repeated
    for strength in (1.0, 100.0):
        alone = torch.stack([common.soft_rank(column, strength) for column in columns.T])
        assert torch.equal(common.soft_rank(columns.T, strength), alone)
        alone = common.soft_rank(row, strength).expand(3, 40)
        assert torch.equal(common.soft_rank(row.expand(3, 40), strength), alone)
        assert torch.equal(common.soft_rank(columns.T, strength, "descending"),
                           common.soft_rank(-columns.T.contiguous(), strength))
    for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.uint8):
        values = (4 * x).abs().to(dtype)
        assert torch.equal(common.soft_rank(values), common.soft_rank(values.float()))
    for shape in ((0, 5), (3, 0), (2, 0, 4)):
        empty = torch.zeros(shape, requires_grad=True)
        common.soft_rank(empty).sum().backward()
        assert empty.grad.shape == shape
    huge = torch.tensor([[1e30, -1e30, 0.0, 2e30, 5.0], [1.0, 2.0, 3.0, 1e30, -1e30]])
    assert common.soft_rank(huge, 0.5).tolist() == [[4, 1, 2, 5, 3], [2, 3, 4, 5, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e9, 1e15, 1e30])
@pytest.mark.parametrize("count", [3, 60])
def test_ties_and_neighbours_keep_their_ranks_however_large_others_are(dtype, size, count):
    same = torch.full((2, count), -size, dtype=dtype)  # what hides entries of a row
    assert torch.equal(common.soft_rank(same), torch.full_like(same, (count + 1) / 2))
    x = torch.randn(2, count, dtype=dtype)
    mixed = torch.cat([same, x, -same], 1).requires_grad_()
    ranks = common.soft_rank(mixed, 0.3)
    torch.testing.assert_close(ranks[:, :count], torch.full_like(same, (count + 1) / 2))
    alone = x.clone().requires_grad_()
    torch.testing.assert_close(ranks[:, count:-count], common.soft_rank(alone, 0.3) + count)
    ranks[:, count:-count].square().sum().backward()
    (common.soft_rank(alone, 0.3) + count).square().sum().backward()
    torch.testing.assert_close(mixed.grad[:, count:-count], alone.grad, atol=1e-3, rtol=0)  # of 400


def test_a_row_of_nan_stays_alone():
    x = torch.randn(3, 50)
    x[1, 7], x[2, :2] = float("nan"), 1e30
    ranks = common.soft_rank(x)
    assert torch.equal(ranks[[0, 2]], common.soft_rank(x[[0, 2]])) and ranks[2, 0] == 49.5
    x[2, :2] = float("inf")
    assert torch.equal(common.soft_rank(x)[[0, 2]], ranks[[0, 2]])


@pytest.mark.parametrize("strength", [1.0, 0.1, 1e-2, 1e-3, 1e-4])
def test_soft_rank_of_100_000_values_is_quick_and_small(strength):
    x = torch.distributions.Cauchy(0.0, 1.0).sample((1, 100_000)).requires_grad_()  # long chains
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    common.soft_rank(x, strength).sum().backward()
    assert time.thread_time() - began < 0.5  # 0.05 alone; rounds without the stack take 1 s
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kB
    assert grown < 200_000 and x.grad.isfinite().all()


def test_the_cuda_branch_gives_the_same_ranks_and_gradients(monkeypatch):
    torch.manual_seed(0)
    for shape in ((1, 1), (7, 10), (3, 64), (2, 3000), (1, 6000)):
        x = torch.randn(shape, dtype=torch.double, requires_grad=True)
        for strength in (1.0, 1e-3):
            results = []
            for on_cpu in (True, False):
                monkeypatch.setattr(torch.Tensor, "is_cpu", on_cpu)
                ranks = common.soft_rank(x, strength)
                results.append((ranks, torch.autograd.grad(ranks.square().sum(), x)[0]))
                monkeypatch.undo()
            for numpys, torchs in zip(*results):
                torch.testing.assert_close(numpys, torchs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arguments, name", [
    (([1.0],), "values"), ((torch.tensor(1.0),), "values"),
    ((torch.ones(2, dtype=torch.cfloat),), "values"),
    ((torch.ones(2), 0), "regularization_strength"),
    ((torch.ones(2), -1.0), "regularization_strength"),
    ((torch.ones(2), float("nan")), "regularization_strength"),
    ((torch.ones(2), "1"), "regularization_strength"),
    ((torch.ones(2), 1e-31), "regularization_strength"),
    ((torch.ones(2), 1e31), "regularization_strength"),
    ((torch.ones(2), 1.0, "up"), "direction")])
def test_soft_rank_names_the_bad_argument(arguments, name):
    with pytest.raises(ValueError, match=name):
        common.soft_rank(*arguments)


@pytest.mark.parametrize("strength", [1e-30, 1e30])
def test_ranks_and_gradients_are_finite_at_the_least_and_the_largest_strength(strength):
    for row in ([3.0, 1.0, 2.0, 1.0], [1e30, -1e30, 0.0, 1e30]):
        x = torch.tensor([row], requires_grad=True)
        ranks = common.soft_rank(x, strength)
        ranks.square().sum().backward()
        assert ranks.sum() == 10 and x.grad.isfinite().all()


def test_soft_rank_takes_any_real_number_as_strength():
    x = torch.randn(5, 8)
    torch.testing.assert_close(common.soft_rank(x, Fraction(1, 2)), common.soft_rank(x, 0.5))


def test_soft_rank_works_within_torch_compile():
    values = torch.randn(8, 10, requires_grad=True)
    loss = lambda values: common.soft_rank(2 * values, 0.5).square().sum()
    compiled = torch.compile(loss, backend="eager")  # traced, but no compiler is needed
    plain, traced = (torch.autograd.grad(f(values), values)[0] for f in (loss, compiled))
    assert torch.equal(plain, traced) and traced.abs().sum() > 0


def test_soft_rank_can_be_copied_alone_as_the_readme_says():
    names = "import math\nfrom numbers import Real\nimport numpy as np\nimport torch\n"
    names += "import torch.nn.functional as F\nfrom torch import Tensor\n"
    sections = (ROOT / "common.py").read_text().split("# " + 77 * "-")
    [section] = [s for s in sections if s.startswith("\n# Differentiable ranks.")]
    copied = {}
    exec(names + section, copied)
    for shape in ((4, 10), (2, 500)):  # by minmax, by pool
        values = torch.randn(shape, requires_grad=True)
        ranks = copied["soft_rank"](values)
        torch.testing.assert_close(ranks, common.soft_rank(values), atol=0, rtol=0)
        ranks.square().sum().backward()
    values = torch.tensor([[0.3, -1.2, 0.9]])  # the README's
    for strength, ranks in ((1, [2.2, 1, 2.8]), (0.1, [2, 1, 3]), (10, [2.03, 1.88, 2.09])):
        torch.testing.assert_close(common.soft_rank(values, strength), torch.tensor([ranks]) * 1.0)


def test_linear_probe_solves_softmax_regression_whatever_the_scale_of_the_features():
    torch.manual_seed(0)
    features, labels = torch.randn(200, 5), torch.randint(0, 3, (200,))
    features[range(200), labels] += 3
    targets = torch.nn.functional.one_hot(labels, 3).float()
    probe = common.linear_probe(features, targets)
    assert (probe(features).argmax(1) == labels).float().mean() > 0.9
    scaled = common.linear_probe(features * 1000 + 7, targets)
    tolerance = {"atol": 0.02, "rtol": 0.02}  # L-BFGS stops early
    torch.testing.assert_close(scaled(features * 1000 + 7), probe(features), **tolerance)
    halves = common.linear_probe(features, targets, 1e-3, scale=torch.full((5,), 0.5))
    strict = common.linear_probe(features, targets, 4e-3)  # half the size, four times the penalty
    torch.testing.assert_close(halves(features), strict(features), **tolerance)


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")

    def half(temporary):
        temporary.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        common.write_whole(path, half)
    assert path.read_text() == "old"


def test_random_keys_are_fixed_and_differ_by_every_name():
    assert common.random_key("arm", 3, 5) == 221683702
    names = [(arm, step, item) for arm in "ab" for step in range(10) for item in range(10)]
    keys = {common.random_key(*name) for name in names}
    assert len(keys) == 200


def test_report_gives_mean_and_sd_over_seeds_also_of_what_the_table_does_not_show(tmp_path, capsys):
    seed = lambda score, nats: [{"row": "a", "score": score}, {"row": "b", "nats": nats}]
    _, b = common.report([seed(0.5, 2.0), seed(0.7, 3.0)], tmp_path / "r.json", {}, time.time())
    printed = capsys.readouterr().out
    assert "0.600 ± 0.141" in printed and "nats" not in printed
    assert b["nats"] == 2.5 and b["nats_sd"] == pytest.approx(0.5**0.5)


def test_importing_common_prints_and_computes_nothing(capsys):
    import importlib

    importlib.reload(common)
    assert capsys.readouterr().out == ""
