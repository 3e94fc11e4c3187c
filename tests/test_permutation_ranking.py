"""Properties of permutation_ranking.py. Run from the project's folder: python -m pytest tests"""

import contextlib
import io
import json
import math
import os
import re
import shutil
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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import permutation_ranking as P

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = (
    "--losses",
    "soft_rank",
    "classification",
    "--steps",
    4,
    "--batch-size",
    4,
    "--label-counts",
    20,
)


def command(*args, **kwargs):
    """The command as a user types it, from another folder."""
    words = [sys.executable, str(ROOT / "permutation_ranking.py"), *map(str, args)]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=280, env=ENVIRONMENT, **kwargs
    )


def run(*args):
    """The same in this process: exit code and what is printed, without the seconds to start."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            P.main(P.parse_args([*map(str, args)]))
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=errors.getvalue())


# Patches and permutations


def test_patches_are_numbered_row_by_row_and_sorting_the_ranks_undoes_the_shuffle():
    x = torch.randn(2, 513, 101)
    patches = P.cut(x, 3, 4)
    assert patches.shape == (2, 12, 171, 25)
    assert torch.equal(patches[:, 6], x[:, 171:342, 50:75])  # row 1, column 2
    assert torch.equal(patches[:, 1], x[:, :171, 25:50])  # the lowest band first
    y = torch.rand(2, 12).argsort(1)
    assert torch.equal(P.shuffle(P.shuffle(patches, y), y.argsort(1)), patches)


@pytest.mark.parametrize("count, n", [(100, 10), (24, 4), (50, 9)])
def test_fixed_permutations_are_permutations_and_further_apart_than_random_ones(count, n):
    fixed = P.distant_permutations(count, n)
    assert fixed.shape == (count, n) and torch.equal(
        fixed.sort(1).values, torch.arange(n).expand(count, n)
    )
    distance = (fixed[:, None] != fixed).sum(2) + n * torch.eye(count)
    assert len(fixed.unique(dim=0)) == count and (
        n == 4 or distance.min() >= n - 3
    )  # random: 4 at n = 10


# Losses


def sampled_gradient(theta, y, sigma, noise):
    """E[ranks(theta + sigma Z)] - y by 400 000 samples."""
    rng = np.random.default_rng(0)
    z = (
        rng.standard_normal((400_000, len(theta)))
        if noise == "gaussian"
        else rng.gumbel(size=(400_000, len(theta)))
    )
    return (np.asarray(theta) + sigma * z).argsort(1).argsort(1).mean(0) + 1 - np.asarray(y)


@pytest.mark.parametrize("noise", ["gaussian", "gumbel"])
def test_the_closed_form_of_fenchel_young_has_the_gradient_of_its_sampled_form(noise):
    theta = torch.tensor([[0.3, -0.2, 0.9, 0.1, -1.0]], dtype=torch.double, requires_grad=True)
    y = torch.tensor([[2.0, 5, 1, 3, 4]])
    grad = torch.autograd.grad(P.fenchel_young_loss(theta, y, 0.7, noise), theta)[0]
    np.testing.assert_allclose(
        grad[0], sampled_gradient(theta[0].detach(), y[0], 0.7, noise), atol=0.02
    )
    assert abs(grad.sum()) < 1e-9  # ranks 1..n: with 0-based ones all scores would drift


def test_fenchel_young_equals_the_sum_over_pairs_and_gumbels_is_ranknet():
    torch.manual_seed(0)
    theta, y, sigma = torch.randn(4, 6), torch.rand(4, 6).argsort(1) + 1, 0.5
    gaussian = gumbel = 0.0
    for b in range(4):
        for i in range(6):
            for j in range(i + 1, 6):
                d, s = (theta[b, i] - theta[b, j]).item(), math.sqrt(2) * sigma
                phi, Phi = math.exp(-0.5 * (d / s) ** 2) / math.sqrt(
                    2 * math.pi
                ), 0.5 + 0.5 * math.erf(d / s / 2**0.5)
                gaussian += d * Phi + s * phi - d * bool(y[b, i] > y[b, j])
                gumbel += sigma * math.log(1 + math.exp(-(d if y[b, i] > y[b, j] else -d) / sigma))
    assert P.fenchel_young_loss(theta, y, sigma).item() == pytest.approx(gaussian / 4, rel=1e-5)
    assert P.fenchel_young_loss(theta, y, sigma, "gumbel").item() == pytest.approx(
        gumbel / 4, rel=1e-5
    )


def test_a_confident_wrong_order_has_no_gradient_by_soft_ranks_and_has_one_by_fenchel_young():
    theta, y = 2 * torch.arange(10.0, 0, -1)[None].requires_grad_(), torch.arange(1.0, 11)[None]
    for name, silent in (("soft_rank", True), ("fenchel_young", False), ("mse", False)):
        grad = torch.autograd.grad(P.LOSSES[name](theta, y, None, 1.0), theta)[0]
        assert (grad == 0).all() == silent, name
    assert P.LOSSES["soft_rank"](2 * y, y, None, 1.0) == 0  # ascending: scores grow with the place


# Network


def test_the_networks_take_every_number_of_patches_in_both_directions():
    for n in (2, 4, 7, 10, 13):
        for grid in ((n, 1), (1, min(n, 12)), (3, 3)):
            model = P.ContextFreeNetwork("small", *grid)
            patches = model.patches(model.front_end(torch.randn(2, 16000)))
            assert model(patches).shape == (2, math.prod(grid))
            assert model.embed(patches)["convolutions"].shape == (2, 128 * math.prod(grid))


def test_the_papers_network_has_its_widths_and_learns_from_a_step():
    torch.manual_seed(0)
    model = P.ContextFreeNetwork(
        "alexnet", 12, 1, 5
    ).eval()  # stock AlexNet collapses from 8 bands up
    patches, choice = model.patches(model.front_end(torch.randn(2, 64000))), torch.tensor([1, 3])
    assert (
        model.embed(patches)[model.layer].shape == (2, 4096)
        and model.joint.in_features == 12 * 1024
    )
    before = P.LOSSES["classification"](model(patches), None, choice, 1.0)
    before.backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    assert P.LOSSES["classification"](model(patches), None, choice, 1.0) < before


def test_a_patchs_features_depend_on_nothing_but_the_patch_and_equal_a_loop_over_patches(
    capsys, folder
):
    torch.manual_seed(0)
    model = P.ContextFreeNetwork("small", 10, 1).eval()
    patches = model.patches(model.front_end(torch.randn(32, 16000)))
    other = patches.clone()
    other[:, 3] = torch.randn_like(other[:, 3])
    change = (
        (model.embed(patches)["convolutions"] - model.embed(other)["convolutions"])
        .view(32, 10, 128)
        .abs()
        .amax((0, 2))
    )
    assert (change > 0).tolist() == [i == 3 for i in range(10)]
    model.train()
    mean, sd = patches.mean((2, 3), keepdim=True), patches.std((2, 3), keepdim=True)

    def loop():  # note by note and patch by patch
        features = [
            [model.encoder(((x - m) / (s + 0.3))[None])[0] for x, m, s in zip(*note)]
            for note in zip(patches, mean, sd)
        ]
        return model.output(torch.relu(model.joint(torch.stack([torch.cat(f) for f in features]))))

    optimiser, waveform = torch.optim.AdamW(model.parameters()), torch.randn(32, 16000)
    notes = [P.Note(path, 2.0) for path in (folder / "nsynth-test/audio").iterdir()]

    def step(output):
        optimiser.zero_grad()
        P.LOSSES["fenchel_young"](output, torch.arange(10).expand(32, 10) + 1.0).backward()
        optimiser.step()

    ratios, loading = [], []
    for _ in range(5):  # interleaved, with the spectrogram, the loss and the optimiser
        times = [time.perf_counter()]
        model.patches(model.front_end(waveform)), step(loop())
        times.append(time.perf_counter())
        step(model(model.patches(model.front_end(waveform))))
        times.append(time.perf_counter())
        P.load_batch(0, range(32), "arm", notes, 1.0, model.fixed)
        theirs, ours, load = np.diff([*times, time.perf_counter()])
        ratios.append(theirs / ours)
        loading.append(load / ours)
    with capsys.disabled():
        print(f"\n[step: patch by patch / all at once = {np.median(ratios):.1f}; a batch is read "
              f"by another thread in {np.median(loading):.0%} of a step]", end=" ")
    assert np.median(ratios) > 3
    model.eval()
    torch.testing.assert_close(loop(), model(patches), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loss", ["soft_rank", "fenchel_young"])
def test_thirty_two_notes_can_be_learnt_by_heart(loss):
    torch.manual_seed(0)
    model = P.ContextFreeNetwork("small", 10, 1).train()
    model.output[0].p = 0.0  # no dropout
    y = torch.rand(32, 10).argsort(1)
    patches = P.shuffle(torch.randn(32, 10, 51, 25) + torch.randn(10, 51, 1), y)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(100):
        optimiser.zero_grad()
        output = model(patches)
        P.LOSSES[loss](output, y + 1.0, None, 1.0).backward()
        optimiser.step()
    assert (model.order(output) == y).float().mean() > 0.97


# Data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seventy notes in NSynth's layout, and what a user may have by mistake."""
    folder, P.NOTES = tmp_path_factory.mktemp("notes"), {
        "train": (2, 3),
        "valid": (1, 1),
        "test": (1, 2),
    }
    P.write_notes(folder, 0)
    train = folder / "nsynth-train"
    notes = sorted((train / "audio").iterdir())
    notes[0].unlink()  # extracted in part
    notes[1].write_text("not audio")
    waveform, _ = soundfile.read(notes[2])
    notes[2].unlink()
    soundfile.write(
        notes[2].with_suffix(".flac"), np.repeat(waveform, 3), 48000
    )  # another rate and format
    soundfile.write(notes[3], waveform[:8000], 16000)  # half a second
    soundfile.write(notes[4], np.zeros(32000), 16000)
    labels = json.loads((train / "examples.json").read_text())
    (train / "examples.json").write_text(
        json.dumps({k: v for k, v in labels.items() if "vocal" not in k})
    )
    return folder


def test_a_note_is_the_same_every_time_and_has_its_pitch(tmp_path):
    for family in ("flute", "brass"):
        note = P.make_note(family, 7, 69, 100, np.random.default_rng(1))
        assert np.array_equal(note, P.make_note(family, 7, 69, 100, np.random.default_rng(1)))
        spectrum = np.abs(np.fft.rfft(note))  # bins of 0.5 Hz
        comb = [
            spectrum[(np.arange(1, 6) * f * 2).astype(int)].sum()
            for f in np.arange(415.0, 466, 0.5)
        ]
        assert abs(415 + 0.5 * np.argmax(comb) - 440) < 8  # A4, within a third of a semitone


def test_loading_names_and_counts_what_is_missing_and_splits_by_instrument(folder, capsys):
    notes, out = P.load_notes(folder, 0), capsys.readouterr().out
    assert "not audio" not in out and "silent" in out and out.count("skip") == 2
    assert "51 notes; 3 have no audio" in out and "without a note: synth_lead, vocal" in out
    assert {k: len(v) for k, v in notes.items() if k in ("valid", "unseen", "unlabelled")} == {
        "valid": 10,
        "unseen": 20,
        "unlabelled": 6,
    }
    assert len(notes["train"]) + len(notes["seen"]) == 51 and len(notes["seen"]) > 3
    instruments = {split: {n.instrument for n in part} for split, part in notes.items()}
    assert (
        instruments["seen"] <= instruments["train"]
        and not instruments["unseen"] & instruments["train"]
    )
    assert not {n.path for n in notes["seen"]} & {n.path for n in notes["train"]}
    inner = P.load_notes(folder / "nsynth-train", 0)  # one split alone: instruments are shared out
    assert not {n.instrument for n in inner["unseen"]} & {n.instrument for n in inner["train"]}


def test_a_note_that_two_label_files_name_is_in_one_split_that_of_the_test_first(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "all")
    labels = {}
    for file in (tmp_path / "all").glob("*/examples.json"):
        labels |= json.loads(file.read_text())
    (tmp_path / "all/examples.json").write_text(json.dumps(labels))
    notes = P.load_notes(tmp_path / "all", 0)
    paths = {split: [Path(note.path).name for note in part] for split, part in notes.items()}
    assert len(set(sum(paths.values(), []))) == sum(map(len, paths.values()))
    assert set(paths["unseen"]) == {Path(n.path).name for n in P.load_notes(folder, 0)["unseen"]}


def test_the_same_grid_twice_is_refused(capsys):
    with pytest.raises(SystemExit):
        P.parse_args("--bands 10 10 --slices 1 1".split())
    assert "same grid" in capsys.readouterr().err


def test_a_batch_is_the_same_for_any_reader_and_short_notes_are_padded(folder):
    notes = P.load_notes(folder, 0)["train"]
    load = lambda items: P.load_batch(3, items, "arm", notes, 1.0, torch.empty(0, 10))
    for whole, *parts in zip(load(range(4)), load(range(2)), load(range(2, 4))):
        assert torch.equal(whole, torch.cat(parts))
    assert P.load_view(min(notes, key=lambda n: n.seconds).path, 0.0, 1.0).shape == (16000,)


def test_the_loss_that_the_metrics_ask_gets_the_labels_that_it_gets_in_training(folder):
    notes, found = P.load_notes(folder, 0)["train"][:8], set()

    def loss(output, ranks, choice, family, pitch):
        found.update(zip(family.tolist(), pitch.tolist()))
        return output.sum()

    P.pretext_metrics(P.ContextFreeNetwork("small", 10, 1), loss, notes, 0)
    assert found and found <= {(note.family, note.pitch) for note in notes}


def test_embedding_many_notes_keeps_no_more_than_a_batch_of_them_in_memory(monkeypatch):
    refs, alive = [], []

    def load(path, **_):
        """Noise in place of a file, and how many of these are still held by somebody."""
        waveform = torch.randn(P.SAMPLE_RATE // 2)
        refs.append(weakref.ref(waveform))
        alive.append(sum(ref() is not None for ref in refs))
        return waveform

    monkeypatch.setattr(P, "load_view", load)
    models = {"a": P.ContextFreeNetwork("small", 10, 1), "b": P.ContextFreeNetwork("small", 10, 1)}
    x = P.embed(models, [P.Note("file", 1.0)] * 150, 0)
    assert x["a"].shape == (150, 1280)
    assert len(alive) == 150 and max(alive) <= 66


# The command


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return command("--data", folder, "--out", out, *SMALL), out


def test_a_run_prints_its_table_and_writes_its_results(finished):
    result, out = finished
    assert result.returncode == 0 and result.stderr == ""
    begun = result.stdout.count("model  ")
    assert f"0 s left of arm {begun}/{begun}" in result.stdout  # as many arms as planned
    rows = {row["row"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    for name in (
        "chance",
        "statistics",
        "random encoder",
        "supervised",
        "soft_rank",
        "classification",
    ):
        for split in ("unseen", "seen"):
            row = rows[f"{name}, 20 labels, {split}"]
            assert 0 <= row["family_accuracy"] <= 1 and (row["instrument_accuracy"] is None) == (
                split == "unseen"
            )
            assert f"{name}, 20 labels, {split}" in result.stdout
    assert 0 <= rows["soft_rank, 20 labels, seen"]["zero_gradient"] <= 1
    assert (out / "permutation.png").stat().st_size > 10000


def test_the_heads_leave_the_encoder_as_it_was_trained(finished):
    state = torch.load(finished[1] / "checkpoint.pt", weights_only=True)
    model = P.load_kept(state, "cpu")
    x = model.embed(torch.randn(8, 10, 51, 25))[model.layer]
    x, y = x.detach(), torch.zeros(8).long()
    head = P.fit_head(x, y, 8, 2, torch.nn.functional.cross_entropy)
    assert all(
        torch.equal(v, state["arms"][state["kept"]["arm"]][k])
        for k, v in model.state_dict().items()
    )
    assert not any(p.requires_grad for p in head.parameters())


def test_the_family_head_is_hardly_surer_than_it_is_right():
    torch.manual_seed(0)
    x = torch.randn(2000, 300)
    family = (x[:, :11] + torch.randn(2000, 11)).argmax(1)  # hard to tell from so few
    y = torch.stack([family, family, family + 60], 1)
    parts = {"train": slice(400), "valid": slice(400, 600), "unseen": slice(600, 2000)}
    x, y = ({name: part[use] for name, use in parts.items()} for part in (x, y))
    x["seen"], y["seen"] = x["valid"], y["valid"]
    metrics, heads, _ = P.score(x, y, 400, 256, 11)
    sure = heads[0](x["unseen"]).softmax(1).amax(1).mean().item()
    right = metrics["unseen"]["family_accuracy"]
    assert 0.13 < right < sure < right + 0.25  # right + 0.38 without smoothed labels


def test_predict_answers_for_files_of_any_format_and_skips_the_others(finished, folder):
    files = sorted((folder / "nsynth-train/audio").iterdir())[:3]  # text, flac, wav
    result = run("--out", finished[1], "--predict", *files)
    assert result.returncode == 0 and result.stdout.count("(MIDI ") == 2 and "skip" in result.stdout
    assert run("--out", finished[1], "--predict", files[0]).returncode == 2


def test_predict_names_a_file_whose_sound_begins_behind_what_is_heard(finished, tmp_path):
    soundfile.write(tmp_path / "late.wav", np.r_[np.zeros(40000), np.ones(16000)], 16000)
    soundfile.write(tmp_path / "note.wav", np.sin(np.arange(32000)), 16000)
    result = run("--out", finished[1], "--predict", tmp_path / "late.wav", tmp_path / "note.wav")
    assert "late.wav: silent in its first 2 s" in result.stdout
    assert result.returncode == 0 and result.stdout.count("(MIDI ") == 1


def test_predict_without_files_scores_the_encoders_as_they_are_on_a_folder(finished, folder):
    before = (finished[1] / "checkpoint.pt").read_bytes()
    args = ("--out", finished[1], "--predict", "--label-counts", "20", "--data")
    result = run(*args, folder)
    assert result.returncode == 0 and result.stderr == ""
    assert (finished[1] / "checkpoint.pt").read_bytes() == before
    here, there = (
        {row["row"]: row for row in json.loads((finished[1] / name).read_text())["rows"]}
        for name in ("results.json", "transfer.json")
    )
    for name in ("random encoder", "soft_rank", "classification"):  # on the same notes
        row = f"{name}, 20 labels, unseen"
        for metric in ("family_accuracy", "family_linear", "pitch_mse", "chroma_accuracy"):
            assert here[row][metric] == there[row][metric]
    assert run(*args, folder / "nsynth-test/audio").returncode == 2  # no labels there


@pytest.mark.parametrize(
    "args",
    [
        ("--data", "nowhere"),
        ("--data", "{empty}"),
        ("--steps", "0"),
        ("--losses", "kl"),
        ("--bands", "4", "8"),
        ("--bands", "1"),
        ("--label-counts", "3"),
        ("--lr", "nan"),
        ("--seed", "-1"),
        ("--predict", "x.wav", "--out", "{empty}"),
        ("--predict",),
        ("--predict", "--data", "{notes}", "--out", "{empty}"),
        ("--resume", "--out", "{text}"),
        ("--data", "{notes}", "--out", "{text}/checkpoint.pt"),
        ("--step", "3"),
    ],
)
def test_what_a_user_can_do_wrong_ends_in_one_line_and_exit_code_2(tmp_path, folder, args, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "checkpoint.pt").write_text("not a checkpoint")
    places = {"empty": tmp_path / "empty", "text": tmp_path / "text", "notes": folder}
    with pytest.raises(SystemExit) as end:
        P.main(P.parse_args(["--out", str(tmp_path / "o"), *[a.format(**places) for a in args]]))
    errors = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(errors) == 1


def test_without_labels_the_pretext_metrics_are_of_notes_not_trained_on(folder, tmp_path):
    (tmp_path / "linked").symlink_to(folder / "nsynth-train")
    assert P.load_notes(tmp_path, 0)["unseen"]  # labels are found behind a link
    (tmp_path / "linked").unlink()
    (tmp_path / "audio").symlink_to(folder / "nsynth-train/audio")
    notes = P.load_notes(tmp_path, 0)
    trained, valid = ({n.path for n in notes[split]} for split in ("unlabelled", "valid"))
    assert not notes["train"] and len(valid) >= 5 and len(trained) >= 40 and not trained & valid


def test_a_broken_examples_json_leaves_a_folder_that_pre_trains(folder, tmp_path):
    (tmp_path / "nsynth-train").mkdir()
    (tmp_path / "nsynth-train/examples.json").write_text("{")
    (tmp_path / "nsynth-train/audio").symlink_to(folder / "nsynth-test/audio")
    result = run("--data", tmp_path, "--out", tmp_path / "out", *SMALL)
    assert result.returncode == 0 and "examples.json: not NSynth's labels" in result.stdout
    assert "no scores" in result.stdout and "partial_ranks" in result.stdout
    assert (tmp_path / "out/permutation.png").stat().st_size > 10000
    files = sorted((tmp_path / "nsynth-train/audio").iterdir())
    for file in files[:2]:  # the first was not trained on
        answer = run("--out", tmp_path / "out", "--predict", file).stdout.splitlines()[-1]
        assert re.fullmatch(f"{file}: .*/{file.name} 1.00(, .*wav -?[0-9.]+){{2}}", answer)


def test_the_demo_writes_its_notes_anew_for_their_generator_may_have_been_changed(tmp_path):
    (tmp_path / "audio").mkdir()
    name, _ = P.write_note(("bass", 0, 0), tmp_path)
    (tmp_path / f"audio/{name}.wav").write_bytes(b"of before")
    P.write_note(("bass", 0, 0), tmp_path)
    assert soundfile.info(tmp_path / f"audio/{name}.wav").duration == 2.0


def test_a_record_without_a_label_is_counted_and_the_others_stay(tmp_path, capsys):
    whole = {"instrument_family": 3, "instrument": 7, "pitch": 60}
    broken = {"b": {**whole, "pitch": None}, "c": {"pitch": 60}, "d": "text"}
    records = {"a": whole, **broken, "e": whole}
    (tmp_path / "examples.json").write_text(json.dumps(records))
    assert P.read_labels(tmp_path / "examples.json") == {"a": (3, 7, 60), "e": (3, 7, 60)}
    assert "3 of 5 notes" in capsys.readouterr().out
    (tmp_path / "examples.json").write_text("[" * 10**5)
    assert P.read_labels(tmp_path / "examples.json") == {}


def test_pre_training_hears_no_note_of_the_held_back_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(P, "scan_audio", lambda paths, *_: dict.fromkeys(paths, 4.0))
    for i, (split, count) in enumerate({"train": 40, "valid": 4100, "test": 40}.items()):
        audio = tmp_path / f"nsynth-{split}" / "audio"
        audio.mkdir(parents=True)
        label = {"instrument_family": 0, "instrument": i, "pitch": 60}
        labels = {f"{split}-{k}": label for k in range(count)}
        for name in [*labels, f"{split}-unlabelled"]:
            (audio / f"{name}.wav").touch()
        (audio / f"{split}-0.flac").touch()  # the same note once more
        (audio.parent / "examples.json").write_text(json.dumps(labels))
    (tmp_path / "nsynth-test, broken").mkdir()
    (tmp_path / "nsynth-test, broken/examples.json").write_text("{")
    (tmp_path / "nsynth-test, broken/a.wav").touch()
    for copies in ("more", "mini/audio"):  # of test notes, without labels and with
        (tmp_path / copies).mkdir(parents=True)
        for k in range(5):
            (tmp_path / copies / f"test-{k}.wav").touch()
    (tmp_path / "mini/examples.json").write_text(json.dumps(labels))
    notes = P.load_notes(tmp_path, 0)
    heard = {Path(n.path).parent.parent.name for n in notes["train"] + notes["unlabelled"]}
    assert heard == {"nsynth-train"} and 1000 < len(notes["valid"]) <= 2000


def test_instruments_that_are_in_train_and_in_test_are_counted(folder, tmp_path, capsys):
    P.load_notes(folder, 0)
    assert "not unseen" not in capsys.readouterr().out
    shutil.copytree(folder, tmp_path / "all")
    file = tmp_path / "all/nsynth-test/examples.json"
    labels = json.loads(file.read_text())
    train = json.loads((tmp_path / "all/nsynth-train/examples.json").read_text()).values()
    labels[next(iter(labels))]["instrument"] = next(iter(train))["instrument"]
    file.write_text(json.dumps(labels))
    P.load_notes(tmp_path / "all", 0)
    assert "truth  1 instruments of the test split are in train" in capsys.readouterr().out


def test_one_split_with_few_instruments_is_shared_out_7_1_2(tmp_path, monkeypatch):
    monkeypatch.setattr(P, "scan_audio", lambda paths, *_: dict.fromkeys(paths, 4.0))
    (tmp_path / "audio").mkdir()
    labels = {f"note{k}": {"instrument_family": 0, "instrument": 50 + k % 10, "pitch": 60}
              for k in range(200)}
    for name in labels:
        (tmp_path / "audio" / f"{name}.wav").touch()
    (tmp_path / "examples.json").write_text(json.dumps(labels))
    notes = P.load_notes(tmp_path, 0)
    players = [{n.instrument for n in notes[split]} for split in ("train", "valid", "unseen")]
    assert [*map(len, players)] == [7, 1, 2] and len(set.union(*players)) == 10


@pytest.mark.parametrize(
    "count, held_out, trained_on", [(1, 1, 1), (25, 3, 22), (30000, 1500, 27000)])
def test_a_tenth_of_unlabelled_notes_but_no_more_than_2000_is_held_out(
        tmp_path, monkeypatch, count, held_out, trained_on):
    paths = [tmp_path / f"{k}.wav" for k in range(count)]
    monkeypatch.setattr(P, "find_audio", lambda folder, suffixes=None: [] if suffixes else paths)
    monkeypatch.setattr(P, "scan_audio", lambda paths, *_: dict.fromkeys(paths, 4.0))
    notes = P.load_notes(tmp_path, 0)
    assert (len(notes["valid"]), len(notes["unlabelled"])) == (held_out, trained_on)
    assert count == 1 or set(notes["valid"]).isdisjoint(notes["unlabelled"])


def test_a_run_killed_then_stopped_resumes_to_the_weights_of_an_unbroken_one(
    finished, folder, tmp_path
):
    start, resume = ("--data", folder, *SMALL), ("--resume", "--workers", 0)
    for how, wanted, args in (
        (signal.SIGKILL, "supervised, 20 labels, seed 0 1/", start),
        (signal.SIGINT, "soft_rank, seed 0 1/", resume),
    ):
        words = [sys.executable, ROOT / "permutation_ranking.py", "--out", tmp_path, *args]
        process = subprocess.Popen(
            list(map(str, words)), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        next(line for line in process.stdout if wanted in line)
        process.send_signal(how)
        process.stdout.read()
        assert process.wait() != 0
    result = command(*resume, "--out", tmp_path)  # the other arguments come from the checkpoint
    assert result.returncode == 0
    assert "supervised, 20 labels, seed 0 1/4" not in result.stdout  # it went on, not back
    arms = [
        torch.load(out / "checkpoint.pt", weights_only=True)["arms"]
        for out in (finished[1], tmp_path)
    ]
    for arm, weights in arms[0].items():
        assert all(torch.equal(weights[name], arms[1][arm][name]) for name in weights), arm
    tables = [
        json.loads((out / "results.json").read_text())["rows"] for out in (finished[1], tmp_path)
    ]
    assert tables[0] == tables[1]


def test_torchrun_trains_on_two_processes_and_prints_once(folder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        ROOT / "permutation_ranking.py",
        "--data",
        folder,
        "--out",
        tmp_path,
        *SMALL,
        "--bands",
        10,
        1,
        "--slices",
        1,
        4,
    ]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=280, env=ENVIRONMENT
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr[-2000:]
    assert (
        result.stdout.count("\n  soft_rank 1x4, 20 labels, unseen") == 1
        and (tmp_path / "results.json").exists()
    )


def test_the_papers_layer_has_a_row_of_its_own_where_the_embedding_is_another(monkeypatch):
    monkeypatch.setattr(P, "load_views", lambda notes, seconds: torch.randn(len(notes), 32000))
    for network, more in (("small", ["joint layer of m"]), ("alexnet", [])):
        model = P.ContextFreeNetwork(network, 10, 1)
        features = P.embed({"m": model}, [None] * 2, 0)
        assert [*features] == ["chance", "statistics", "m", *more]
        assert all(features[row].shape == (2, model.joint.out_features) for row in more)


def test_embedding_more_notes_takes_hardly_more_memory():
    """Small results that tie up what large tensors leave would take 20 MB for each 32 notes."""
    code = """import resource, torch, common, permutation_ranking as script
common.start_run("cpu")
script.load_views = lambda notes, seconds: torch.randn(len(notes), 32000)
models = {k: script.ContextFreeNetwork("small", 10, 1) for k in range(4)}
for notes in (96, 768):
    script.embed(models, [None] * notes, 0)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    few, many = [int(line) for line in result.stdout.splitlines() if line.isdigit()]  # MB
    assert many - few < 100, result.stdout


def test_importing_the_script_trains_nothing(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", "import permutation_ranking"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0 and result.stdout == "" and not list(tmp_path.iterdir())
