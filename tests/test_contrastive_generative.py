"""Properties of contrastive_generative.py. Run from the project's folder: python -m pytest tests"""

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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import contrastive_generative as script

SMALL = ("--steps", 4, "--batch-size", 8, "--sequences", 4, "--codes", 16, "--folds", 1)


def command(*args, start=(sys.executable,), **kwargs):
    """The command as a user types it, from another folder."""
    words = [*start, ROOT / "contrastive_generative.py", *args]
    return subprocess.run(
        [*map(str, words)], capture_output=True, text=True, timeout=250, **kwargs
    )


def run(*args):
    """The same in this process: exit code and what is printed, without the seconds to start."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            script.main(script.parse_args([*map(str, args)]))
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=errors.getvalue())


# Loss


def test_nt_xent_equals_the_double_sum_of_eq_1():
    z1, z2 = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    z, total = [*z1, *z2], 0.0
    s = [[F.cosine_similarity(a, b, dim=0).item() / 0.2 for b in z] for a in z]
    for i in range(10):
        total -= math.log(
            math.exp(s[i][(i + 5) % 10]) / sum(math.exp(s[i][k]) for k in range(10) if k != i)
        )
    assert script.nt_xent(z1, z2, 0.2).item() == pytest.approx(total / 10, rel=1e-5)


def test_nt_xent_of_equal_and_of_perfect_embeddings():
    assert script.nt_xent(*torch.ones(2, 256, 8), 0.2).item() == pytest.approx(
        math.log(511), rel=1e-5
    )
    perfect = math.log(1 + 14 * math.exp(-1 / 0.2))  # pairs equal, all else orthogonal, N = 8
    assert script.nt_xent(torch.eye(8), 3 * torch.eye(8), 0.2).item() == pytest.approx(
        perfect, rel=1e-4
    )


@pytest.mark.parametrize("shapes", [((4, 3), (5, 3)), ((1, 3), (1, 3)), ((4,), (4,))])
def test_nt_xent_refuses_what_it_cannot_pair(shapes):
    with pytest.raises(ValueError):
        script.nt_xent(torch.ones(shapes[0]), torch.ones(shapes[1]), 0.2)


def test_two_ranks_have_the_loss_and_the_gradient_of_one_with_all_clips(tmp_path):
    torch.manual_seed(0)
    x, layer = torch.randn(2, 8, 6), torch.nn.Linear(6, 4)
    loss = script.nt_xent(*layer(x.flatten(0, 1)).chunk(2), 0.2)
    loss.backward()
    torch.save((x, layer.state_dict()), tmp_path / "in.pt")
    (tmp_path / "rank.py").write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, contrastive_generative as script, torch.distributed as dist
dist.init_process_group("gloo")
x, weights = torch.load("in.pt")
layer = torch.nn.Linear(6, 4); layer.load_state_dict(weights)
part = x[:, 4 * dist.get_rank() :][:, :4].flatten(0, 1)
parallel = torch.nn.parallel.DistributedDataParallel(layer)
loss = script.nt_xent(*parallel(part).chunk(2), 0.2)
loss.backward()
torch.save((loss.detach(), layer.weight.grad), f"out{{dist.get_rank()}}.pt")
script.end_run("out", "nothing", 0.0)
""")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "rank.py",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for rank in (0, 1):
        theirs, gradient = torch.load(tmp_path / f"out{rank}.pt")
        torch.testing.assert_close(theirs, loss.detach())
        torch.testing.assert_close(gradient, layer.weight.grad)


# Model, views, scores


def test_k_means_finds_separate_clusters_and_moves_an_unused_entry_to_a_vector():
    torch.manual_seed(0)
    centres = 20 * torch.randn(12, 5)
    vectors = centres.repeat(50, 1) + torch.randn(600, 5)
    found = script.k_means(vectors, 12, restarts=3)
    assert (torch.cdist(centres, found).min(1).values < 1).all()  # noise of a mean of 50: 0.3
    few = 10 + torch.randn(3, 2)
    assert (
        torch.cdist(script.k_means(few.repeat(40, 1), 8, restarts=1), few).min(1).values.max()
        < 1e-3
    )  # no stray entry


def test_more_restarts_never_have_more_inertia():
    vectors, inertia = torch.randn(400, 3, generator=torch.Generator().manual_seed(1)), []
    for restarts in (1, 5):
        torch.manual_seed(0)
        inertia.append(
            torch.cdist(vectors, script.k_means(vectors, 20, restarts)).min(1).values.square().sum()
        )
    assert inertia[1] <= inertia[0]


def test_the_transformer_does_not_see_the_code_that_it_predicts_nor_later_ones():
    model = script.CodeModel(16, 10, 2, 32, 4).eval()
    codes = torch.randint(16, (1, 10), generator=torch.Generator().manual_seed(0))
    other = codes.clone()
    other[0, 5:] = (codes[0, 5:] + 1) % 16
    assert torch.equal(model(codes)[:, :6], model(other)[:, :6])
    assert not torch.allclose(model(codes)[:, 6], model(other)[:, 6])


def test_a_view_without_families_is_a_crop_and_each_family_alters_it():
    front, clip = script.FrontEnd(320), torch.randn(3, script.SAMPLE_RATE)
    whole = front(clip)  # (3, 64, 51)
    front.frames = 51
    torch.testing.assert_close(script.make_views(clip, front, []), whole, atol=1e-3, rtol=0)
    for family in ("sound", "image", "flip"):
        views = script.make_views(clip.repeat(20, 1), front, [family])
        assert views.shape == (60, 64, 51) and views.isfinite().all()
    silence = script.make_views(torch.zeros(2, 40000), front, ["sound", "image", "flip"])
    assert silence.isfinite().all()


def test_image_views_hide_a_few_bands_and_frames_and_blur_by_one_cell():
    def front(waveform):
        """A spectrogram of ones, whatever the sound; `silent` but for one cell."""
        x = torch.ones(len(waveform), 64, 51)
        if silent:
            x.zero_()[:, 32, 25] = 1
        return x

    front.frames, silent = 51, False
    hidden = script.make_views(torch.zeros(200, 9), front, ["image"]) == 0  # (B, 64, 51)
    for across, most in ((hidden.all(2).sum(1), 10), (hidden.all(1).sum(1), 10)):
        assert (across > 0).sum() > 40 and across.max() <= most
    silent = True
    lit = script.make_views(torch.zeros(200, 9), front, ["image"]) > 0
    assert lit[:, 31:34, 24:27].sum() == lit.sum() and 10 < lit[:, 31, 25].sum() < 70


def test_blur_does_not_lead_from_the_highest_band_into_the_lowest():
    front = script.FrontEnd(320)
    front.mean.fill_(math.log(front.floor))  # silence, and what is masked, is 0
    tone = 0.01 * torch.sin(2 * math.pi * 7700 * torch.arange(40000) / 16000)
    views = script.make_views(tone.repeat(64, 1), front, ["image"])
    assert views[:, 63].max() > 5 and views[:, 0].abs().max() < 0.6


def test_an_excerpt_of_a_clip_that_is_filled_up_with_zeros_has_sound_in_every_view(tmp_path):
    clip = np.concatenate([sound("noise", 0.3, 0), np.zeros(5 * 22050)])
    soundfile.write(tmp_path / "a.wav", clip, 22050)
    clips = [(str(tmp_path / "a.wav"), 5.3, ["noise"], "1")] * 20
    waveform, _ = script.load_batch(0, clips, torch.ones(20, 1), "arm", range(20))
    loudest = waveform.unfold(1, script.SAMPLE_RATE, 800).abs().amax(2)  # of each second
    assert waveform.shape == (20, 40000) and (loudest > 0.01).all()


@pytest.mark.parametrize("setting, pairs, sequences", [("data", 64, 32), ("paper", 16, 4)])
def test_views_take_at_most_a_third_of_a_contrastive_step(setting, pairs, sequences, capsys):
    args, rounds = script.parse_args(["--setting", setting]), []
    models = script.make_models(10, **vars(args)).train()
    network = torch.nn.Sequential(models["encoder"], models["projector"])
    waveform = 0.1 * torch.randn(pairs, 40000)  # for `paper` a sixteenth of its batch
    heard = 0.1 * torch.randn(sequences, 2 * args.context * args.hop_length)
    for _ in range(4):  # the quickest counts: others may be at work
        times = [time.perf_counter()]
        views = script.make_views(waveform.repeat(2, 1), models["front"], ["sound"])
        times.append(time.perf_counter())
        z1, z2 = network(views).chunk(2)
        times.append(time.perf_counter())
        loss = script.nt_xent(z1, z2, 0.2)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        codes = models["tokenizer"].codes(models["front"](heard))
        script.next_code_loss(models["code_model"], codes).backward()
        rounds.append(np.diff([*times, time.perf_counter()]))
    *parts, code = np.min(rounds, axis=0)
    views, encoder, loss, backward = parts / np.sum(parts)
    with capsys.disabled():
        print(
            f"\n[{setting}: {pairs} pairs in {sum(parts):.2f} s: views {views:.0%}, encoder "
            f"{encoder:.0%}, loss {loss:.1%}, backward {backward:.0%}; {sequences} x "
            f"{args.context} codes in {code:.2f} s]",
            end=" ",
        )
    assert views < 1 / 3


def test_codes_of_a_batch_are_those_of_each_clip_alone():
    torch.manual_seed(0)
    tokenizer, log_mel = script.Tokenizer(8, 0.5), torch.randn(3, script.BANDS, 21)
    tokenizer.centroids.copy_(tokenizer.encoder(tokenizer.slices(torch.randn(1, 64, 17))).detach())
    codes = tokenizer.codes(log_mel)
    assert codes.shape == (3, 10) and len(codes.unique()) > 1
    for clip, row in zip(log_mel, codes):
        assert torch.equal(tokenizer.codes(clip[None])[0], row)


def test_a_probe_is_sure_of_features_that_are_the_class_and_unsure_of_noise():
    torch.manual_seed(0)
    truth = torch.arange(200) % 4
    targets, part = F.one_hot(truth, 4).float(), torch.arange(200) // 4 % 5  # all classes in each
    one_hot, noise = targets + 0.05 * torch.randn(200, 4), torch.randn(200, 20)
    for x, low, high in ((one_hot, 0, 0.02), (noise, 1.3, 1.5)):  # chance: ln 4 = 1.39 nats
        layer, loss = script.fit_probe(x, targets, part < 2, part == 2)
        unseen = F.cross_entropy(layer(x[part > 2]), targets[part > 2]).item()
        assert low < loss < high and low < unseen < high
    # as every weight decay alone has it on the same clips
    alone = [
        script.linear_probe(x[part < 2], targets[part < 2], decay)(x[part == 2])
        for decay in (1, 0.1, 0.01, 1e-3, 1e-4)
    ]
    assert loss == min(F.cross_entropy(logits, targets[part == 2]).item() for logits in alone)
    seen = script.linear_probe(x[part < 3], targets[part < 3], 1)  # and then to both
    torch.testing.assert_close(layer.weight, seen.weight)


def test_a_probe_of_two_halves_makes_the_second_smaller_where_that_is_noise():
    torch.manual_seed(0)
    targets, part = F.one_hot(torch.arange(200) % 4, 4).float(), torch.arange(200) // 4 % 5
    x = F.pad(targets + 0.5 * torch.randn(200, 4), (0, script.EMBEDDING - 4))
    x = torch.cat([x, torch.randn(200, 50)], 1)
    loss_of = lambda *sizes: script.fit_probe(x, targets, part < 2, part == 2, sizes)[1]
    assert loss_of(1, 0.25) == loss_of(0.25) < loss_of(1)


def test_map_equals_its_definition():
    torch.manual_seed(0)
    logits, targets = torch.randn(30, 4), (torch.rand(30, 4) < 0.4).float()
    targets[:, 0] = 1  # no clip without a class
    p, slow = logits.softmax(1), []
    for c in range(4):
        ranked = targets[p[:, c].argsort(descending=True), c]
        slow.append(np.mean([ranked[: k + 1].mean().item() for k in range(30) if ranked[k]]))
    assert script.score(logits, targets)["mAP"] == pytest.approx(np.mean(slow), rel=1e-5)


def test_map_of_equal_scores_is_about_the_share_of_a_class_in_any_order_of_clips():
    targets = torch.zeros(2000, 2)
    targets[:500, 0] = targets[1200:, 1] = 1  # all of a class side by side
    targets[:, 1] += targets.sum(1) == 0
    targets[0] = 1
    assert script.score(torch.zeros(2000, 2), targets)["mAP"] == pytest.approx(0.5, abs=0.03)


def counted(seen, new, codes, model=None):
    """count_codes() of ten sequences each, (10, L)."""
    model = model or script.CodeModel(codes, seen.shape[1], 1, 8, 1)
    return script.count_codes(model, [*seen, *new], torch.arange(20) >= 10)


def test_next_code_is_the_models_loss_of_the_held_out_clips_without_dropout():
    model, (seen, new) = script.CodeModel(4, 50, 1, 8, 1), torch.randint(4, (2, 10, 50))
    found = counted(seen, new, 4, model)["next_code"]
    loss = script.next_code_loss(model.eval(), new).item()
    assert found == pytest.approx(loss, rel=1e-5)
    assert abs(loss - script.next_code_loss(model, seen).item()) > 1e-4 * loss  # it can tell


def test_counting_knows_a_cycle_by_its_bigrams_but_not_by_its_unigrams():
    cycle = torch.arange(4).repeat(10, 25)
    found = counted(cycle, cycle, 4)
    assert found["unigram"] == pytest.approx(math.log(4), rel=1e-3) and found["bigram"] < 0.05
    noise = torch.randint(4, (10, 1000), generator=torch.Generator().manual_seed(0))
    assert counted(noise, noise, 4)["bigram"] == pytest.approx(math.log(4), rel=0.01)  # no more
    assert found["codes_used"] == 4 and found["perplexity"] == pytest.approx(4, rel=1e-3)
    assert counted(0 * cycle, cycle, 256)["perplexity"] == 1


# Data


def test_the_demo_writes_its_clips_anew_for_their_generator_may_have_been_changed(tmp_path):
    (tmp_path / "alarm").mkdir()
    (tmp_path / "alarm/0000.wav").write_bytes(b"of before")
    script.write_sound(0, tmp_path)
    assert soundfile.info(tmp_path / "alarm/0000.wav").duration == 2.0


def names_of(folder, monkeypatch, subset=None):
    """What load_clips makes of empty files: {stem: (class names, part)}."""
    monkeypatch.setattr(
        script, "scan_audio", lambda paths, *_: {p: 1.0 for p in paths if p.exists()}
    )
    return {
        Path(path).stem: (names, part)
        for path, _, names, part in script.load_clips(folder, subset, 0)
    }


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_fsd50k_keeps_its_split_and_several_classes_of_a_clip(tmp_path, monkeypatch):
    for k in range(12):
        touch(tmp_path / f"FSD50K.{'dev' if k < 8 else 'eval'}_audio" / f"{k}.wav")
    rows = [f'{k},"Bark,Dog",m,{"train" if k < 6 else "val"}' for k in range(8)]
    touch(tmp_path / "FSD50K.ground_truth" / "dev.csv")
    (tmp_path / "FSD50K.ground_truth" / "dev.csv").write_text(
        "\n".join(["fname,labels,mids,split", *rows])
    )
    rows = [f"{k},Rain,m" for k in range(8, 12)]
    (tmp_path / "FSD50K.ground_truth" / "eval.csv").write_text(
        "\n".join(["fname,labels,mids", *rows])
    )
    found = names_of(tmp_path, monkeypatch)
    assert (
        found["0"] == (["Bark", "Dog"], "train")
        and found["7"][1] == "valid"
        and found["9"] == (["Rain"], "test")
    )


def test_a_class_is_single_by_all_its_clips_and_another_dev_csv_is_no_fsd50k(
    tmp_path, monkeypatch, capsys
):
    truth = {"dev.csv": "fname,labels,mids,split\n", "eval.csv": "fname,labels,mids\n"}
    for k in range(12):
        touch(tmp_path / "fsd" / f"{k}.wav")
        split, part = ("train", "val", "")[k // 4], "dev.csv" if k < 8 else "eval.csv"
        labels = "Dog,Animal" if k == 9 else ("Bark,Dog", "Rain")[k % 2]
        truth[part] += f'{k},"{labels}",m{"," * (k < 8)}{split}\n'
    for name, text in truth.items():
        (tmp_path / "fsd" / name).write_text(text)
    assert names_of(tmp_path / "fsd", monkeypatch)["9"] == (["Dog"], "test")  # Animal: one clip
    assert "class Dog" not in capsys.readouterr().out
    (tmp_path / "fsd" / "eval.csv").unlink()
    (tmp_path / "fsd" / "dev.csv").write_text("a,b\n1,2\n")
    assert names_of(tmp_path / "fsd", monkeypatch)["9"][0] == []  # a folder of audio


def test_a_file_that_a_table_names_in_two_folds_is_in_one_of_them(tmp_path, monkeypatch):
    rows = [f"{k}.wav,{k % 5 + 1},{'Dog' if k < 6 else 'Rain'},True" for k in range(12)]
    for k in range(12):
        touch(tmp_path / "audio" / f"{k}.wav")
    rows.append("0.wav,2,Dog,True")
    (tmp_path / "esc50.csv").write_text("\n".join(["filename,fold,category,esc10", *rows]))
    monkeypatch.setattr(script, "scan_audio", lambda paths, *_: dict.fromkeys(paths, 5.0))
    paths = [path for path, *_ in script.load_clips(tmp_path, None, 0)]
    assert len(paths) == 12 == len(set(paths))


def test_a_class_whose_only_clip_a_table_names_twice_is_left_out(tmp_path, monkeypatch, capsys):
    rows = [f"{k}.wav,{k % 5 + 1},{'Dog' if k < 6 else 'Rain'},True" for k in range(12)]
    rows += ["12.wav,1,Lonely,True", "12.wav,2,Lonely,True"]
    for k in range(13):
        touch(tmp_path / "audio" / f"{k}.wav")
    (tmp_path / "esc50.csv").write_text("\n".join(["filename,fold,category,esc10", *rows]))
    monkeypatch.setattr(script, "scan_audio", lambda paths, *_: dict.fromkeys(paths, 5.0))
    assert len(script.load_clips(tmp_path, None, 0)) == 12
    assert "class Lonely: one clip" in capsys.readouterr().out


def test_gtzan_has_the_published_counts_of_the_fault_filtered_split(tmp_path, monkeypatch):
    for genre in script.gtzan.gtzan_genres:
        for k in range(100):
            name = f"{genre}.{k:05d}" if k % 2 else f"gtzan_{genre}_{k:05d}"
            touch(tmp_path / "genres" / genre / f"{name}.au")
    parts = [part for _, part in names_of(tmp_path, monkeypatch).values()]
    assert [parts.count(name) for name in ("train", "valid", "test")] == [443, 197, 290] and len(
        parts
    ) == 930


def test_embedding_many_clips_keeps_no_more_than_a_batch_of_them_in_memory(monkeypatch):
    refs, alive = [], []

    def load(path, sample_rate):
        """Noise in place of a file, and how many of these are still held by somebody."""
        waveform = torch.randn(2 * script.SAMPLE_RATE)
        refs.append(weakref.ref(waveform))
        alive.append(sum(ref() is not None for ref in refs))
        return waveform

    monkeypatch.setattr(script, "read_audio", load)
    models = script.make_models(3, **vars(script.parse_args([])))
    x = script.embed(models["front"], models["tokenizer"], [models] * 2, ["file"] * 60, 0)[0][1]
    assert x["both"].shape == (60, 512 + 2 * 128)  # mean and sd
    assert len(alive) == 60 and max(alive) <= 3


def test_features_of_a_long_clip_are_those_of_all_its_windows_at_once(monkeypatch):
    torch.manual_seed(0)
    waveform = torch.randn(140 * script.SAMPLE_RATE)
    monkeypatch.setattr(script, "read_audio", lambda path, sample_rate: waveform)
    models = script.make_models(3, **vars(script.parse_args([])))
    front, tokenizer = models["front"], models["tokenizer"]
    slices = tokenizer.slices(front(waveform[None, : 11 * script.SAMPLE_RATE]))[:256]
    tokenizer.centroids.copy_(tokenizer.encoder(slices).detach())
    (x,), (codes,) = script.embed(front, tokenizer, [models], ["file"], 0)
    with torch.no_grad():
        windows = codes.unfold(0, 25, 12)  # half a second each, codes of 40 ms
        lower, last = [layer[:, 1:] for layer in models["code_model"].states(windows)]
    assert len(windows) > 256  # which are worked out together
    for name, of_all in (
        ("generative", last.mean((0, 1))),
        ("generative, last position", last[:, -1].mean(0)),
        ("generative, layer 1", lower.mean((0, 1))),
    ):
        torch.testing.assert_close(x[name][0], of_all)


# The command


def sound(kind, seconds, seed):
    rng, t = np.random.default_rng(seed), np.arange(int(seconds * 22050)) / 22050
    tone = np.sin(2 * np.pi * rng.uniform(300, 900) * t)
    return (
        0.2
        * {"noise": rng.normal(size=len(t)), "tone": tone, "beat": tone * (t * 4 % 1 < 0.5)}[kind]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ESC-50's layout with folds 1, 2 and 4, clips of 0.3 s to 30 s, and a user's mistakes."""
    folder, rows = tmp_path_factory.mktemp("esc"), [
        "filename,fold,target,category,esc10,src_file,take"
    ]
    (folder / "audio").mkdir()
    (folder / "meta").mkdir()
    for k in range(36):
        kind, fold = ("noise", "tone", "beat")[k % 3], (1, 2, 4)[k // 12]
        seconds = {0: 0.3, 1: 30}.get(k, 1.5)
        soundfile.write(
            folder / "audio" / f"{fold}-{k}-A-{k % 3}.flac", sound(kind, seconds, k), 22050
        )
        rows.append(f"{fold}-{k}-A-{k % 3}.wav,{fold},{k % 3},{kind},True,{k},A")
    rows += [
        "1-77-A-0.wav,1,0,noise,True,77,A",
        "1-88-A-1.wav,1,1,tone,True,88,A",
        "1-99-A-0.wav,1,0,noise,True,99,A",
    ]
    rows += ["2-55-A-9.wav,2,9,lonely,True,55,A", "3-66-A-0.wav,3"]  # the last is cut off
    rows += ["1-0-A-0.wav,,0,noise,True,0,A"]  # of no fold
    rows[1] = rows[1].removesuffix("A")  # what is not read may lack
    soundfile.write(folder / "audio" / "1-88-A-1.wav", np.zeros(22050), 22050)
    (folder / "audio" / "1-99-A-0.wav").write_text("not audio")
    soundfile.write(folder / "audio" / "2-55-A-9.wav", sound("tone", 1, 5), 22050)
    (folder / "meta" / "esc50.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return command("--data", folder, "--out", out, *SMALL, "--seed", 0, 1), out


def test_a_run_names_what_it_skips_scores_every_row_and_writes_its_results(finished):
    result, out = finished
    assert result.returncode == 0 and result.stderr == "", result.stderr[-2000:]
    for words in (
        "1-77-A-0.wav: no such file",
        "1-88-A-1.wav: silent",
        "1-99-A-0.wav",
        "class lonely: one clip",
        "2 of 42 rows are not whole",
        "'1': 12, '2': 12, '4': 12",
        "37 of 40 files",
    ):
        assert words in result.stdout
    begun = result.stdout.count("model  ")
    assert f"0 s left of arm {begun}/{begun}" in result.stdout  # as many arms as planned
    rows = {row["row"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    names = {"chance", "mel statistics", "code histogram", "random VGG", "contrastive", "both"}
    for half in ("random Transformer", "generative"):
        names |= {half + read for read in ("", ", mean + sd", ", last position", ", layer 1")}
    assert set(rows) == names | {"contrastive + random Transformer", "supervised"}
    assert all(0 <= row["accuracy"] <= 1 and row["clips"] == 12 for row in rows.values())
    assert rows["mel statistics"]["accuracy"] > 0.6  # chance is a third
    assert rows["generative"]["bigram"] > 0 and (out / "sounds.png").stat().st_size > 10000


def test_a_transformer_that_knows_a_cycle_goes_on_with_it_past_its_context():
    torch.manual_seed(0)
    model, cycle = script.CodeModel(5, 16, 1, 32, 2), torch.arange(64) % 5
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        start = torch.randint(5, (8, 1))
        optimiser.zero_grad()
        script.next_code_loss(model, (start + torch.arange(16)) % 5).backward()
        optimiser.step()
    with torch.no_grad():
        found = model.eval().go_on(cycle[:8].repeat(3, 1), 56)
    assert found.shape == (3, 64) and (found == cycle).float().mean() > 0.95  # chance is a fifth


def test_a_spectrogram_is_turned_back_into_sound_of_its_pitch_length_and_loudness():
    front, tone = script.FrontEnd(320), torch.arange(16000) / 16000 * 2 * math.pi * 1000
    front.mean.fill_(-3.0), front.sd.fill_(2.0)
    waveform = script.to_waveform(front(0.3 * torch.sin(tone)[None]), front)[0]
    assert abs(len(waveform) - 16000) <= 2 * 320
    spectrum = torch.fft.rfft(waveform[:15900], 16000).abs()
    assert abs(spectrum.argmax().item() - 1000) < 40  # Hz; a mel band is 90 wide there
    assert 0.5 < waveform[2000:14000].std() / (0.3 / 2**0.5) < 2


def test_continuations_are_written_as_sound_and_picture_one_set_a_file(finished, folder):
    files = sorted((folder / "audio").glob("4-*"))[:2]
    result = run("--out", finished[1], "--predict", *files, "--sample", 2)
    assert result.returncode == 0 and result.stderr == ""
    samples = finished[1] / "samples"
    assert {path.name for path in samples.iterdir()} == {
        f"{i}_{file.stem}{end}"
        for i, file in enumerate(files)
        for end in ("_0.wav", "_1.wav", ".png")
    }
    waveforms = [soundfile.read(samples / f"0_{files[0].stem}_{k}.wav")[0] for k in range(2)]
    assert len(waveforms[0]) / 16000 == pytest.approx((32 + 64) * 0.04, abs=0.05)  # codes of 40 ms
    assert np.abs(waveforms[0]).max() > 0.01 and not np.array_equal(*waveforms)


def test_predict_prints_three_classes_for_each_file_and_skips_the_others(finished, folder):
    files = sorted((folder / "audio").glob("4-*"))[:3] + [folder / "audio" / "1-99-A-0.wav"]
    result = run("--out", finished[1], "--predict", *files)
    assert (
        result.returncode == 0
        and sum(line.count(", ") == 2 for line in result.stdout.splitlines()) == 3
    )
    assert run("--out", finished[1], "--predict", files[-1]).returncode == 2


def test_a_run_killed_then_stopped_resumes_to_the_weights_of_an_unbroken_one(
    finished, folder, tmp_path
):
    start, resume = ("--data", folder, *SMALL, "--seed", 0, 1), ("--resume", "--workers", 0)
    for how, wanted, args in (
        (signal.SIGKILL, "next code 1/4", start),
        (signal.SIGINT, "supervised 1/4", resume),
    ):
        words = [sys.executable, ROOT / "contrastive_generative.py", "--out", tmp_path, *args]
        process = subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, text=True)
        next(line for line in process.stdout if wanted in line)
        process.send_signal(how)
        process.stdout.read()
        assert process.wait() != 0
    result = command(*resume, "--out", tmp_path)  # the other arguments come from the checkpoint
    assert (
        result.returncode == 0 and "seed 0 fold 1 contrastive" not in result.stdout
    )  # it went on, not back
    ours, theirs = (
        torch.load(out / "checkpoint.pt", weights_only=True) for out in (tmp_path, finished[1])
    )
    for name, value in theirs["kept"]["models"].items():
        assert torch.equal(value, ours["kept"]["models"][name]), name
    assert ours["rows"] == theirs["rows"]
    arms = "contrastive", "supervised", "autoencoder", "next code"  # all are there, of each split
    assert set(ours["arms"]) == {f"{split} {arm}" for split in theirs["rows"] for arm in arms}
    for arm, weights in theirs["arms"].items():
        assert all(torch.equal(v, ours["arms"][arm][name]) for name, v in weights.items()), arm


def test_resume_on_a_folder_whose_classes_changed_ends_in_one_line_and_touches_nothing(tmp_path):
    for k in range(15):
        path = tmp_path / "data" / ("beat", "noise", "tone")[k % 3] / f"{k}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, sound(path.parent.name, 1.2, k), 22050)
    out = tmp_path / "out"
    first = run("--data", path.parent.parent, "--out", out, *SMALL, "--objectives", "contrastive")
    saved = (out / "checkpoint.pt").read_bytes()
    path.parent.rename(tmp_path / "data" / "a")  # tone, the last class, becomes the first
    again = run("--resume", "--out", out)
    assert first.returncode == 0 and again.returncode == 2 and again.stderr.count("\n") == 1
    assert (out / "checkpoint.pt").read_bytes() == saved


def test_esc50s_table_may_name_files_of_another_kind_as_spreadsheets_write_it(tmp_path):
    rows = ["filename,fold,category,esc10"]
    rows += ["a.ogg,1,dog,TRUE", "b.WAV,2,cat,true", "c.wav,3,x,False"]
    (tmp_path / "esc50.csv").write_text("\n".join(rows))
    paths = [tmp_path / name for name in ("a.ogg", "b.wav", "c.flac")]
    _, found = script.find_layout(tmp_path, paths, "esc10")
    assert found == {paths[0]: (["dog"], "1"), paths[1]: (["cat"], "2")}


def test_torchrun_trains_on_two_processes_and_prints_once(folder, tmp_path):
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = command("--data", folder, "--out", tmp_path, *SMALL, start=start, env=environment)
    assert result.returncode == 0 and result.stderr == "", result.stderr[-2000:]
    assert result.stdout.count("  random VGG  ") == 1 and (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    "args",
    [
        ("--data", "nowhere"),
        ("--data", "{empty}"),
        ("--data", "{broken}"),
        ("--steps", "0"),
        ("--views", "pitch"),
        ("--lr", "inf"),
        ("--device", "tpu"),
        ("--predict",),
        ("--predict", "x.wav", "--out", "{empty}"),
        ("--data", "{esc}", "--out", "{broken}/a.txt"),
        ("--resume", "--out", "{broken}"),
        ("--step", "3"),
        ("--sample", "2"),
        ("--predict", "x.wav", "--sample", "-1"),
        ("--objectives", "both"),
        ("--batch-size", "1"),
        ("--data", "{two}"),
        ("--data", "{two}", "--subset", "esc10"),
        ("--subset", "esc10"),
    ],
)
def test_what_a_user_can_do_wrong_ends_in_one_line_and_exit_code_2(tmp_path, folder, args, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.txt").write_text("no audio")
    (tmp_path / "broken" / "esc50.csv").write_text("name,class\nx.wav,dog")
    (tmp_path / "broken" / "checkpoint.pt").write_text("not a checkpoint")
    for name in "abcdefgh":  # two clips of each class: nothing would be left to validate on
        touch(tmp_path / "two" / name / "1.wav")
        for number in "12":
            soundfile.write(tmp_path / "two" / name / f"{number}.wav", np.ones(4000) / 2, 16000)
    places = {"empty": tmp_path / "empty", "broken": tmp_path / "broken", "esc": folder}
    places["two"] = tmp_path / "two"
    with pytest.raises(SystemExit) as end:
        script.main(
            script.parse_args(
                ["--out", str(tmp_path / "o"), *[arg.format(**places) for arg in args]]
            )
        )
    errors = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(errors) == 1


def test_of_a_folder_without_classes_predict_names_the_clips_that_are_most_alike(tmp_path, folder):
    (tmp_path / "flat").mkdir()
    for k in range(20):
        soundfile.write(tmp_path / "flat" / f"{k}.wav", sound("beat", 1.2, k), 22050)
    result = run("--data", tmp_path / "flat", "--out", tmp_path, *SMALL, "--folds", 5)
    assert result.returncode == 0 and "no classes, no scores" in result.stdout, result.stderr[
        -2000:
    ]
    assert "fold 2" not in result.stdout  # nothing would come of it
    assert (tmp_path / "sounds.png").stat().st_size > 10000
    file = tmp_path / "flat" / "1.wav"
    answer = run("--out", tmp_path, "--predict", file).stdout.splitlines()[-1]
    assert re.fullmatch(f"{file}: {file} 1.00(, {file.parent}/[0-9]+.wav [0-9.-]+){{2}}", answer)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["kept"]
    assert len(kept["models"]["code_model.place.weight"]) == 30 + 1  # 1.2 s, no place untrained


def test_of_clips_no_longer_than_a_view_no_state_is_read_whose_place_is_not_trained(tmp_path):
    for k in range(16):
        (tmp_path / f"class{k % 2}").mkdir(exist_ok=True)
        soundfile.write(tmp_path / f"class{k % 2}/{k}.wav", sound("beat", 1.0, k), 22050)
    result = run("--data", tmp_path, "--out", tmp_path / "out", *SMALL, "--folds", 1)
    assert result.returncode == 0, result.stderr
    args = json.loads((tmp_path / "out/results.json").read_text())["args"]
    read = script.WINDOW // args["hop_length"] // 2  # codes of a window; state k has seen k codes
    assert args["context"] - 1 >= read  # forward() drops the last state: its place learns nothing


def test_all_classes_are_in_the_legend_and_by_their_names(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def texts(picture, *_, **__):
        """What the legend says, once drawn."""
        picture.draw_without_rendering()
        found.extend(text.get_text() for text in picture.axes[1].get_legend().get_texts())

    found = []
    monkeypatch.setattr(Figure, "savefig", texts)
    soundfile.write(tmp_path / "x.wav", sound("noise", 2, 0), 22050)
    models = script.make_models(2, **vars(script.parse_args([]))).eval()
    kept = {"row": "contrastive", "key": "", "probe": torch.nn.Linear(5, 2).state_dict()}
    script.draw(tmp_path / "x.png", {"contrastive": torch.randn(8, 5)}, torch.arange(8) % 2,
                ["_hid", "$^$"], kept, models, tmp_path / "x.wav")
    assert [text.strip() for text in found] == ["_hid", r"\$^\$"]


def test_a_clip_of_several_classes_is_drawn_as_the_one_that_the_answer_names(tmp_path, monkeypatch):
    labels = {"noise": "Noise,Hiss", "tone": "Tone,Hum", "beat": "Beat,Drum"}
    tables = {"dev.csv": "fname,labels,mids,split\n", "eval.csv": "fname,labels,mids\n"}
    (tmp_path / "audio").mkdir()
    for k in range(45):
        kind = list(labels)[k % 3]
        soundfile.write(tmp_path / "audio" / f"{k}.wav", sound(kind, 1.2, k), 22050)
        name = "dev.csv" if k < 30 else "eval.csv"
        split = f",{'train' if k < 20 else 'val'}" if k < 30 else ""
        tables[name] += f'{k},"{labels[kind]}",m{split}\n'
    for name, text in tables.items():
        (tmp_path / name).write_text(text)
    drawn = []
    monkeypatch.setattr(script, "draw", lambda *args: (args[0].touch(), drawn.append(args)))
    result = run("--data", tmp_path, "--out", tmp_path / "out", *SMALL,
                 "--objectives", "contrastive")
    assert result.returncode == 0, result.stderr
    _, features, truth, classes, kept, *_ = drawn[0]
    found = F.linear(features[kept["row"]], **kept["probe"]).argmax(1)  # (15,)
    own = [labels[kind].split(",") for kind in labels] * 5  # clips are sorted: checked by the set
    assert sorted(map(sorted, own)) == sorted(
        next(sorted(pair) for pair in own if classes[i] in pair) for i in truth)
    pair_of = {name: pair for pair in own for name in pair}
    hit = [pair_of[classes[i]] == pair_of[classes[j]] for i, j in zip(found, truth)]
    assert sum(hit) >= 8  # of 15: what follows is about many clips
    assert all(i == j for i, j, same in zip(found, truth, hit) if same)


def test_importing_the_script_trains_nothing(tmp_path):
    command = [sys.executable, "-c", "import contrastive_generative"]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0 and result.stdout == "" and not list(tmp_path.iterdir())
