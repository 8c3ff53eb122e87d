"""Behaviour tests of every script: `pytest test_components.py`, CPU only, no network.

What a test states is what the paper, DESIGN or a docstring promises. Networks have the `tiny`
preset; `awake` gives their zero-initialised layers weights, as training would.
"""

import ast
import copy
import functools
import math
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate

import cycle
import data
import dpa
import mjd
import train

HERE = Path(__file__).parent
SCRIPTS = [HERE / f"{name}.py" for name in ("data", "mjd", "dpa", "cycle", "train", "sample")]
TINY = dict(size=(32, 48), frames=5, views=2, tracks=32)
torch.set_num_threads(2)


def awake(network, std=0.1):
    """The network with all its zeros replaced by noise, so that every path carries something."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(0, std, generator=generator)
    return network


def new_models():
    """Awake networks of the tiny preset, as train.py builds them."""
    torch.manual_seed(0)
    models = cycle.build_models(dict(**mjd.PRESETS["tiny"], dpa=train.RECIPES["tiny"]["dpa"]))
    for network in models.networks.values():
        awake(network)
    return models


@pytest.fixture(scope="session")
def models():
    return new_models()


@pytest.fixture(scope="session")
def batch():
    return default_collate([data.SyntheticHOI("train", **TINY)[index] for index in range(2)])


@functools.lru_cache
def scene(size=(64, 96), frames=13):
    return data.SyntheticHOI("val", size=size, frames=frames)[0]


def cameras_of(sample):
    return sample["intrinsics"], sample["extrinsics"]


def same(a, b):
    """Bit for bit equality of nested dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def fit(network, loss_of, steps, rate):
    """First and last loss of a few Adam steps on one example."""
    optimiser = torch.optim.Adam(network.parameters(), rate)
    losses = []
    for _ in range(steps):
        losses.append(loss_of())
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    return losses[0].item(), losses[-1].item()


# ---------------------------------------------------------------- geometry and representation

def test_project_and_unproject_are_inverse():
    cameras, points = cameras_of(scene()), 0.2 * torch.randn(3, 4, 50, 3)
    uv, depth = data.project(points, *cameras)
    assert uv.shape == (3, 4, 50, 2) and depth.shape == (3, 4, 50) and (depth > 0).all()
    assert torch.allclose(data.unproject(uv, depth, *cameras), points, atol=1e-4)
    homogeneous = torch.cat([points[1, 2, 7], torch.ones(1)])                     # by hand
    x, y, z = cameras[0][1] @ (cameras[1][1] @ homogeneous)[:3]
    assert torch.allclose(uv[1, 2, 7], torch.stack([x / z, y / z]), atol=1e-2)


def test_pixel_centres_are_at_half():
    intrinsics = torch.tensor([[[10., 0, 3], [0, 10, 2], [0, 0, 1]]])             # 6 x 4 pixels
    uv, _ = data.project(torch.tensor([[[0, 0, 1.], [-.25, -.15, 1]]]), intrinsics,
                         torch.eye(4)[None])
    assert torch.allclose(uv[0], torch.tensor([[3., 2], [.5, .5]]))   # middle, first pixel's centre
    first = data.plucker_rays(intrinsics, torch.eye(4)[None], (4, 6))[0, :3, 0, 0]
    assert torch.allclose(first, F.normalize(torch.tensor([-.25, -.15, 1]), dim=0), atol=1e-6)


def test_plucker_rays_pass_through_their_pixels():
    cameras = cameras_of(scene())
    direction, moment = data.plucker_rays(*cameras, (64, 96)).movedim(1, -1).split(3, -1)
    v, u = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    uv = torch.stack([u, v], -1).expand(3, -1, -1, -1)
    points = data.unproject(uv, 0.3 + torch.rand(3, 64, 96), *cameras)
    assert torch.allclose(direction.norm(dim=-1), torch.ones(3, 64, 96), atol=1e-5)
    assert (direction * moment).sum(-1).abs().max() < 1e-5
    assert torch.allclose(torch.linalg.cross(points, direction), moment, atol=1e-4)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_nearest_track_wins_and_background_is_told_apart(order):
    camera = torch.tensor([[[20., 0, 12], [0, 20, 8], [0, 0, 1]]]), torch.eye(4)[None]
    tracks = torch.tensor([[[[0.02, 0.02, 1.0], [0.04, 0.04, 2.0]]]])[:, :, order]  # on one ray
    pseudo, scale = data.tracks_to_pseudo_video(tracks, *camera, (16, 24), radius=1)
    assert pseudo.shape == (1, 3, 1, 16, 24) and scale.tolist() == [[1, 2]]
    assert torch.allclose(pseudo[0, :, 0, 8, 12], torch.tensor([12.4 / 24, 8.4 / 16, 0.3]))
    assert pseudo[0, 2, 0, 0, 0] == 0 and ((pseudo[:, 2] == 0) | (pseudo[:, 2] >= 0.29)).all()


@pytest.mark.parametrize("size, frames, millimetres", [((64, 96), 13, 10), ((128, 192), 5, 5)])
def test_representation_round_trip(size, frames, millimetres):
    sample = scene(size, frames)
    anchors, _ = data.project(sample["tracks"][:, 0], *cameras_of(sample))
    found, kept, valid = data.pseudo_video_to_tracks(
        (sample["pseudo"] + 1) / 2, sample["scale"], *cameras_of(sample), 256, anchors)
    error = 1000 * (found - sample["tracks"]).norm(dim=-1)
    assert torch.equal(kept, anchors) and error[sample["visible"]].median() < millimetres
    recovered = valid & (error < 3 * millimetres)
    assert recovered[sample["visible"]].float().mean() > 0.9


def test_drawn_tracks_are_read_back():
    sample = scene()
    drawn, scale = data.tracks_to_pseudo_video(sample["tracks"], *cameras_of(sample), (64, 96))
    tracks, anchors, valid = data.pseudo_video_to_tracks(drawn, scale, *cameras_of(sample), 100)
    assert tracks.shape == (3, 13, 100, 3) and anchors.shape == (3, 100, 2)
    uv, _ = data.project(tracks[:, 0], *cameras_of(sample))
    assert valid.float().mean() > 0.7 and torch.allclose(uv, anchors, atol=1e-2)
    nearest = torch.cdist(tracks[:, 0], sample["tracks"][:, 0]).amin(-1)
    assert nearest.median() < 0.01                       # metres: new slots, on the same surfaces


def test_anchors_stay_when_the_mask_changes_a_little():
    mask = scene()["pseudo"][:, 2, 0] > -0.7
    first = data.choose_anchors(mask, 200)
    column, row = first.long().unbind(-1)
    view = torch.arange(3)[:, None]
    assert mask[view, row, column].all() and len(set(map(tuple, first[0].tolist()))) == 200
    changed = mask.clone()
    changed[view, row[:, :9], column[:, :9]] = False
    second = data.choose_anchors(changed, 200, first)
    assert torch.equal(second[:, 9:], first[:, 9:])
    column, row = second.long().unbind(-1)
    assert changed[view, row, column].all() and len(set(map(tuple, second[0].tolist()))) == 200


# ---------------------------------------------------------------- the synthetic world

def test_world_is_deterministic_by_split_index_and_seed():
    def make(split="val", seed=0, index=3):
        return data.SyntheticHOI(split, seed=seed, **TINY)[index]
    first = make()
    assert same(first, make())
    for other in (make("train"), make(seed=1), make(index=4), make("unseen")):
        assert not torch.equal(first["video"], other["video"])
    both = data.SyntheticHOI("val", **TINY).batch([4, 3])      # rendered in company: the same
    assert torch.allclose(both["tracks"][1], first["tracks"], atol=1e-5)


def test_sample_dict():
    sample, (V, N, K) = scene(), (3, 13, 256)
    shapes = dict(video=(V, 3, N, 64, 96), pseudo=(V, 3, N, 64, 96), scale=(V, 2),
                  tracks=(V, N, K, 3), visible=(V, N, K), intrinsics=(V, 3, 3),
                  extrinsics=(V, 4, 4))
    assert {key: tuple(sample[key].shape) for key in shapes} == shapes
    assert re.fullmatch(r"<[a-z]+, [a-z ]+, [a-z]+>", sample["prompt"])
    for key in ("video", "pseudo"):
        assert sample[key].dtype == torch.float32 and sample[key].abs().max() <= 1
    assert sample["visible"].dtype == torch.bool and sample["visible"][:, 0].float().mean() > 0.98
    rotation = sample["extrinsics"][:, :3, :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand(3, 3, 3), atol=1e-5)


def test_splits_are_disjoint_and_rich():
    def words(split):
        world = data.SyntheticHOI(split, **TINY)
        return {world.describe(index)[1] for index in range(150)}
    train_words, val, unseen = map(words, data.SyntheticHOI.SPLITS)
    assert not unseen & (train_words | val) and len(unseen) >= 8 and len(train_words) >= 32
    parts = [set(column) for column in zip(*(w.strip("<>").split(", ") for w in train_words))]
    assert all(len(part) >= 6 for part in parts)                     # tools, actions, targets


def test_the_first_frame_does_not_tell_the_action():
    world = data.SyntheticHOI("val", **TINY)
    tool, _, target = world.describe(1)[1].strip("<>").split(", ")
    one, other = (world.scene(1, action) for action in world.actions(tool, target)[:2])
    assert one["prompt"] != other["prompt"]
    assert torch.allclose(one["video"][:, :, 0], other["video"][:, :, 0], atol=0.02)
    moved = (one["tracks"] - other["tracks"]).norm(dim=-1)
    assert moved[:, 0].max() < 1e-4 and moved[:, 1:].max() > 0.01                   # metres


def test_tracks_pseudo_video_and_depth_agree():
    sample = scene()
    uv, depth = data.project(sample["tracks"], *cameras_of(sample))
    anchors = uv[:, :1]
    assert torch.allclose(anchors, anchors.floor() + 0.5, atol=1e-2)     # pixel centres of frame 0
    column, row = uv.floor().long().unbind(-1)
    inside = (uv >= 0).all(-1) & (column < 96) & (row < 64)
    assert inside[sample["visible"]].all()
    view, frame = torch.arange(3)[:, None, None], torch.arange(13)[None, :, None]
    shown = (sample["pseudo"][view, :, frame, row.clamp(0, 63), column.clamp(0, 95)] + 1) / 2
    near, far = sample["scale"][:, None, None].unbind(-1)
    which = (shown[..., :2] * torch.tensor([96, 64]) - anchors).norm(dim=-1)[sample["visible"]]
    how_far = (near + (far - near) * (shown[..., 2] - 0.3) / 0.7 - depth)[sample["visible"]].abs()
    assert which.median() < 1 and (which < 4).float().mean() > 0.95
    assert how_far.median() < 0.005                                              # metres


def test_hands_and_objects_fill_the_picture():
    world = data.SyntheticHOI("train", **TINY)
    share = (world.batch(range(6))["pseudo"][:, :, 2] > -0.7).float().mean((1, 2, 3, 4))
    assert 0.2 < share.mean() < 0.45 and 0.1 < share.min() and share.max() < 0.6


def test_cache_gives_equal_samples_and_survives_damage(tmp_path):
    plain = data.SyntheticHOI("val", **TINY)[0]
    world = data.SyntheticHOI("val", cache=tmp_path, **TINY)
    written, read = world[0], world[0]
    file, = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])                                    # truncated
    for sample in (written, read, world[0]):
        assert same(sample["tracks"], plain["tracks"]) and sample["prompt"] == plain["prompt"]
        assert torch.allclose(sample["video"], plain["video"], atol=1e-6)


# ---------------------------------------------------------------- TACO
# (its tests go here)

# ---------------------------------------------------------------- VAE and MJD

def test_attention_equals_its_formula_and_the_fused_one():
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    mask = torch.rand(2, 1, 5, 7) > 0.4
    mask[..., 0] = True
    for m in (None, mask):
        weight = torch.einsum("bhqd,bhkd->bhqk", q, k).div(math.sqrt(8)).exp()
        weight = weight if m is None else weight * m
        expected = torch.einsum("bhqk,bhkd->bhqd", weight / weight.sum(-1, keepdim=True), v)
        for fused in (False, True):
            assert torch.allclose(mjd.attention(q, k, v, m, fused=fused), expected, atol=1e-5)


def test_rotary_positions_are_relative():
    table = [part.unflatten(0, (4, 4, 4)) for part in mjd.rotary_table(4, 4, 4, 24)]
    q, k = torch.randn(2, 24)

    def score(at, to):
        return mjd.rotate(q, *(p[at] for p in table)) @ mjd.rotate(k, *(p[to] for p in table))
    assert torch.allclose(score((0, 1, 2), (2, 1, 0)), score((1, 2, 3), (3, 2, 1)), atol=1e-5)
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert (score((0, 1, 2), (2, 1, 0)) - score(other, (2, 1, 0))).abs() > 1e-4


@torch.no_grad()
def test_vae_is_causal_both_ways(models):
    video, latents = torch.randn(1, 3, 9, 32, 48), torch.randn(1, 8, 3, 4, 6)
    code, picture = models.vae.encode(video), models.vae.decode(latents)
    assert code.shape == (1, 8, 3, 4, 6) and picture.shape == video.shape
    for frame, group in ((0, 0), (1, 1), (4, 1), (5, 2), (8, 2)):
        nudged = video.clone()
        nudged[:, :, frame] += 1
        change = (models.vae.encode(nudged) - code).abs().amax((0, 1, 3, 4))
        assert (change[:group] == 0).all() and change[group] > 1e-3
    for group, first in ((0, 0), (1, 1), (2, 5)):
        nudged = latents.clone()
        nudged[:, :, group] += 1
        change = (models.vae.decode(nudged) - picture).abs().amax((0, 1, 3, 4))
        assert (change[:first] == 0).all() and (change[first:first + 1] > 1e-3).all()
    with pytest.raises(ValueError, match="1 \\+ 4k"):
        models.vae.encode(video[:, :, :8])


@torch.no_grad()
def test_vae_has_statistics_per_modality(models):
    vae, video = copy.deepcopy(models.vae), torch.randn(1, 3, 5, 32, 48)
    raw = vae.encode(video, "motion")
    vae.latent_mean[1], vae.latent_std[1] = 3.0, 2.0
    assert torch.allclose(vae.encode(video, "motion"), (raw - 3) / 2, atol=1e-5)
    assert torch.allclose(vae.encode(video, "video"), raw, atol=1e-5)
    assert torch.allclose(vae.decode((raw - 3) / 2, "motion"), vae.decode(raw, "video"), atol=1e-4)
    assert {"latent_mean", "latent_std"} <= set(vae.state_dict())
    with pytest.raises(ValueError, match="modality"):
        vae.encode(video, "sound")


def mjd_arguments(net, views=3, frames=2):
    """One call of the MJD with everything in it, always the same."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 1, views, 8, frames, 4, 6, generator=generator)
    rays = torch.randn(1, views, 6, 32, 48, generator=generator)
    return dict(video=latents[0], motion=latents[1], t=torch.tensor([0.5]), rays=rays,
                text=net.text(["<spoon, stir, bowl>"]), guidance=latents[2],
                given=torch.tensor([[True] + [False] * (views - 1)]))


@torch.no_grad()
@pytest.mark.parametrize("silent", ["inter_view", "intra_view"])
def test_attention_mixes_views_or_times(models, silent):
    net = copy.deepcopy(models.mjd)
    for block in net.blocks:                                # leaves one of the two attentions
        nn.init.zeros_(getattr(block, silent).out.weight)
    arguments = mjd_arguments(net, frames=3)
    before = net(**arguments)[1]
    arguments["motion"][:, 1, :, 2] += torch.randn(8, 4, 6)                     # view 1, time 2
    change = (net(**arguments)[1] - before).abs().amax((0, 2, 4, 5))            # (views, times)
    expected = torch.zeros(3, 3, dtype=torch.bool)
    if silent == "intra_view":
        expected[:, 2] = True                               # all views, never another time
    else:
        expected[1] = True                                  # all times, never another view
    assert (change[expected] > 1e-4).all() and (change[~expected] < 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["text", "reference", "rays", "t", "guidance", "given"])
def test_every_condition_changes_the_estimate(models, name):
    net = models.mjd
    arguments = mjd_arguments(net)
    before = net(**arguments)
    other = dict(text=net.text(["<spoon, hit, bowl>"]), rays=arguments["rays"].flip(3),
                 t=torch.tensor([0.6]), guidance=None, given=torch.tensor([[True, True, False]]))
    if name == "reference":
        arguments["video"][:, :, :, 0] += 0.5
    else:
        arguments[name] = other[name]
    for a, b in zip(before, net(**arguments)):
        assert (a - b).abs().max() > 1e-4


def test_gradients_reach_every_parameter_of_the_mjd(models):
    net = copy.deepcopy(models.mjd).train()
    gradients = []
    for net.fused, net.checkpointing in ((False, False), (True, True)):
        net.zero_grad()
        sum(out.square().mean() for out in net(**mjd_arguments(net))).backward()
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters()})
    assert all(gradient.any() for gradient in gradients[0].values())
    assert all(torch.allclose(gradients[0][k], gradients[1][k], atol=1e-4) for k in gradients[0])


@torch.no_grad()
def test_a_new_mjd_predicts_nothing_and_takes_any_number_of_views():
    net = mjd.MJD(8, **mjd.PRESETS["tiny"]["mjd"])
    for views in (1, 2, 4):
        video, motion, scale = net(**mjd_arguments(net, views))
        assert not video.any() and not motion.any() and scale.shape == (1, views, 2)
    with pytest.raises(ValueError, match="bytes"):
        net.text(["x" * 64])


def test_paper_preset_has_the_papers_size():
    with torch.device("meta"):
        net = mjd.MJD(mjd.PRESETS["paper"]["vae"]["channels"], **mjd.PRESETS["paper"]["mjd"])
    parameters = mjd.count_parameters(net) - mjd.count_parameters(net.text)
    assert mjd.tokens_per_view(49, 480, 704, "paper") == 512 + 2 + 6 + 2 * 13 * 15 * 22 == 9100
    assert abs(parameters / 1e9 - 6.19) < 0.01 and len(net.blocks) == 30


def test_vae_overfits_one_scene(batch):
    vae = mjd.VideoVAE(**mjd.PRESETS["tiny"]["vae"])
    video = batch["video"][0]
    plain = F.mse_loss(vae.reconstruct(vae.moments(video)[0]), video)
    vae.init_from(video)                                        # principal components first
    first, last = fit(vae, lambda: F.mse_loss(vae.reconstruct(vae.moments(video)[0]), video),
                      40, 3e-3)
    assert first < 0.3 * plain and last < 0.6 * first


def test_mjd_overfits_one_scene(batch):
    net, scheduler = new_models(), cycle.DDIMScheduler()

    def loss():
        parts = cycle.joint_losses(net, batch, scheduler, use_dpa=False, text_dropout=0,
                                   generator=torch.Generator().manual_seed(0))
        return sum(parts.values())
    first, last = fit(net.mjd, loss, 40, 3e-3)
    assert last < 0.5 * first


# ---------------------------------------------------------------- DPA

def dpa_inputs(B=2, V=3, N=4, K=20):
    g = torch.Generator().manual_seed(0)
    truth = 0.1 * torch.randn(B, V, N, K, 3, generator=g) + torch.tensor([0, 0, 0.05])
    return dict(noisy=torch.randn(B, V, N, K, 3, generator=g), t=torch.rand(B, generator=g),
                coarse=truth, valid=torch.rand(B, V, N, K, generator=g) > 0.2,
                anchors=torch.rand(B, V, K, 2, generator=g),
                camera_centres=torch.randn(B, V, 3, generator=g))


@pytest.fixture(scope="session")
def aligner():
    torch.manual_seed(0)
    return awake(dpa.DPA(dim=32, depth=2, heads=2, patch=16))


def test_morton_code_equals_a_loop_over_bits():
    ijk = torch.randint(0, 1024, (50, 3))
    expected = [sum((int(c[a]) >> b & 1) << (3 * b + a) for a in range(3) for b in range(10))
                for c in ijk]
    assert dpa.morton_code(ijk, 10).tolist() == expected
    with pytest.raises(ValueError, match="integer"):
        dpa.morton_code(ijk.float(), 10)


@torch.no_grad()
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_sparse_convolution_equals_the_dense_one(share):
    conv, grid = dpa.SparseConv3d(3, 5), torch.randn(1, 3, 4, 5, 6)
    cells = torch.cartesian_prod(torch.arange(4), torch.arange(5), torch.arange(6))
    occupied = torch.rand(len(cells)) < share                 # submanifold: nothing elsewhere
    cells, dense = cells[occupied], grid * occupied.view(4, 5, 6)
    weight = conv.weight.reshape(3, 3, 3, 3, 5).permute(4, 3, 0, 1, 2)
    expected = F.conv3d(dense, weight, conv.bias, padding=1)[0].flatten(1).mT[occupied]
    keys, voxel, counts = dpa.voxelize((cells + 0.5)[None], 1.0)
    features = torch.empty(len(keys), 3)
    features[voxel[0]] = dense[0].flatten(1).mT[occupied]
    assert (counts == 1).all() and len(keys) == len(cells)
    assert torch.allclose(conv(features, dpa.voxel_neighbours(keys))[voxel[0]], expected, atol=1e-5)


def test_chamfer_equals_its_formula():
    a, b = torch.randn(2, 7, 3), torch.randn(2, 9, 3)
    square = (a[:, :, None] - b[:, None]).square().sum(-1)
    expected = square.amin(2).mean() + square.amin(1).mean()
    assert torch.allclose(dpa.chamfer_distance(a, b), expected, atol=1e-5)


@torch.no_grad()
def test_dpa_depends_on_neither_batch_mates_nor_garbage_nor_slots(aligner):
    x = dpa_inputs()
    alone = aligner(**{key: value[1:] for key, value in x.items()})
    assert torch.allclose(aligner(**x)[1:], alone, atol=1e-4)
    x["coarse"] = torch.where(x["valid"][..., None], x["coarse"], torch.nan)
    assert torch.allclose(aligner(**x)[1:], alone, atol=1e-4)
    order, x["valid"] = torch.randperm(20), torch.ones_like(x["valid"])
    moved = {k: v[..., order, :] if k in ("noisy", "coarse", "anchors") else v
             for k, v in x.items()}
    assert torch.allclose(aligner(**moved), aligner(**x)[..., order, :], atol=1e-4)


@torch.no_grad()
def test_dpa_mixes_views_and_uses_its_conditions(aligner):
    x = dpa_inputs(B=1)
    before = aligner(**x)
    nudged = x["noisy"].clone()
    nudged[:, 0] += 1
    assert (aligner(**{**x, "noisy": nudged}) - before)[:, 1:].abs().max() > 1e-4
    for key in ("coarse", "t", "anchors", "camera_centres", "valid"):
        other = ~x[key] if key == "valid" else x[key] * 0.9
        assert (aligner(**{**x, key: other}) - before).abs().max() > 1e-4, key
    with pytest.raises(ValueError, match="anchors"):
        aligner(**{**x, "anchors": x["anchors"][..., :1]})


def test_gradients_reach_every_parameter_of_the_dpa_in_bf16_too(aligner):
    net = copy.deepcopy(aligner)
    for enabled in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = net(**dpa_inputs())
        out.square().mean().backward()
        assert out.dtype == torch.float32 and torch.isfinite(out).all()
        assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_dpa_overfits_one_scene():
    torch.manual_seed(0)
    net, x = dpa.DPA(dim=32, depth=1, heads=2, patch=16), dpa_inputs(B=1)
    x["t"][:], target = 0.5, torch.randn_like(x["noisy"])
    first, last = fit(net, lambda: F.mse_loss(net(**x), target), 80, 1e-2)
    assert last < 0.3 * first


# ---------------------------------------------------------------- scheduler and loop

@pytest.mark.parametrize("path", ["flow", "cosine"])
def test_scheduler_velocity_and_prediction(path):
    scheduler, (clean, noise), t = cycle.DDIMScheduler(path), torch.randn(2, 4, 3, 5).double(), 0.3
    ahead, behind = (scheduler.add_noise(clean, noise, t + e) for e in (1e-3, -1e-3))
    velocity = scheduler.velocity(clean, noise, t)
    assert torch.allclose(velocity, (ahead - behind) / 2e-3, atol=1e-3)
    for t in (0.0, 1.0, torch.tensor([0.01, 0.3, 0.7, 0.99])):
        noisy, velocity = scheduler.add_noise(clean, noise, t), scheduler.velocity(clean, noise, t)
        for found, expected in zip(scheduler.predict(velocity, noisy, t), (clean, noise)):
            assert torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(scheduler.step(velocity, noisy, t, 0.0), clean, atol=1e-5)
    with pytest.raises(ValueError, match="flow"):
        cycle.DDIMScheduler("straight")


def test_flow_step_is_the_euler_step_of_eq_2():
    noisy, velocity = torch.randn(2, 4, 3)
    for t, t_next in ((1.0, 0.9), (0.5, 0.1), (0.2, 0.0)):
        stepped = cycle.DDIMScheduler("flow").step(velocity, noisy, t, t_next)
        assert torch.allclose(stepped, noisy - (t - t_next) * velocity, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_cosine_step_is_classic_ddim(eta):
    (clean, noise), t, t_next = torch.randn(2, 4, 3), 0.7, 0.4
    scheduler = cycle.DDIMScheduler("cosine")
    now, after = (math.cos(math.pi / 2 * x) ** 2 for x in (t, t_next))             # alpha bar
    deviation = eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after))
    fresh = torch.randn(4, 3, generator=torch.Generator().manual_seed(5))
    expected = (math.sqrt(after) * clean + math.sqrt(1 - after - deviation ** 2) * noise
                + deviation * fresh)
    noisy = math.sqrt(now) * clean + math.sqrt(1 - now) * noise
    stepped = scheduler.step(scheduler.velocity(clean, noise, t), noisy, t, t_next, eta,
                             torch.Generator().manual_seed(5))
    assert torch.allclose(stepped, expected, atol=1e-5)


def states(models, batch, steps=3, **switches):
    """All states of a sample of the batch's first scene, its first view given."""
    cameras = batch["intrinsics"][:1], batch["extrinsics"][:1]
    return list(cycle.sample(models, batch["video"][:1, :, :, 0], torch.tensor([[True, False]]),
                             batch["prompt"][:1], cameras, 5, steps, num_tracks=32, **switches))


@pytest.fixture(scope="session")
def result(models, batch):
    return states(models, batch)


def test_sampling_yields_every_step(result):
    assert [state.step for state in result] == [1, 2, 3] and result[0].t == 1 > result[1].t
    last = result[-1]
    assert last.tracks.shape == (1, 2, 5, 32, 3) and torch.isfinite(last.tracks).all()
    assert last.video().shape == (1, 2, 3, 5, 32, 48) and last.coarse.pseudo.shape[3] == 5


def test_zero_rounds_of_the_loop_equal_the_plain_sampler(models, batch, result):
    open_loop, plain = (states(models, batch, **off)[-1]
                        for off in (dict(cycle=False), dict(use_dpa=False)))
    assert same((open_loop.latents, open_loop.motion), (plain.latents, plain.motion))
    assert not torch.equal(open_loop.tracks, plain.tracks)          # the DPA has aligned them
    assert not torch.equal(result[-1].latents, plain.latents)       # the loop changes the video
    deaf = copy.deepcopy(models)
    for parameter in deaf.mjd.embed_guidance.parameters():
        nn.init.zeros_(parameter)
    closed = states(deaf, batch)[-1]
    open_loop = states(deaf, batch, cycle=False)[-1]
    assert same((closed.latents, closed.tracks), (open_loop.latents, open_loop.tracks))


@pytest.mark.parametrize("switch", [dict(seed=1), dict(text_scale=2.0), dict(cycle_every=2),
                                    dict(shift=3.0), dict(eta=0.5), dict()], ids=str)
def test_sampling_is_deterministic_and_every_switch_does_something(models, batch, result, switch):
    last = states(models, batch, **switch)[-1]
    equal = torch.equal(last.latents, result[-1].latents)
    assert equal == (not switch) and same(last.tracks, result[-1].tracks) == (not switch)


def test_reference_stays_and_hidden_ones_are_ignored(models, batch, result):
    reference = cycle.encode(models.vae, batch["video"][:1, :, :, :1], "video")
    assert torch.equal(result[-1].latents[:, 0, :, 0], reference[:, 0, :, 0])
    other = {**batch, "video": batch["video"].clone()}
    other["video"][:, 1] = 0
    assert torch.equal(states(models, other)[-1].latents, result[-1].latents)
    other["video"][:, 0] = 0
    assert not torch.equal(states(models, other)[-1].latents, result[-1].latents)


def test_sample_refuses_what_does_not_fit(models, batch):
    for wrong in (dict(steps=0), dict(cycle_every=0)):
        with pytest.raises(ValueError, match="expected"):
            states(models, batch, **wrong)
    with pytest.raises(ValueError, match="prompt"):
        states(models, {**batch, "prompt": []})


def test_joint_losses_follow_algorithm_1(batch):
    models, scheduler = new_models(), cycle.DDIMScheduler()

    def losses(**switches):
        return cycle.joint_losses(models, batch, scheduler, **switches,
                                  generator=torch.Generator().manual_seed(0))
    closed, opened = losses(), losses(use_guidance=False)
    assert set(closed) == {"video", "motion", "scale", "points", "chamfer"}
    assert same(closed, losses()) and closed["motion"] != opened["motion"]
    assert set(losses(use_dpa=False)) == {"video", "motion", "scale"}
    sum(closed.values()).backward()
    for network in (models.mjd, models.dpa):
        assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in network.parameters())
    assert all(p.grad is None for p in models.vae.parameters())             # frozen
