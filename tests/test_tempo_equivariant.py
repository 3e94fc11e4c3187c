"""Properties of tempo_equivariant.py. Run from the project's folder: python -m pytest tests"""

import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import tempo_equivariant as tempo

RATE = 22050


def command(*args, **kwargs):
    """The command as a user types it, from another folder."""
    words = [sys.executable, str(ROOT / "tempo_equivariant.py"), *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, timeout=280, **kwargs)


def run(*args):
    """The same in this process: exit code and what is printed, without the seconds to start."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            tempo.main(tempo.parse_args([*map(str, args)]))
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=errors.getvalue())


# Loss


def test_loss_is_zero_where_z_scales_with_the_stretch_rate_and_known_elsewhere():
    a_i, a_j = torch.tensor([1.2]), torch.tensor([0.8])
    exact = tempo.tempo_ratio_loss(torch.tensor([3.0]), torch.tensor([2.0]), a_i, a_j)
    constant = tempo.tempo_ratio_loss(torch.ones(1), torch.ones(1), a_i, a_j)
    assert exact.item() == pytest.approx(0, abs=1e-6)
    assert constant.item() == pytest.approx((1 / 2 + 1 / 3) / 2, abs=1e-6)  # |1 - 3/2|, |1 - 2/3|


def test_loss_equals_a_loop_over_pairs_and_ignores_the_scale_sign_and_order():
    torch.manual_seed(0)
    z_i, z_j, a_i, a_j = torch.rand(4, 4) + 0.5
    one_way = lambda z, w, a, b: sum(abs(z[k] / w[k] - a[k] / b[k]) for k in range(4)) / 4
    slow = 0.5 * (one_way(z_i, z_j, a_i, a_j) + one_way(z_j, z_i, a_j, a_i))
    for same in ((z_i, z_j, a_i, a_j), (-7 * z_i, -7 * z_j, a_i, a_j), (z_j, z_i, a_j, a_i)):
        assert tempo.tempo_ratio_loss(*same).item() == pytest.approx(slow.item(), rel=1e-5)


def test_loss_refuses_shapes_that_would_broadcast_to_all_pairs():
    one, column = torch.ones(4), torch.ones(4, 1)
    for shapes in ((column, column, one, one), (one, column, one, one), 4 * (torch.tensor(1.0),)):
        named = re.escape(str([tuple(x.shape) for x in shapes]))
        with pytest.raises(ValueError, match=named):
            tempo.tempo_ratio_loss(*shapes)


def test_constant_z_costs_the_published_line_at_twenty_percent():
    torch.manual_seed(0)
    a_i, a_j = 0.8 + 0.4 * torch.rand(2, 1_000_000)
    loss = tempo.tempo_ratio_loss(torch.ones_like(a_i), torch.ones_like(a_i), a_i, a_j)
    assert loss.item() == pytest.approx(0.1355, abs=5e-4)  # five standard errors


def test_loss_gradient_is_finite_for_tiny_z():
    z_i, z_j = torch.full((2, 3), 1e-4, requires_grad=True)
    loss = tempo.tempo_ratio_loss(z_i, z_j, torch.ones(3), torch.full((3,), 1.2))
    grads = torch.autograd.grad(loss, (z_i, z_j))
    assert all(g.isfinite().all() for g in grads)


def difference_loss(z_i, z_j, a_i, a_j):
    return (z_i - z_j * a_i / a_j).abs().mean()


@pytest.mark.parametrize(
    "loss, collapses", [(tempo.tempo_ratio_loss, False), (difference_loss, True)]
)
def test_the_difference_loss_collapses_to_zero_and_the_ratio_loss_does_not(loss, collapses):
    torch.manual_seed(0)
    weight = torch.tensor([1.0, 1.0], requires_grad=True)  # z = weight . (tempo, constant)
    optimiser = torch.optim.Adam([weight], 0.02)
    for _ in range(600):
        bpm, (a_i, a_j) = 0.5 + torch.rand(32), 0.8 + 0.4 * torch.rand(2, 32)
        noise = 1 + 0.05 * torch.randn(2, 32)  # an estimate of tempo is never exact
        z_i, z_j = (weight[0] * bpm * a * n + weight[1] for a, n in zip((a_i, a_j), noise))
        optimiser.zero_grad()
        loss(z_i, z_j, a_i, a_j).backward()
        optimiser.step()
    size = weight.detach().abs()
    if collapses:
        assert size.max() < 0.1
    else:
        assert size[0] > 0.5 and size[1] < 0.2 * size[0]  # proportional to tempo; 1 at the start


# Views


def clicks(bpm, seconds=16.0):
    waveform, click = np.zeros(int(seconds * RATE)), np.hanning(200) * np.sin(np.arange(200) * 0.6)
    for at in np.arange(0, len(waveform) - 200, 60 / bpm * RATE).astype(int):
        waveform[at : at + 200] += click
    return torch.tensor(waveform).float()


def test_wsola_changes_tempo_by_the_rate_of_each_clip_and_neither_pitch_nor_onset_length():
    rates = torch.tensor([0.8, 1.0, 1.25])
    stretched = tempo.wsola(clicks(120).repeat(3, 1), rates, RATE, 8 * RATE)
    assert stretched.shape == (3, 8 * RATE)
    for waveform, rate in zip(stretched, rates):
        loud = (waveform.abs() > 0.3).nonzero()[:, 0]
        onsets = loud[torch.cat([torch.tensor([True]), loud.diff() > 2000])]
        assert (onsets.diff().median() / RATE - 0.5 / rate).abs() < 0.01  # seconds between clicks
        lengths = [((loud >= o) & (loud < o + 2000)).sum() for o in onsets[1:-1]]
        assert max(lengths) < 160  # none smeared
    sine = torch.sin(2 * math.pi * 440 * torch.arange(16 * RATE) / RATE).repeat(3, 1)
    spectrum = torch.fft.rfft(tempo.wsola(sine, rates, RATE, 8 * RATE)).abs()  # bins of 1/8 Hz
    assert (spectrum.argmax(1) / 8 - 440).abs().max() < 3


def test_wsola_at_rate_one_is_the_waveform_and_clips_do_not_mix():
    torch.manual_seed(0)
    waveform, rates = torch.randn(2, 4 * RATE), torch.tensor([1.0, 1.2])
    both = tempo.wsola(waveform, rates, RATE, 2 * RATE)
    alone = tempo.wsola(waveform[:1], rates[:1], RATE, 2 * RATE)
    torch.testing.assert_close(both[:1], alone)
    four = tempo.wsola(waveform, torch.tensor([1.2, 1.2, 1.0, 1.0]), RATE, 2 * RATE)
    torch.testing.assert_close(four[[2, 1]], both)  # view v is of clip v mod 2
    shift = (both[0, :100] @ waveform[0].unfold(0, 100, 1)[:2000].T).argmax()
    torch.testing.assert_close(both[0], waveform[0, shift : shift + 2 * RATE], atol=1e-5, rtol=0)


@pytest.mark.parametrize("encoder", [tempo.TCN, tempo.Periodicity])
def test_views_contain_nothing_from_outside_the_clip_at_any_rate(encoder):
    torch.manual_seed(0)
    waveform = 0.1 * torch.randn(4, round((4 * 1.41 + 0.2) * RATE))  # what training reads for 4 s
    rates = torch.tensor([0.71, 0.9, 1.2, 1.41]).repeat(2)
    sizes = (40, 50) if encoder is tempo.TCN else ()  # bands, frames per second
    x = encoder(RATE, 1024, 4.0, *sizes).views(waveform, rates)
    energy = x.double().mean(1)  # (8, T): noise has no quiet frame, padding would be one
    assert (energy.amin(1) > energy.mean(1) - 8 * energy.std(1)).all() and x.shape[0] == 8
    assert (energy[:, -5:].mean(1) / energy.mean(1) - 1).abs().max() < 0.35


# Model


class PublishedTCN(nn.Module):
    """The layers of the paper in their published order, written plainly."""

    def __init__(self, bands):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3)
        self.conv3 = nn.Conv2d(16, 16, (((bands - 2) // 3 - 2) // 3, 1))
        dilated = [nn.Conv1d(16, 16, 5, padding=2 * 2**i, dilation=2**i) for i in range(10)]
        block = lambda layer: nn.ModuleList([layer, nn.Conv1d(16, 16, 1), nn.Conv1d(16, 16, 1)])
        self.blocks = nn.ModuleList([block(layer) for layer in dilated])
        self.to_h, self.to_z = nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x):
        x = self.norm(x[:, None])
        x = F.max_pool2d(F.elu(self.conv1(x)), (3, 1))
        x = F.max_pool2d(F.elu(self.conv2(x)), (3, 1))
        x = F.elu(self.conv3(x))[:, :, 0]
        for dilated, mix, shortcut in self.blocks:
            x = shortcut(x) + mix(F.elu(dilated(x)))
        return self.to_z(F.elu(self.to_h(F.elu(x).mean(2))))[:, 0]


def same_tcn(bands):
    torch.manual_seed(0)
    fast, plain = tempo.TCN(RATE, 1024, 4.0, bands, 100), PublishedTCN(bands)
    with torch.no_grad():
        fast.norm.weight.fill_(1.3), fast.norm.bias.fill_(-0.2)
        for mine, theirs in zip(fast.parameters(), plain.parameters()):
            theirs.copy_(mine.reshape(theirs.shape))
    return fast, plain


def test_tcn_has_the_papers_parameters_and_300_class_model_too():
    tcn = tempo.TCN(RATE, 1024, 4.0, 81, 100)
    assert sum(p.numel() for p in tcn.parameters()) == 23235
    classifier = tempo.TempoClassifier(tcn, 16)
    assert sum(p.numel() for n, p in classifier.named_parameters() if "to_z" not in n) == 28318


def test_tcn_equals_the_published_order_of_layers_in_value_and_gradient():
    fast, plain = same_tcn(81)
    x = torch.randn(2, 81, 200)
    torch.testing.assert_close(fast(x), plain(x), atol=1e-5, rtol=1e-4)
    fast(x).sum().backward(), plain(x).sum().backward()
    for mine, theirs in zip(fast.parameters(), plain.parameters()):
        scale = theirs.grad.abs().max() + 1e-6
        difference = mine.grad.reshape(theirs.shape) - theirs.grad
        assert difference.abs().max() < 1e-3 * scale


def test_tcn_step_is_faster_than_the_published_order_in_two_passes(capsys):
    fast, plain = same_tcn(81)
    samples = 600000
    make_views = tempo.TCN(44100, 2048, samples / 44100, 81, 100).views
    theirs = torchaudio.transforms.MelSpectrogram(44100, 2048, hop_length=441, n_mels=81, f_min=30,
                                                  f_max=17000, power=1.0)
    waveform, rate = 0.1 * torch.randn(8, 18 * 44100), torch.linspace(0.8, 1.25, 16)
    x, ratios = torch.randn(16, 81, 1361), []  # 8 pairs at the paper's input
    for _ in range(4):  # interleaved
        times = [time.perf_counter()]
        torch.cat([plain(x[:8]), plain(x[8:])]).square().sum().backward()
        times.append(time.perf_counter())
        for rates in rate.chunk(2):
            plain_views = theirs(tempo.wsola(waveform, rates, 44100, samples)).add(1e-7).log()
        times.append(time.perf_counter())
        fast(x).square().sum().backward()
        times.append(time.perf_counter())
        views = make_views(waveform, rate)
        times.append(time.perf_counter())
        torch.testing.assert_close(views[8:], plain_views, atol=1e-3, rtol=0)
        layers, with_views, ours, our_views = np.diff(times)
        ratios.append([layers / ours, (layers + our_views) / (ours + our_views),
                       (layers + with_views) / (ours + our_views)])
    layers, whole, against_torchaudio = np.median(ratios, axis=0)
    with capsys.disabled():
        print(f"\n[TCN step, published order / ours = {layers:.1f}; with our views in both "
              f"{whole:.1f}, with torchaudio's in theirs {against_torchaudio:.1f}]", end=" ")
    assert layers > 1.6 and whole > 1.4  # 3 and 2.1 on two quiet cores, less on busy ones


def test_z_of_the_tcn_is_the_tempo_of_clicks_whose_rate_alone_a_stretch_changes(tmp_path, capsys):
    rng, clips = np.random.default_rng(0), []
    for number, bpm in enumerate(rng.uniform(120, 360, 64)):
        waveform, click = 1e-3 * rng.standard_normal(7 * RATE), rng.standard_normal(RATE // 100)
        for at in np.arange(rng.random() * 60 / bpm, 6.9, 60 / bpm):
            waveform[int(at * RATE) :][: len(click)] += click
        clips.append(tempo.Clip(str(tmp_path / f"{number}.wav"), 7.0, bpm, str(number)))
        soundfile.write(clips[-1].path, 0.2 * waveform, RATE)
    torch.manual_seed(0)
    model = tempo.make_encoder("tcn", RATE, 1024, 4.0, 20, 25)
    arguments = {"out": tmp_path, "data": None, "resume": False, "batch_size": 8, "workers": 0}
    state = tempo.open_run(arguments, "test")

    def spread():
        """Of ln(z / BPM) over clicks at tempi that are not trained on: 0 if z is the tempo."""
        h, _ = tempo.embed(model, [clip.path for clip in clips[32:]], 0)
        z = model.pseudo_tempo(h).detach().numpy()
        return np.log(z / [clip.bpm for clip in clips[32:]]).std()

    random = spread()
    tempo.train("clicks", model, clips[:32], steps=100, batch_size=8, lr=2e-3, max_stretch=1.41,
                workers=0, state=state)
    trained = spread()
    with capsys.disabled():
        print(f"\n[clicks: sd of ln(z / BPM) {trained:.3f}, untrained {random:.3f}, constant z "
              f"{np.log([clip.bpm for clip in clips[32:]]).std():.3f}]", end=" ")
    assert trained < 0.1 < random


def random_periodicity():
    torch.manual_seed(0)
    return tempo.make_encoder("periodicity", RATE, 1024, 4.0, 20, 25).eval()


def test_periodicity_hears_a_stretch_as_a_shift_of_its_logits():
    model = random_periodicity()
    with torch.no_grad():
        h = model.embed(model.views(torch.stack([clicks(100), clicks(100 * 2**0.25)])))
    a, b = F.normalize(h[0, 20:70] - h[0].mean(), dim=0), h[1]
    score = [F.cosine_similarity(a, b[20 + s : 70 + s] - b.mean(), dim=0) for s in range(-12, 13)]
    assert int(np.argmax(score)) - 12 == 6  # a quarter of an octave is six bins


def test_calibration_gives_the_tempo_of_clicks_up_to_the_stated_octave():
    model, bpm = random_periodicity(), [90, 110, 130, 150]
    with torch.no_grad():
        model.to_h.weight.zero_()[:, :, 60] = 1  # each bin of h answers to twice its tempo
        h = torch.cat([model.embed(model.views(clicks(b)[None])) for b in bpm])
    estimates, second, confidence = tempo.label_free_tempi(
        model, h, torch.arange(4), tempo.calibrate(model, h)
    )
    assert tempo.accuracies(estimates, bpm)["accuracy2"] == 1
    assert 2**-0.5 <= np.median(estimates) / tempo.PRIOR_BPM <= 2**0.5
    assert (np.abs(np.log2(second / estimates)) > 0.25).all() and (confidence <= 1).all()


def test_head_is_scored_on_songs_that_it_was_not_fitted_to():
    """h that names its clip and nothing else: perfect on what was fitted, chance on the rest."""
    bpm, folds = np.repeat([60.0, 90, 120, 150], 5), np.tile(range(5), 4)
    tempi = tempo.head_tempi(torch.eye(20), torch.arange(20), bpm, folds)
    assert (tempi == bpm).mean() <= 0.4 and not np.isnan(tempi).any()
    informed = F.one_hot(torch.tensor(bpm / 30).long(), 8).float()
    one_fold = tempo.head_tempi(informed, torch.arange(20), bpm, folds, [2])
    assert (one_fold[folds == 2] == bpm[folds == 2]).all() and np.isnan(one_fold[folds != 2]).all()


# Scores and annotations


def test_accuracies_accept_their_edges_and_octaves():
    score = lambda *estimates: tuple(tempo.accuracies(estimates, [120] * len(estimates)).values())
    assert score(115.2, 124.8) == (1, 1, 2) and score(60, 240, 360, 40) == (0, 1, 4)
    assert score(115.1, 124.9, 80, 180) == (0, 0, 4) and score(120, math.nan) == (1, 1, 1)


VALUE = {"namespace": "tempo", "sandbox": None, "data": [{"value": 88}]}
BEATS = {"namespace": "beat", "sandbox": {"annotation_type": "beat"},
         "data": [{"time": 0.5 * k} for k in range(9)]}


@pytest.mark.parametrize("name, text, bpm", [
    ("annotations_v2/tempo/blues.00000.LOFI.bpm", "127.0\n", 127),
    ("tempo/gtzan_blues_00000.bpm", "99.5 1", 99.5),
    ("blues.00000.bpm", "127,5", 127.5),
    ("jams/blues.00000.wav.jams", json.dumps({"annotations": [VALUE]}), 88),
    ("jams/blues.00000.jams", json.dumps({"annotations": [BEATS]}), 120),
    ("jams/blues.00000.jams", json.dumps({"annotations": [BEATS, VALUE]}), 88),
    ("jams/blues.00000.jams", json.dumps({"annotations": [VALUE | {"data": []}, BEATS]}), 120),
    ("here/table.csv", "file,bpm\n../blues/blues.00000.wav,65\n", 65),
    ("beats/gtzan_blues_00000.beats", "0.0\t1\n0.4\t2\n0.8\t3\n", 150),
    ("genres_tempos.mf", "/x/blues.00000.au\t77\n", 77),
    ("genres_tempos.mf", "/x/blues.00000.clip.wav\t\t93.500\n", 93.5),
    ("index.json", json.dumps([{"audio_filepath": "g/blues.00000.wav", "tempo": 125.0}]), 125),
    ("tempo.csv", "file,bpm,song\nblues/blues.00000.wav,66,one\nblues/b.wav,,\nno.wav,9,\n", 66),
    ("tempo.csv", "file;bpm\nblues.00000.wav;68,5\n", 68.5),
    ("tempo.csv", "File, BPM\nblues.00000.wav, 68\n", 68),
    ("tempo.csv", "\nfile,bpm\nblues.00000.wav,90\n", 90),
    ("tempo.tsv", "file\tbpm\ta, b, c\nblues.00000.wav\t69\n", 69),
    ("tempo.tsv", "file\tbpm\nblues.00000.wav\t67\n", 67)])
def test_every_annotation_format_gives_the_tempo_of_its_track(tmp_path, name, text, bpm):
    audio = tmp_path / "blues" / "blues.00000.wav"
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / name).write_text(text, encoding)
        truth = tempo.find_truth(tmp_path, [audio])
        assert list(truth) == [audio] and truth[audio][0] == pytest.approx(bpm)


def test_the_better_kind_of_annotation_wins_and_the_line_counts_what_did_not_fit(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("file,bpm\nx.wav,50\nmissing.wav,90\nx.wav,none\n")
    assert tempo.find_truth(tmp_path, [tmp_path / "x.wav"])[tmp_path / "x.wav"][0] == 50
    line = "a.csv: 1 of 1 files have a tempo; 1 annotations fit no file or several, 1 hold no t"
    assert line in capsys.readouterr().out
    (tmp_path / "x.bpm").write_text("60")
    (tmp_path / "broken.jams").write_text("{")
    assert tempo.find_truth(tmp_path, [tmp_path / "x.wav"])[tmp_path / "x.wav"][0] == 60


def test_annotations_that_fit_nothing_are_named_and_links_are_followed(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "truth").mkdir()
    audio = [tmp_path / "data" / "x.wav", tmp_path / "data" / "y.wav"]
    (tmp_path / "truth" / "a.csv").write_text("file,bpm,song\nx.wav,50,one\ny.wav,,one\n")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "truth")
    truth = tempo.find_truth(tmp_path / "data", audio)
    assert truth[audio[0]] == (50, "one")
    assert math.isnan(truth[audio[1]][0]) and truth[audio[1]][1] == "one"  # a song without a number
    (tmp_path / "truth" / "a.csv").write_text("file,bpm\nz.wav,50\n")
    assert not tempo.find_truth(tmp_path / "data", audio)
    assert "a.csv: 0 of 2 files have a tempo; 1 annotations fit no file" in capsys.readouterr().out


def test_annotations_of_files_of_one_name_go_by_their_folders(tmp_path):
    for name, bpm in (("a", 90), ("b", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "01.bpm").write_text(str(bpm))
    audio = [tmp_path / "a" / "01.wav", tmp_path / "b" / "01.wav"]
    assert [tempo.find_truth(tmp_path, audio)[path][0] for path in audio] == [90, 100]
    for unusable in (audio[1:], []):  # a namesake's annotation is not taken for one's own
        assert tempo.find_truth(tmp_path, audio[:1], unusable)[audio[0]][0] == 90
    (tmp_path / "a" / "01.bpm").unlink()
    assert audio[0] not in tempo.find_truth(tmp_path, audio[:1], audio[1:])
    (tmp_path / "b" / "01.bpm").unlink()
    (tmp_path / "tempo.csv").write_text("file,bpm\na/01.wav,90\nb/01.wav,100\n")
    assert tempo.find_truth(tmp_path, audio[:1])[audio[0]][0] == 90


def test_a_song_keeps_its_name_whatever_else_is_said_of_a_track(tmp_path):
    (tmp_path / "a.csv").write_text("file,bpm,song\nx.wav,50,one\ny.wav,51,one \n")
    (tmp_path / "b.csv").write_text("file,bpm\nx.wav,52\n")
    audio = [tmp_path / "x.wav", tmp_path / "y.wav"]
    assert tempo.find_truth(tmp_path, audio) == {audio[0]: (52, "one"), audio[1]: (51, "one")}


def test_songs_are_named_alike_however_the_folder_is_spelt(tmp_path, monkeypatch):
    monkeypatch.setattr(tempo, "scan_audio", lambda paths, *_: dict.fromkeys(paths, 30.0))
    (tmp_path / "data").mkdir()
    for name in "abcdef":
        (tmp_path / "data" / f"{name}.wav").touch()
    (tmp_path / "data" / "tempo.csv").write_text("file,bpm,song\na.wav,90,x\nb.wav,91,x\n")
    monkeypatch.chdir(tmp_path)
    spelt = [tempo.load_clips(Path(folder), 8000, 1, 0) for folder in ("data", tmp_path / "data")]
    songs = [[clip.song for clip in clips] for clips in spelt]
    assert songs[0] == songs[1] == ["x", "x", "c.wav", "d.wav", "e.wav", "f.wav"]


def test_a_run_is_known_by_the_songs_of_its_folder_too(tmp_path, monkeypatch):
    for k in range(12):
        soundfile.write(tmp_path / f"{k:02d}.wav", np.sin(np.arange(30000)), 8000)
    seen = []

    def save_first(state, found):
        """Keeps what a run is known by, and stops it."""
        seen.append(found)
        raise SystemExit

    monkeypatch.setattr(tempo, "save_first", save_first)
    for songs in ([*range(12)], [*range(12)], [1, *range(1, 12)]):
        lines = [f"{k:02d}.wav,{60 + k},song{song}" for k, song in enumerate(songs)]
        (tmp_path / "tempo.csv").write_text("\n".join(["file,bpm,song", *lines]))
        run("--data", tmp_path, "--out", tmp_path / "out", "--view-seconds", 2)
    assert seen[0] == seen[1] != seen[2]


def test_the_monitor_tells_tempo_from_stretch_and_counts_only_known_tracks():
    torch.manual_seed(0)
    rate, tracks = 2 ** torch.empty(20, 16).uniform_(-0.5, 0.5), torch.empty(20, 16)
    bpm = rate * tracks.uniform_(60, 180)
    bpm[:, 3] = math.nan
    correlation = lambda z: float(tempo.describe(list(zip(z, rate, bpm))).split()[-1])
    noise = torch.empty(20, 16).uniform_(0.99, 1.01)
    assert abs(correlation(rate * noise)) < 0.2 and correlation(rate * tracks) > 0.99


def test_every_fold_has_songs_with_a_tempo_where_few_have_one():
    bpm = np.where(np.arange(200) % 20 == 0, 100.0, math.nan)
    clips = [tempo.Clip("", 0, value, f"song{k}") for k, value in enumerate(bpm)]
    for seed in range(20):
        assert np.bincount(tempo.song_folds(clips, seed)[bpm > 0]).tolist() == [2] * 5


def test_the_autocorrelation_answers_for_a_sound_without_onsets_and_so_counts_as_wrong(tmp_path):
    soundfile.write(tmp_path / "dc.wav", np.full(16 * RATE, 0.5), RATE)
    assert np.isfinite(tempo.autocorrelation_tempo(str(tmp_path / "dc.wav"), RATE, 1024))


def test_the_second_candidate_is_another_peak_and_not_the_slope_of_the_first():
    bump = lambda bpm, width: torch.exp(-0.5 * (torch.log2(tempo.BPM_AXIS / bpm) / width) ** 2)
    _, second, _ = tempo.pick_tempo((bump(120, 0.2) + 0.1 * bump(240, 0.05))[None])
    assert abs(second[0] / 240 - 1) < 0.04


def test_folds_keep_the_excerpts_of_a_song_together_and_are_even():
    clips = [tempo.Clip("", 0, 100.0, f"song{k // 3}") for k in range(90)]
    folds = tempo.song_folds(clips, seed=0)
    assert all(len(set(folds[k : k + 3])) == 1 for k in range(0, 90, 3))
    assert np.bincount(folds).tolist() == [18] * 5


def test_a_generated_track_has_its_tempo_and_is_the_same_every_time(tmp_path):
    hits = []
    for number in range(10):
        line = tempo.write_track(number, tmp_path, RATE)
        name, bpm = line.split(",")
        hits.append((tempo.autocorrelation_tempo(tmp_path / name, RATE, 1024), float(bpm)))
    assert tempo.accuracies(*zip(*hits))["accuracy2"] >= 0.7  # chance is 0.2
    before = (tmp_path / "track0003.wav").read_bytes()
    tempo.write_track(3, tmp_path, 2 * RATE)
    tempo.write_track(3, tmp_path, RATE)  # whatever was there
    assert before == (tmp_path / "track0003.wav").read_bytes()


def test_notes_that_began_before_a_generated_track_ring_on_in_it(monkeypatch):
    hiss = np.random.default_rng(0).standard_normal(RATE)  # of 1 s, in place of every sound
    monkeypatch.setattr(tempo, "drum", lambda *_: hiss)
    monkeypatch.setattr(tempo, "instrument", lambda *_: lambda *chord: hiss)
    tracks = [tempo.make_track(180, 4.0, np.random.default_rng(n), RATE) for n in range(12)]
    beginnings = [track[:2000].std() / track.std() for track in tracks]
    assert np.median(beginnings) > 0.8  # as loud as later; 0.43 where they begin with the clip


def test_the_windows_of_a_file_leave_no_sample_out_whatever_its_length(tmp_path):
    size = round(tempo.WINDOW_SECONDS * RATE)
    for samples in (size - 9, size, size + 1, size + size // 5, 2 * size - 1, 5 * size + 7):
        ramp = (np.arange(samples) / 2**24).astype("float32")  # every sample is another
        soundfile.write(tmp_path / "x.wav", ramp, RATE, subtype="FLOAT")
        windows = tempo.load_windows(tmp_path / "x.wav", RATE)
        assert windows.shape[1] == min(size, samples) and len(windows) <= 1 + 2 * samples / size
        assert len(windows.unique()) == samples


def test_embedding_many_files_keeps_no_more_than_a_batch_of_them_in_memory(monkeypatch):
    refs, alive = [], []

    def load(path, **_):
        """Noise in place of a file, and how many of these are still held by somebody."""
        windows = torch.randn(3, 11025)
        refs.append(weakref.ref(windows))
        alive.append(sum(ref() is not None for ref in refs))
        return windows

    monkeypatch.setattr(tempo, "load_windows", load)
    model = tempo.Periodicity(11025, 512, 1.0)
    h, clip = tempo.embed(model, ["file"] * 60, 0)
    assert h.shape == (180, 97) and clip.tolist() == [i // 3 for i in range(180)]
    assert len(alive) == 60 and max(alive) <= 12  # 32 windows are of eleven files, and the next


def test_embedding_is_that_of_each_window_whatever_files_stand_beside_it(monkeypatch):
    torch.manual_seed(0)
    shapes = (3, 9000), (40, 11025), (1, 8000), (2, 8000)  # windows, samples
    files = [torch.randn(shape) for shape in shapes]
    monkeypatch.setattr(tempo, "load_windows", lambda number, **_: files[number])
    model = tempo.Periodicity(11025, 512, 1.0)
    h, clip = tempo.embed(model, range(4), 0)
    alone = torch.cat([model.embed(model.views(windows)) for windows in files])
    torch.testing.assert_close(h, alone.detach(), atol=1e-4, rtol=0)
    assert clip.bincount().tolist() == [3, 40, 1, 2]


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve songs with truth, and every kind of file that a user may have by mistake."""
    folder = tmp_path_factory.mktemp("music")
    lines = ["file,bpm"] + [tempo.write_track(number, folder, RATE) for number in range(12)]
    lines[-1:] = ["track0011.wav,fast", "eight.wav,1e300", "missing.wav,100"]
    (folder / "tempo.csv").write_text("\n".join(lines))
    (folder / "text.wav").write_text("not audio")
    (folder / "zero.wav").write_bytes(b"")
    soundfile.write(folder / "short.wav", np.sin(np.arange(2205)), RATE)
    soundfile.write(folder / "silent.wav", np.zeros(16 * RATE), RATE)
    soundfile.write(folder / "nan.wav", np.full(16 * RATE, np.nan), RATE, subtype="FLOAT")
    tracks = [soundfile.read(folder / f"track{n:04d}.wav")[0] for n in range(3)]
    fast = np.interp(np.arange(16 * 96000) / 96000, np.arange(16 * RATE) / RATE, tracks[0])
    soundfile.write(folder / "stereo.wav", np.stack([fast, fast], 1), 96000)
    soundfile.write(folder / "eight.wav", tracks[1], RATE, subtype="PCM_U8")
    soundfile.write(folder / "song.mp3", tracks[2], RATE)
    return folder


SMALL = ("--encoders", "periodicity", "--steps", 6, "--batch-size", 4, "--view-seconds", 4,
         "--left-out-folds", 1)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return command("--data", folder, "--out", out, *SMALL), out


def test_a_run_names_bad_files_goes_on_and_writes_its_results(finished):
    result, out = finished
    assert result.returncode == 0 and result.stderr == ""
    for words in ("text.wav", "zero.wav", "short.wav: 0.10 s", "silent.wav: silent", "nan.wav: NaN",
                  "15 of 20 files", "11 of 15 files", "1 annotations fit no file",
                  "2 hold no tempo"):
        assert words in result.stdout
    begun = result.stdout.count("model  ")
    assert f"0 s left of arm {begun}/{begun}" in result.stdout  # as many arms as planned
    rows = json.loads((out / "results.json").read_text())["rows"]
    names = [r["row"] for r in rows]
    assert names[:2] == ["best constant, 5 folds", "autocorrelation of the onset strength"]
    for kind in ("random", "SSL"):
        assert any(f"{kind} label-free, songs left out" in name for name in names)
    assert all(0 <= r["accuracy1"] <= r["accuracy2"] <= 1 and 0 < r["clips"] <= 11 for r in rows)
    assert (out / "tempo.png").stat().st_size > 10000


def test_the_fine_tuned_row_goes_on_from_the_ssl_weights_with_labels_of_other_folds(folder):
    clips = [clip for clip in tempo.load_clips(folder, RATE, 6.0, 0) if not math.isnan(clip.bpm)]
    folds, heard = tempo.song_folds(clips, 0), {}

    def train_arm(arm, model, part):
        encoder = getattr(model, "encoder", model)
        heard[arm] = encoder.to_h.bias[0].item(), part
        nn.init.constant_(encoder.to_h.bias, 5.0 if "SSL" in arm else 9.0)

    build = lambda *_: tempo.TCN(RATE, 1024, 4.0, 20, 25)
    rows, _ = tempo.compare("tcn", 0, clips, build, train_arm, {}, [-1, 0], True, 0)
    begin, part = heard["tcn seed 0 fine-tuned"]
    assert begin == 5.0 != heard["tcn seed 0 supervised"][0]
    assert part == [clip for clip, fold in zip(clips, folds) if fold != 0]
    scored = ~np.isnan(rows["tcn, SSL encoder (all songs), fine-tuned + head, fold 0"])
    assert (scored == (folds == 0)).all()


def test_a_head_begins_with_the_same_weights_whatever_was_drawn_before(folder):
    clips = [clip for clip in tempo.load_clips(folder, RATE, 6.0, 0) if not math.isnan(clip.bpm)]
    heads = []

    def train_arm(arm, model, part):
        """An arm that draws, as one does that is trained, or does not, as one that is resumed."""
        torch.rand(draws)
        if isinstance(model, tempo.TempoClassifier):
            heads.append(model.head.weight.detach().clone())

    for draws in (0, 3):
        torch.manual_seed(draws)
        build = lambda *_: tempo.TCN(RATE, 1024, 4.0, 20, 25)
        tempo.compare("tcn", 0, clips, build, train_arm, {}, [0], True, 0)
    assert len(heads) == 4 and all(torch.equal(head, heads[0]) for head in heads)


def test_the_head_hears_a_tempo_that_is_all_that_h_says():
    rng = np.random.default_rng(0)
    bpm, folds = np.exp(rng.normal(math.log(115), 0.28, 400)), np.arange(400) % 5
    turned = torch.tensor(rng.normal(size=(2, 16))).float()
    h = F.elu(torch.tensor(bpm[:, None] / 30 - 4).float() * turned[0] + turned[1])
    found = tempo.head_tempi(h, torch.arange(400), bpm, folds)
    assert tempo.accuracies(found, bpm)["accuracy1"] > 0.75  # 0.52 at ten times the weight decay


def test_predict_prints_a_line_for_each_file_of_any_format_and_skips_the_others(finished, folder):
    names = ["stereo.wav", "eight.wav", "song.mp3", "zero.wav"]
    result = run("--out", finished[1], "--predict", *[folder / name for name in names])
    assert result.returncode == 0 and result.stdout.count(" BPM, or ") == 3
    assert "skip" in result.stdout and "zero.wav" in result.stdout
    assert run("--out", finished[1], "--predict", folder / "zero.wav").returncode == 2


def test_the_readmes_lines_of_python_hear_the_tempo_that_predict_prints(finished, folder):
    text = (ROOT / "README.md").read_text()
    code = next(part for part in text.split("```") if "import tempo_equivariant" in part)
    code = code.removeprefix("python").replace("song.mp3", str(folder / "song.mp3"))
    found = {}
    exec(code.replace("out/tempo_equivariant", str(finished[1])), found)
    printed = run("--predict", folder / "song.mp3", "--out", finished[1]).stdout
    assert f"{found['bpm'][0]:.1f} BPM, or {found['second'][0]:.0f} BPM" in printed


def test_predict_answers_by_our_encoder_where_both_were_trained(finished, folder, tmp_path):
    state = torch.load(finished[1] / "checkpoint.pt")
    state["kept"] = {"tcn": {"arm": "the paper's"}, **state["kept"]}
    torch.save(state, tmp_path / "checkpoint.pt")
    result = run("--predict", folder / "song.mp3", "--out", tmp_path)
    assert "model  periodicity seed 0 SSL" in result.stdout and " BPM, or " in result.stdout


def test_predict_without_files_scores_a_folder(finished, folder):
    result = run("--out", finished[1], "--predict", "--data", folder)
    assert result.returncode == 0 and "result accuracy1 0." in result.stdout.splitlines()[-1]


@pytest.mark.parametrize("args", [
    ("--data", "nowhere"), ("--data", "{empty}"), ("--data", "{text}"), ("--steps", "0"),
    ("--encoders", "lstm"), ("--lr", "inf"), ("--view-seconds", "0.1"), ("--device", "tpu"),
    ("--predict",), ("--workers", "-1"),
    ("--predict", "x.wav", "--out", "{empty}"), ("--step", "3"), ("--data", "{music}/tempo.csv"),
    ("--data", "{music}", "--out", "{text}/results"), ("--resume", "--out", "{text}")])
def test_what_a_user_can_do_wrong_ends_in_one_line_and_exit_code_2(tmp_path, folder, args, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no audio")
    (tmp_path / "text" / "results").write_text("a file, not a folder")
    (tmp_path / "text" / "checkpoint.pt").write_text("not a checkpoint")
    places = {"empty": tmp_path / "empty", "text": tmp_path / "text", "music": folder}
    with pytest.raises(SystemExit) as end:
        args = ["--out", str(tmp_path / "out"), *[arg.format(**places) for arg in args]]
        tempo.main(tempo.parse_args(args))
    errors = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(errors) == 1


def arms(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["arms"]


def test_a_run_killed_then_stopped_resumes_to_the_weights_of_an_unbroken_one(
    finished, folder, tmp_path
):
    start, resume = ("--data", folder, *SMALL), ("--resume", "--workers", 0)
    for how, wanted, args in ((signal.SIGKILL, "supervised 1/6", start),
                              (signal.SIGINT, "SSL all songs 1/6", resume)):
        words = [sys.executable, ROOT / "tempo_equivariant.py", "--out", tmp_path, *args]
        process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True)
        next(line for line in process.stdout if wanted in line)
        process.send_signal(how)
        process.stdout.read()
        assert process.wait() != 0
    running = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["running"]
    assert 0 < running["step"] < 6  # Ctrl-C saved the step it fell into
    result = command(*resume, "--out", tmp_path)  # its other arguments are in the file
    assert result.returncode == 0 and "supervised 1/6" not in result.stdout  # on, not back
    assert f"SSL all songs {running['step'] + 1}/6" in result.stdout
    assert "0 s left of arm 4/4" in result.stdout  # those before the kill count
    for arm, weights in arms(finished[1]).items():
        assert all(torch.equal(weights[name], arms(tmp_path)[arm][name]) for name in weights), arm


def test_a_folder_without_truth_trains_says_what_to_fetch_and_predicts(folder, tmp_path):
    (tmp_path / "music").mkdir()
    for number in range(3):
        (tmp_path / "music" / f"{number}.wav").symlink_to(folder / f"track{number:04d}.wav")
    result = run("--data", tmp_path / "music", "--out", tmp_path, *SMALL)
    assert result.returncode == 0 and result.stderr == ""
    assert "gtzan_tempo_beat" in result.stdout and "p50" in result.stdout
    assert run("--out", tmp_path, "--predict", folder / "track0000.wav").returncode == 0


def test_torchrun_trains_on_two_processes_and_prints_once(folder, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               ROOT / "tempo_equivariant.py", "--data", folder, "--out", tmp_path, *SMALL,
               "--encoders", "tcn", "--steps", 2]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0 and result.stderr == "", result.stderr[-2000:]
    assert result.stdout.count("autocorrelation of the onset strength") == 1
    assert (tmp_path / "results.json").exists()


def test_a_checkpoint_of_something_else_is_refused_in_one_line(tmp_path):
    torch.save({"arms": {}}, tmp_path / "checkpoint.pt")
    for args in (("--resume",), ("--predict", "x.wav")):
        result = run("--out", tmp_path, *args)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert "not a checkpoint of" in result.stderr


def test_importing_the_script_trains_nothing(tmp_path):
    command = [sys.executable, "-c", "import tempo_equivariant"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0 and result.stdout == "" and not list(tmp_path.iterdir())
