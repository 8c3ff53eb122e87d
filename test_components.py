"""Behaviour tests of every script: `pytest test_components.py`, CPU only, no network.

Networks have the `tiny` preset: fresh ones whose zeros are replaced by noise, or a short run's.
"""

import ast
import contextlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cycle
import data
import dpa
import mjd
import sample
import train

HERE = Path(__file__).parent
SCRIPTS = [HERE / name for name in "data.py mjd.py dpa.py cycle.py train.py sample.py".split()]
REF = HERE / "assets/ref.png"
TINY = dict(size=(32, 48), frames=5, views=2, stride=4)
each = pytest.mark.parametrize
torch.set_num_threads(1)             # on small tensors, threads mostly wait for one another


@pytest.fixture(autouse=True)
def reproducible(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(train, "validate", lambda *arguments: None)    # session fixtures have it


@pytest.fixture
def models():
    """Tiny networks with their zeros replaced by noise, so that every path carries something."""
    models = cycle.Models(train.PRESETS["tiny"] | {"path": "flow"})
    for parameter in models.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return models


@pytest.fixture(scope="session")
def batch():
    return data.SyntheticHOI("train", **TINY).batch([0, 1])


@pytest.fixture(scope="session")
def scene():
    return data.SyntheticHOI("val")[1]


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance


class Hostile(str):
    """A path at which a careless reader of this pickle makes a folder."""
    def __reduce__(self):
        return os.mkdir, (str(self),)


class TestMotionRepresentation:
    def test_projection_and_rays_agree(self, scene):
        cameras = scene["intrinsics"], scene["extrinsics"]
        uv = data.pixel_centres((64, 96)).expand(3, -1, -1, -1)
        depth = 0.3 + torch.rand(3, 64, 96)
        points = data.unproject(uv, depth, *cameras)
        again, _ = data.project(points, *cameras)
        assert close(again, uv, 1e-3)
        rays = data.plucker_rays(*cameras, (64, 96)).movedim(1, -1)
        direction, moment = rays.split(3, -1)
        assert close(torch.linalg.cross(points, direction), moment, 1e-4)    # on its ray

    @each("order", [[0, 1], [1, 0]])
    def test_the_nearest_track_wins_whatever_the_order(self, order):
        camera = torch.tensor([[[20., 0, 12], [0, 20, 8], [0, 0, 1]]]), torch.eye(4)[None]
        tracks = torch.tensor([[[[0.02, 0.02, 1], [0.04, 0.04, 2]]]])[:, :, order]      # one ray
        pseudo, _ = data.tracks_to_pseudo_video(tracks, None, *camera, (16, 24))
        assert close(pseudo[0, :, 0, 8, 12], torch.tensor([0.51667, 0.525, 0.3]))
        assert close(pseudo[0, :, 0, 0, 0], torch.tensor([0.02083, 0.03125, 0]))       # background

    def test_votes_undo_the_drawing(self, scene):
        cameras = scene["intrinsics"], scene["extrinsics"]
        truth, seen, scale = scene["tracks"], scene["visible"], scene["scale"]
        whole = (scene["pseudo"] + 1) / 2
        noisy = whole + 0.03 * torch.randn_like(whole)
        drawn, _ = data.tracks_to_pseudo_video(truth, seen, *cameras, (64, 96), scale)
        for pseudo, limit in ((whole, 0.004), (noisy, 0.009), (drawn, 0.004)):
            tracks, _ = data.pseudo_video_to_tracks(pseudo, scale, *cameras, 4)
            error = (tracks - truth).norm(dim=-1)
            assert error[seen].median() < limit                              # metres


class TestDataSets:
    def test_frame_0_does_not_tell_the_action(self):
        world = data.SyntheticHOI("val", **TINY)
        tool, _, target = world[2]["prompt"].strip("<>").split(", ")
        one, *others = [world.scene(2, action) for action in world.actions(tool, target)]
        for other in others:
            moved = (one["tracks"] - other["tracks"]).norm(dim=-1)
            assert close(one["video"][:, :, 0], other["video"][:, :, 0], 0.05)
            assert moved[:, 0].max() < 1e-4 < 0.01 < moved.max()             # metres

    def test_splits_are_disjoint_and_unseen_words_are_seen(self, tree):
        splits = [{*data.SyntheticHOI(name).triplets} for name in ("train", "val", "unseen")]
        assert splits[0] == splits[1]
        assert not splits[0] & splits[2]
        for seen, unseen in zip(zip(*splits[0]), zip(*splits[2])):           # action, tool, target
            assert set(unseen) <= set(seen)
            assert len(set(seen)) >= 5
        assert TREE[0] not in data.TACO(*tree, "train").names

    @each("views", [1, 2, 3, 4, 40])
    def test_any_number_of_views_is_spread_evenly_and_samples(self, models, views):
        world = data.SyntheticHOI("val", size=(16, 16), frames=5, views=views)
        assert states(models, world.batch([0]))[-1].tracks.shape == (1, views, 5, 16, 3)
        _, extrinsics = data.camera_rig(views, (16, 16))
        x, y, z = data.camera_centres(extrinsics).T
        steps = (x / y).atan().diff().abs()
        assert views < 3 or steps.min() > 0.8 * steps.max()

    def test_cameras_that_see_the_horizon_give_finite_colours(self, monkeypatch):
        level = data.camera(torch.tensor([0., .6, .1]), torch.tensor([0., 0, .1]), 60., (32, 48))
        monkeypatch.setattr(data, "camera_rig", lambda *arguments: level)
        video = data.SyntheticHOI("val", **TINY | {"views": 1})[0]["video"]
        assert video.isfinite().all()

    def test_scenes_are_deterministic_and_the_cache_survives_damage(self, tmp_path):
        plain = data.SyntheticHOI("val", **TINY)[0]
        for split, seed, index in (("train", 0, 0), ("unseen", 0, 0), ("val", 1, 0), ("val", 0, 1)):
            other = data.SyntheticHOI(split, seed=seed, **TINY)[index]
            assert not close(other["video"], plain["video"], 0.1)
        for number in range(3):                                     # written, read, mended
            found = data.SyntheticHOI("val", cache=tmp_path, **TINY)[0]
            for key in ("tracks", "video", "pseudo"):
                assert close(found[key], plain[key])
            for file in tmp_path.iterdir() if number else ():
                file.write_bytes(file.read_bytes()[:1000])

    @each("kind, least, metres", [("world", 0.2, 0.005), ("TACO", 0.05, 0.03)])
    def test_both_mean_the_same(self, kind, least, metres, scene, tree):
        first, part = scene["tracks"][:, 0], scene["part"]
        found, leftwards = scene, first[part == 1].mean(0) - first[part == 0].mean(0)
        if kind == "TACO":
            found = data.TACO(*tree, "unseen", size=(48, 72), frames=4)[0]
            leftwards = torch.tensor([-1., 0, 0])
        tracks, visible, pseudo = found["tracks"], found["visible"], (found["pseudo"] + 1) / 2
        assert re.fullmatch("<[a-z]+, [a-z ]+, [a-z]+>", found["prompt"])
        assert least < (pseudo[:, 2] > 0.15).float().mean() < 0.45
        # View 0 is the person's left, and one looks at the scene in metres.
        along = data.camera_centres(found["extrinsics"]) @ leftwards
        assert (along.diff() < 0).all()
        cameras = found["intrinsics"], found["extrinsics"]
        uv, depth = data.project(tracks, *cameras)
        assert 0.2 < depth[visible].min() < depth[visible].max() < 2
        # Track k is what cell k shows in frame 0; background is never visible and 0.
        anchors = data.track_grid(pseudo.shape[3:], 4)
        assert (uv[:, 0] - anchors)[visible[:, 0]].abs().max() < 0.6
        assert not tracks[~visible.any(1, keepdim=True).expand_as(visible)].any()
        # The pseudo video says which and how deep the tracks are; scale is the range.
        read, _ = data.pseudo_video_to_tracks(pseudo, found["scale"], *cameras, 4)
        error = (read - tracks).norm(dim=-1)
        assert error[visible].median() < metres
        foreground = pseudo[0, 2][pseudo[0, 2] > 0.15]
        assert close(torch.stack(foreground.aminmax()), torch.tensor([0.3, 1]), 1e-4)


def arguments_of(kind):
    """One call of the MJD or of the DPA, at t = 1, where the noise says nothing; three views."""
    randn, one = torch.randn, torch.ones(2)
    if kind == "mjd":
        return dict(video=randn(1, 3, 8, 3, 4, 6), motion=randn(1, 3, 8, 3, 4, 6), t=one[:1] / 2,
                    guidance=randn(1, 3, 2, 8, 3, 4, 6), rays=randn(1, 3, 6, 32, 48),
                    path=torch.tensor([[0.5], [0.5], [-1], [1]]), prompts=["<spoon, stir, bowl>"],
                    given=torch.tensor([[True, False, False]]))
    return dict(noisy=randn(2, 3, 4, 20, 3), coarse=randn(2, 3, 4, 20, 3) / 10, t=one,
                valid=torch.rand(2, 3, 4, 20) > 0.7, camera_centres=randn(2, 3, 3),
                path=torch.tensor([[0.], [1], [-1], [1]]), anchors=torch.rand(20, 2))


class TestNetworks:
    @each("fused, masked", [(False, False), (False, True), (True, False), (True, True)])
    def test_attention_equals_its_formula(self, fused, masked):
        q, k, v = torch.randn(3, 2, 3, 7, 8)
        mask = torch.eye(7) + torch.rand(2, 1, 7, 7) > 0.5 * masked
        weight = (q.double() @ k.double().mT / math.sqrt(8)).exp() * mask
        expected = weight @ v.double() / weight.sum(-1, keepdim=True)
        assert close(mjd.attention(q, k, v, fused, mask if masked else None), expected)

    @each("name, shape, changes", [
        ("encode", (1, 3, 9, 32, 48), [(0, 0), (1, 1), (4, 1), (5, 2)]),
        ("decode", (1, 8, 3, 4, 6), [(0, 0), (1, 1), (2, 5)])])
    def test_the_vae_is_causal(self, models, name, shape, changes):
        function, x = getattr(models.vae, name), torch.randn(shape) / 9
        for index, first in changes:                       # nothing before `first` may change
            nudged = x.clone()
            nudged[:, :, index] += 0.1
            change = (function(nudged) - function(x)).abs().amax((0, 1, 3, 4))
            assert not change[:first].any()
            assert change[first] > 1e-4

    @each("silent, mixed", [("inter_view", (1, slice(3))), ("intra_view", (slice(3), 2))])
    def test_one_attention_mixes_views_and_the_other_times(self, models, silent, mixed):
        for block in models.mjd.blocks:                           # leaves one of the two
            mjd.zero_init(getattr(block, silent).out)
        arguments = arguments_of("mjd")
        before = models.mjd(**arguments)[1]
        arguments["motion"][:, 1, :, 2] += 1                                 # view 1, time 2
        change = (models.mjd(**arguments)[1] - before).abs().amax((0, 2, 4, 5))
        assert change[mixed].min() > 1e-4                                    # (views, times)
        change[mixed] = 0
        assert change.max() < 1e-6

    @each("name", """mjd.video mjd.prompts mjd.guidance mjd.t mjd.rays mjd.given dpa.noisy dpa.t
        dpa.coarse dpa.valid dpa.anchors dpa.camera_centres""".split())
    def test_every_condition_changes_all_estimates(self, models, name):
        kind, key = name.split(".")
        network, arguments = getattr(models, kind), arguments_of(kind)
        before, value = network(**arguments), arguments[key]
        arguments[key] = ["<spoon, hit, bowl>"]
        if key != "prompts":
            arguments[key] = ~value if value.dtype == torch.bool else 0.9 * value
        for one, two in zip(before, network(**arguments)):
            assert not close(one, two, 1e-4)

    def test_the_aligner_looks_at_neither_batch_mates_nor_garbage(self, models):
        arguments = arguments_of("dpa")
        arguments["valid"][1, :, :, 5:] = False                  # fewer tracks than its mate
        before = models.dpa(**arguments)
        arguments["coarse"][~arguments["valid"]] = torch.nan
        assert close(models.dpa(**arguments), before, 1e-4)
        alone = {key: value[1:] for key, value in arguments.items()}
        alone |= {key: arguments[key] for key in ("path", "anchors")}
        assert close(models.dpa(**alone), before[1:], 1e-4)

    def test_under_autocast_blocks_receive_bf16(self, models, batch):
        seen = []
        for block in (*models.mjd.blocks, *models.dpa.blocks):
            block.register_forward_pre_hook(lambda block, given: seen.append(given[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            cycle.joint_losses(models, batch, torch.ones(2, 2) > 0)
        assert seen == [torch.bfloat16] * 8

    @each("path, t", [("flow", 0.2), ("flow", 0.9), ("cosine", 0.2), ("cosine", 0.9)])
    def test_posterior_velocity_equals_a_numeric_posterior(self, path, t):
        known = cycle.DDIMScheduler(path).coefficients(torch.tensor([t]).double())
        alpha, sigma, alpha_dot, sigma_dot = known
        estimate, deviation, z_t = torch.tensor([[0.7], [0.5], [-0.8]]).double()
        z_0 = torch.linspace(-4, 5, 20001).double()              # every clean number there may be
        z_1 = (z_t - alpha * z_0) / sigma
        surprise = ((z_0 - estimate) / deviation).square() + z_1.square()
        expected = (-surprise / 2).softmax(0) @ (alpha_dot * z_0 + sigma_dot * z_1)
        assert close(mjd.posterior_velocity(estimate, deviation, z_t, known), expected)

    def test_morton_code_interleaves_bits(self):
        cells = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [3, 5, 1], [1023, 0, 1]])
        assert dpa.morton_code(cells, 10).tolist() == [1, 2, 4, 0b010001111, 153391693]

    def test_chamfer_distance_equals_its_formula(self):
        a, b = torch.randn(2, 7, 3), torch.randn(2, 9, 3)
        square = torch.cdist(a, b).square()
        expected = square.amin(1).mean() + square.amin(2).mean()
        assert close(dpa.chamfer_distance(a, b), expected)

    def test_sparse_convolution_equals_a_dense_one(self):
        conv, occupied = dpa.SparseConv3d(3, 5), torch.rand(4, 5, 6) < 0.5
        dense = torch.randn(3, 4, 5, 6) * occupied               # submanifold: nothing elsewhere
        weight = conv.weight.view(3, 3, 3, 3, 5).permute(4, 3, 0, 1, 2)
        expected = F.conv3d(dense[None], weight, conv.bias, padding=1)[0]
        keys, (voxel,) = dpa.voxelize(occupied.nonzero()[None] + 0.5, 1.0)
        features = torch.empty(len(keys), 3)
        features[voxel] = dense[:, occupied].mT
        found = conv(features, dpa.voxel_neighbours(keys))
        assert close(found[voxel], expected[:, occupied].mT)


def states(models, batch, **switches):
    """All states of a sample of the batch's first scene, of which the first view is given."""
    first = {key: value[:1] for key, value in batch.items()}
    given = torch.arange(first["video"].shape[1])[None] == 0
    cameras = first["intrinsics"], first["extrinsics"]
    return [*cycle.sample(models, first["video"][:, :, :, 0], given, first["prompt"], cameras,
                          steps=3, temperature=1.0, **switches)]


class TestLoop:
    @each("path, eta", [("flow", 0), ("cosine", 0), ("cosine", 0.5), ("cosine", 1)])
    def test_the_scheduler_equals_euler_and_classic_ddim(self, path, eta):
        scheduler, (clean, noise, fresh) = cycle.DDIMScheduler(path), torch.randn(3, 4, 3).double()
        t, t_next = torch.tensor([[0.7], [0.4]]).double().expand(2, 4)
        noisy = scheduler.add_noise(clean, noise, t)
        velocity = scheduler.velocity(clean, noise, t)
        ahead = scheduler.add_noise(clean, noise, t + 1e-4)
        assert close(velocity, (ahead - noisy) / 1e-4, 1e-3)                 # the path's derivative
        assert close(scheduler.predict(velocity, noisy, t)[0], clean)
        expected = noisy - 0.3 * velocity                                    # Euler, Eq. 2
        if path == "cosine":                 # the formula of the DDIM paper, with its alpha bar
            now, after = math.cos(0.35 * math.pi) ** 2, math.cos(0.2 * math.pi) ** 2
            new = eta ** 2 * (1 - after) / (1 - now) * (1 - now / after)
            kept = math.sqrt(1 - after - new)
            expected = math.sqrt(after) * clean + kept * noise + math.sqrt(new) * fresh
        assert close(scheduler.step(velocity, noisy, t, t_next, eta, fresh), expected)

    def test_zero_rounds_equal_the_plain_sampler(self, models, batch):
        closed, opened = states(models, batch), states(models, batch, loop=False)
        for one, other in zip(opened, states(models, batch, aligned=False)):
            assert torch.equal(one.z_V, other.z_V)
        assert torch.equal(closed[0].z_V, opened[0].z_V)            # the first step is unguided
        assert not close(closed[1].z_V, opened[1].z_V)

    @each("loop, aligned", [(True, True), (False, True), (False, False)])
    def test_gradients_of_algorithm_1_reach_every_parameter(self, models, batch, loop, aligned):
        models.mjd.checkpointing = models.dpa.checkpointing = loop
        losses = cycle.joint_losses(models, batch, torch.eye(2) > 0, loop, aligned)
        sum(losses.values()).backward()
        for name, parameter in models.named_parameters():
            expected = name.startswith(("mjd", "dpa")[:1 + aligned])
            if "guidance" in name:
                expected = loop
            assert (parameter.grad is not None and parameter.grad.any()) == expected, name

    @each("stage, path", [("vae", "flow"), ("base", "flow"), ("base", "cosine"), ("dpa", "flow")])
    def test_each_network_overfits_one_scene(self, models, batch, stage, path):
        models.scheduler = cycle.DDIMScheduler(path)
        optimiser, losses = torch.optim.Adam(models.parameters(), 3e-3), []
        for _ in range(40):
            torch.manual_seed(0)
            loss = sum(train.stage_losses(stage, models, dict(batch)).values())
            losses.append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert losses[-1] < 0.5 * losses[0]


TREE = ["(hammer, spoon, bowl)/20231105_019", "(pour in some, cup, bowl)/20231105_020",
        "(stir, ruler, box)/20231105_021", "(stir, spoon, pan)/20231105_022",
        "(stir, spoon, cup)/20231105_023"]
PARTS = "Hand_Poses", "Object_Poses", "Allocentric_Camera_Parameters", "Allocentric_RGB_Videos"
BOX = """v -6 -4 -2;v -6 -4 2;v -6 4 -2;v -6 4 2;v 6 -4 -2;v 6 -4 2;v 6 4 -2;v 6 4 2;f 1 2 4;f 1 4 3
f 5/1 7/1 8/1;f 5 8 6;f 1 5/1/1 6;f 1 6 2;f 3 4 8;f 3 8 7;f 1 3 7;f 1 7 5;f 2 6 8;f 2 8 4"""
Ch, Select, csc_matrix = [type(name, (), {"__module__": __name__})
                          for name in ("Ch", "Select", "csc_matrix")]
PARENTS = [2 ** 32 - 1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14]


def write_mano(path, rng):
    """A MANO pickle of triangles here and there, with chumpy's and scipy's globals."""
    inner, shapes, joints = Ch(), Select(), csc_matrix()
    inner.x = rng.normal(0, 1e-3, 778 * 30)
    shapes.a = inner
    shapes.idxs = np.arange(778 * 30)
    shapes.preferred_shape = (778, 3, 10)
    joints._shape = (16, 778)
    joints.indptr = np.arange(779).clip(0, 16)                       # joint j is vertex j
    joints.indices = np.arange(16)
    joints.data = [1.0] * 16
    content = dict(shapedirs=shapes, J_regressor=joints, unused={1, 2})
    content["v_template"] = rng.normal(0, 0.03, (778, 3))
    content["posedirs"] = rng.normal(0, 1e-4, (778, 3, 135))
    content["weights"] = rng.dirichlet([1] * 16, 778)
    content["f"] = rng.integers(0, 778, (200, 3))
    content["kintree_table"] = np.array([PARENTS, PARENTS])
    text = pickle.dumps(content, 2).decode("latin1")
    text = text.replace(f"c{__name__}\nCh", "cchumpy.ch\nCh")
    text = text.replace(f"c{__name__}\nSelect", "cchumpy.reordering\nSelect")
    text = text.replace(f"c{__name__}\ncsc", "cscipy.sparse.csc\ncsc")
    path.write_text(text, "latin1", newline="")


def ring_of_cameras():
    """calibration.json of 6 cameras around a person who looks along +y."""
    cameras = {}
    for angle in (-1.1, -1.0, -0.1, 0.1, 1.0, 1.1):
        eye = torch.tensor([math.sin(angle), math.cos(angle), 0.6])
        lens, pose = data.camera(0.9 * eye, torch.zeros(3), 240.0, (192, 256))
        cameras[str(angle)] = dict(K=lens[0].tolist(), R=pose[0, :3, :3].tolist(),
                                   T=pose[0, :3, 3].tolist(), imgSize=[256, 192])
    return cameras


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """Sequences in TACO's layout with the same motion, and MANO files: (root, mano_dir)."""
    root, rng = tmp_path_factory.mktemp("TACO"), np.random.default_rng(0)
    hands, objects, calibration, videos = [root / part / TREE[0] for part in PARTS]
    for folder in (hands, objects, calibration, videos, root / "Object_Models"):
        folder.mkdir(parents=True)
    points, wave = [], torch.arange(16).sin() / 10
    for side, x in (("left", -0.12), ("right", 0.12)):
        write_mano(root / f"MANO_{side.upper()}.pkl", rng)
        frames = {}
        for n, height in enumerate(wave):              # tensors or arrays, with or without a shape
            place = np.array([x, -0.1, height])
            pose = height.repeat(48).requires_grad_()
            frames[f"{n:05d}"] = dict(hand_pose=pose, hand_trans=place)
        (hands / f"{side}_hand.pkl").write_bytes(pickle.dumps(frames))
        model = data.load_mano(root, side.upper())
        points.append(data.mano_vertices(model, *data.read_hand(hands, side)))
    (hands / "left_hand_shape.pkl").write_bytes(pickle.dumps({"hand_shape": torch.zeros(1, 10)}))
    pose = torch.eye(4).repeat(16, 1, 1)
    pose[:, 0, 3] = wave
    for role in ("tool", "target"):
        np.save(objects / f"{role}_{role}.npy", pose.numpy())
        (root / "Object_Models" / f"{role}_cm.obj").write_text(BOX.replace(";", "\n"))
    inside = (torch.rand(2000, 3) - 0.5) * torch.tensor([0.12, 0.08, 0.04])
    points.append(inside + pose[:, None, :3, 3])
    cameras = ring_of_cameras()
    (calibration / "calibration.json").write_text(json.dumps(cameras))
    for serial, camera in cameras.items():
        pose = data.affine(torch.tensor(camera["R"]), torch.tensor(camera["T"]))
        clip, _ = data.tracks_to_pseudo_video(torch.cat(points, 1)[None], None, torch.tensor(
            [camera["K"]]), pose[None], (192, 256), radius=2)
        frames = (255 * clip[0]).byte().permute(1, 2, 3, 0)
        iio.imwrite(videos / f"{serial}.mp4", frames.numpy(), fps=30, quality=9)
    for part, name in itertools.product(PARTS, TREE[1:]):
        shutil.copytree(root / part / TREE[0], root / part / name)
    return root, root


def test_blemishes_cost_one_line_each_and_execute_nothing(tree, tmp_path, capsys):
    root = shutil.copytree(tree[0], tmp_path / "TACO")
    videos = root / "Allocentric_RGB_Videos"
    (videos / TREE[0] / "1.0.mp4").unlink()
    for path in (videos / TREE[1]).iterdir():
        path.write_bytes(path.read_bytes()[:3000])                       # truncated
    (root / "Object_Poses" / TREE[2] / "tool_tool.npy").unlink()
    hostile = pickle.dumps({"00001": Hostile(root / "executed")})
    (root / "Hand_Poses" / TREE[3] / "left_hand.pkl").write_bytes(hostile)
    cameras = ring_of_cameras()
    for camera in cameras.values():
        camera["T"][0] += 0.15                                           # 15 cm to the side
    (root / PARTS[2] / TREE[4] / "calibration.json").write_text(json.dumps(cameras))
    dataset = data.TACO(root, tree[1], "all", size=(32, 48), frames=3, cache=tmp_path)
    for index in (0, 1, 2, 3, 4, 0, 1, 2, 3, 4):
        assert dataset[index]["prompt"] == "<spoon, hammer, bowl>"
    assert capsys.readouterr().out.count("\n") == len(dataset.report) == 5
    words = "no video", "frames", "tool", "mkdir", "wrong calibration"
    for name, word in zip([f"{TREE[0]}/1.0", *TREE[1:]], words):
        assert word in dataset.report[name]
    assert not (root / "executed").exists()


def call(program, flags):
    """The exit code of a program, or of argparse."""
    try:
        return program.main(flags.split())
    except SystemExit as stop:
        return stop.code


def one_line(capsys):
    """The error a program has printed: one sentence, its own or argparse's after the usage."""
    error = capsys.readouterr().err.strip()
    assert "usage:" in error or re.fullmatch("(train|sample).py: .{5,510}", error)
    return error


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """train.py at its smallest, into a folder, with some flags: its exit code."""
    def run(out, flags):
        return call(train, f"{run.fixed} --out {out} {flags}")
    run.fixed = (f"--preset tiny --device cpu --precision fp32 --workers 0 --batch 1 --scenes 4 "
                 f"--cache {tmp_path_factory.mktemp('cache')}")
    return run


@pytest.fixture(scope="session")
def trained(run, tmp_path_factory):
    """The folder of a run through all stages."""
    out = tmp_path_factory.mktemp("run")
    assert run(out, "--stage all --steps 2 --workers 1") == 0
    return out


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def stop_in_step(monkeypatch, step, killed=False):
    """Ctrl-C, or the end, in the middle of a step."""
    losses, calls = train.stage_losses, itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == step:
            1 / 0 if killed else signal.raise_signal(2)
        return losses(*arguments)
    monkeypatch.setattr(train, "stage_losses", interrupted)


PAIR = """
import torch, train
seed, batches = torch.manual_seed, train.batches
torch.manual_seed = lambda number: seed(number // 2)                   # both draw what one would
train.batches = lambda dataset, count, seed=0, *rest: batches(dataset, count, seed // 2, *rest)
raise SystemExit(train.main())
"""


def spoiled(key, change):
    """A data set in which one part of a sample is not as it should be."""
    class Spoiled(data.SyntheticHOI):
        def __getitem__(self, index):
            found = super().__getitem__(index)
            return found | {key: change(found[key])}
    return data, "Spoiled", Spoiled


def failing(error):
    """A function that fails: a network, a disk, a machine without shared memory."""
    def fail(*arguments, num_workers=1, **keywords):
        if num_workers:
            raise error
        return torch.utils.data.DataLoader(*arguments, **keywords)
    return fail


class TestTraining:
    @each("stage, step", [("vae", 2), ("base", 2), ("joint", 2), ("all", 3)])
    def test_resume_equals_an_uninterrupted_run(self, run, tmp_path, monkeypatch, stage, step):
        handler = signal.getsignal(signal.SIGINT)
        flags = f"--stage {stage} --steps {4 - step % 2 * 2}"
        assert run(tmp_path / "whole", flags) == 0
        with monkeypatch.context() as patch, contextlib.suppress(ZeroDivisionError):
            stop_in_step(patch, step, killed=stage == "all")         # between two stages
            assert run(tmp_path / "parts", flags) == 0
        assert run(tmp_path / "parts", f"{flags} --resume") == 0
        assert signal.getsignal(signal.SIGINT) is handler
        whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
        for key, value in whole["average"].items():
            assert torch.equal(value, parts["average"][key]), key

    def test_averages_go_on_after_ctrl_c_and_at_another_size(self, run, tmp_path, monkeypatch):
        stop_in_step(monkeypatch, 5)                                         # the second of base
        assert run(tmp_path, "--stage all --steps 3") == 0
        kept, key = checkpoint(tmp_path), "mjd.modality"
        assert torch.equal(kept["weights"]["vae.latent_std"], kept["average"]["vae.latent_std"])
        sampled = cycle.load_models(tmp_path / "checkpoint.pt").state_dict()
        assert torch.equal(sampled[key], kept["average"][key])
        assert run(tmp_path, "--stage dpa --steps 1 --size 48x48") == 0
        assert torch.equal(checkpoint(tmp_path)["weights"][key], kept["average"][key])

    def test_two_processes_equal_one_and_share_its_checkpoints(self, run, tmp_path):
        one, two = tmp_path / "one", tmp_path / "two"
        assert run(one, "--stage joint --steps 1") == 0
        shutil.copytree(one, two)
        (tmp_path / "pair.py").write_text(PAIR)
        command = (f"-m torch.distributed.run --standalone --nproc_per_node=2 {tmp_path}/pair.py "
                   f"{run.fixed} --out {two} --stage joint --steps 4 --resume")
        own = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
        ended = subprocess.run([sys.executable, *command.split()], env=own, capture_output=True)
        assert ended.returncode == 0, ended.stderr
        assert run(one, "--stage joint --resume --steps 4") == 0
        other = checkpoint(two)["average"]
        for key, value in checkpoint(one)["average"].items():
            assert (value - other[key]).abs().mean() < 1e-4, key
        assert run(two, "--stage joint --resume --steps 5") == 0             # and back to one

    @each("fault, flags, word", [
        (spoiled("pseudo", torch.Tensor.abs), "--data data:Spoiled", "pseudo"),
        (spoiled("tracks", torch.Tensor.double), "--data data:Spoiled", "float32"),
        (spoiled("scale", lambda x: x * math.nan), "--data data:Spoiled", "scale.* nan"),
        ((train, "DataLoader", failing(RuntimeError("Bus error"))), "--workers 1", "--workers 0"),
        ((torch, "save", failing(OSError("No space left"))), "", "No space left"),
        ((train, "SAVE_EVERY", 200), "--rate 1e30", "try a lower --rate")])
    def test_faults_cost_one_sentence(self, run, trained, tmp_path, monkeypatch, capsys, fault,
                                      flags, word):
        shutil.copy(trained / "checkpoint.pt", tmp_path)
        monkeypatch.setattr(*fault, raising=False)
        assert run(tmp_path, f"--stage joint --steps 9 {flags}") == 2
        assert re.search(word, one_line(capsys))
        assert (tmp_path / "checkpoint.pt").read_bytes() == (trained / "checkpoint.pt").read_bytes()

    @each("flags, equal", [
        ("--workers 1", True), ("--compile", True), ("--minutes 1e-9", True), ("--batch 2", False),
        ("--data data:SyntheticHOI", False), ("--rate 0.1", False), ("--scenes 3", False),
        ("--seed 1", False), ("--size 32x32", False), ("--precision bf16", False),
        ("--views 3", False), ("--frames 9", False), ("--steps 2", False)])
    def test_every_flag_does_something(self, run, tmp_path, monkeypatch, flags, equal):
        monkeypatch.setattr(shutil, "which", lambda name: None)        # no compiler: on without
        found = []
        for out, more in ((tmp_path / "one", "--steps 1"), (tmp_path / "other", flags)):
            steps = "" if "minutes" in more else "--steps 1"
            assert run(out, f"--stage joint --scenes 1 {steps} {more}") == 0
            found.append(str(checkpoint(out)["weights"]))
        assert (found[0] == found[1]) == equal


HOSTILE = r"</script><b>$\frac"           # to a web page, and to formulas in a picture


@pytest.fixture(scope="session")
def shoot(trained):
    """sample.py with the weights of that run, into a folder, with some flags: its exit code."""
    def shoot(out, flags):
        return call(sample, f"--weights {trained}/weights.pt --ref {REF} --steps 2 --prompt "
                            f"{HOSTILE} --out {out} {flags}")
    return shoot


@pytest.fixture
def rig(trained, capsys):
    """What --print-cameras prints, read back."""
    assert call(sample, f"--print-cameras --weights {trained}/weights.pt") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="session")
def shot(shoot, tmp_path_factory):
    """The files of a sample: name -> content."""
    out = tmp_path_factory.mktemp("shot")
    assert shoot(out, "") == 0
    return {path.name: path.read_bytes() for path in out.iterdir()}


class TestSampling:
    @each("flags", ["", "--seed 1", "--steps 3", "--temperature 1", "--prompt cut", "--no-cycle",
                    "--no-dpa", "--eta 1", "--text-scale 3"])
    def test_equal_flags_give_equal_files_and_others_others(self, shoot, shot, tmp_path, flags):
        assert shoot(tmp_path, flags) == 0
        files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert (files == shot) == (flags == "")

    def test_the_files_are_complete_and_the_viewer_needs_no_network(self, shot):
        assert sorted(shot) == """motion_view0.mp4 motion_view1.mp4 overview.gif overview.png
            tracks.npz video_view0.mp4 video_view1.mp4 viewer.html""".split()
        page = shot["viewer.html"].decode()
        assert page.count("</script>") == 2                          # the prompt ends none
        assert "http" not in page.replace("http-equiv", "")

    def test_old_files_go_and_no_ffmpeg_costs_the_mp4s(self, shoot, tmp_path, monkeypatch, capsys):
        for name in ("video_view7.mp4", "motion_view7.mp4", "mine.txt"):
            (tmp_path / name).write_text("old")
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", f"{tmp_path}/mine.txt")     # not executable
        assert shoot(tmp_path, "") == 0
        assert "ffmpeg" in capsys.readouterr().out
        left = sorted(os.listdir(tmp_path))
        assert left == "mine.txt overview.gif overview.png tracks.npz viewer.html".split()

    def test_every_path_is_expanded(self, shoot, trained, run, rig, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        shutil.copy(trained / "weights.pt", tmp_path)
        (tmp_path / "rig.json").write_text(json.dumps(rig), "utf-16")
        assert shoot("~/shot", "--weights ~/weights.pt --cameras ~/rig.json") == 0
        thread = threading.Thread(target=run, args=("~/run", "--stage vae --steps 1 --cache ~/c"))
        thread.start()
        thread.join()
        assert {"shot", "run", "c"} <= set(os.listdir(tmp_path))

    @each("wider, taller", [(0, 0), (160, 0), (0, 200)])
    def test_rigs_are_cropped_as_pictures_are(self, trained, rig, tmp_path, wider, taller):
        models = cycle.load_models(trained / "weights.pt")
        expected = torch.tensor([view["intrinsics"] for view in rig["views"]])
        shifted = np.array([[10, 0, wider / 2], [0, 10, taller / 2], [0, 0, 1]])
        rig["size"] = [320 + taller, 480 + wider]
        for view in rig["views"]:
            view["intrinsics"] = (shifted @ view["intrinsics"]).tolist()
        (tmp_path / "rig.json").write_text(json.dumps(rig), "utf-8-sig")
        assert close(sample.read_rig(tmp_path / "rig.json", models)[0], expected, 1e-3)

    @each("key, change", [("extrinsics", np.linalg.inv), ("extrinsics", np.transpose),
                          ("intrinsics", lambda K: K / [[48], [32], [1]])])
    def test_rigs_in_other_conventions_are_refused(self, shoot, rig, tmp_path, capsys, key, change):
        for view in rig["views"]:
            view[key] = change(np.array(view[key])).tolist()
        (tmp_path / "rig.json").write_text(json.dumps(rig))
        assert shoot(tmp_path, f"--cameras {tmp_path}/rig.json") == 2
        assert "world -> camera" in one_line(capsys)

    def test_taco_trains_samples_and_is_evaluated(self, tree, run, tmp_path):
        source = f"--data taco --data-root {tree[0]} --mano-dir {tree[1]}"
        assert run(tmp_path, f"--stage joint --steps 2 --views 3 {source}") == 0
        flags = f"--weights {tmp_path}/weights.pt --steps 1 --scenes 1 --json {tmp_path}/eval.json"
        assert call(sample, f"{flags} --ref {REF} --out {tmp_path}") == 0
        poses = torch.from_numpy(np.load(tmp_path / "tracks.npz")["extrinsics"])
        left, _, right = data.camera_centres(poses)[:, 0]
        assert left < -0.6 < 0.6 < right                                     # the tree's cameras
        assert call(sample, f"{flags} --eval --split unseen {source}") == 0
        table = json.loads((tmp_path / "eval.json").read_text())["unseen"]
        assert table["baseline"]["tracks_cm_ci"] is None                     # of one scene
        assert call(sample, f"{flags} --eval") == 2                          # not without the data


BAD = dict(
    train="""--steps -1;--preset huge;--size 64;--size 30x40;--frames 4;--rate nan;--batch 1.5;
        --minutes -1;--workers -1;--bogus;--resume;--out FILE;--out /proc/no;--data taco;--seed x;
        --data taco --data-root /no --mano-dir /no;--out TRAINED --preset small;--scenes -1;
        --out TRAINED --stage all;--out TRAINED --stage vae --resume;--data nothing:Here""",
    sample=f"""--ref;--ref none.png;--ref FILE;--ref NAN;--ref REF REF REF;--prompt=;--bogus;
        --prompt {'x,' * 99};--scenes 0;--seed -1;--text-scale nan;--eta 2;--cameras FILE;
        --cameras none.json;--weights FILE;--weights none.pt;--eval --split none;--out FILE;
        --steps 0;--eval --data taco""")


class TestBothPrograms:
    @each("program, flags", [(name, flags) for name in BAD for flags in BAD[name].split(";")])
    def test_bad_input_costs_one_line(self, run, shoot, trained, tmp_path, capsys, program, flags):
        (tmp_path / "file").write_text("not what was expected")
        picture = np.full((32, 48), np.nan, np.float32)
        iio.imwrite(tmp_path / "nan.tiff", picture, plugin="pillow")
        flags = flags.replace("FILE", f"{tmp_path}/file").replace("NAN", f"{tmp_path}/nan.tiff")
        flags = flags.replace("TRAINED", str(trained)).replace("REF", str(REF))
        start = run if program == "train" else shoot
        assert start(tmp_path / "out", f"--steps 1 {flags}") == 2
        one_line(capsys)

    @each("kind", ["code", "truncated", "nan"])
    def test_bad_checkpoints_are_not_executed(self, run, trained, tmp_path, capsys, kind):
        path, state = tmp_path / "checkpoint.pt", checkpoint(trained)
        if kind == "code":
            state["average"] = Hostile(tmp_path / "executed")
        if kind == "nan":
            state["average"]["mjd.modality"].fill_(math.nan)
        torch.save(state, path)
        if kind == "truncated":
            path.write_bytes(path.read_bytes()[:5000])
        assert run(tmp_path, "--stage joint --steps 1") == 2
        assert "checkpoint.pt" in one_line(capsys)
        assert call(sample, f"--weights {path} --print-cameras") == 2
        assert "checkpoint.pt" in one_line(capsys)
        assert not (tmp_path / "executed").exists()

    def test_both_command_lines_run_also_where_a_notebook_has_set_its_backend(self, tmp_path):
        own = os.environ | {"MPLBACKEND": "module://no_such_backend", "OMP_NUM_THREADS": "1"}
        for command in ("train.py --preset tiny --stage joint --steps 1",
                        f"sample.py --weights runs/tiny/weights.pt --ref {REF} --steps 2",
                        "sample.py --weights runs/tiny/weights.pt --eval --scenes 2 --steps 1"):
            command = [sys.executable, *f"{HERE}/{command}".split()]
            ended = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True)
            assert ended.returncode == 0, ended.stderr


class TestReadmeAndHouse:
    def test_the_readmes_table_is_that_of_eval_json(self):
        report = json.loads((HERE / "assets" / "eval.json").read_text())["val"]
        rows = report["ablation"] + [{"name": "reference frame repeated"} | report["baseline"],
                                     {"name": "VAE round trip"} | report["ceiling"]]
        readme = (HERE / "README.md").read_text()
        for row in rows:
            cells = [row["name"]]
            for key in ("psnr_moving", "sharpness", "mv_rpe", "hands_tool_cm"):
                cells.append(f"{row[key]:.2f} ± {row[key + '_ci']:.2f}")
            assert "| " + " | ".join(cells) + " |" in readme, row["name"]

    def test_the_readme_is_true(self):
        text, code = (HERE / "README.md").read_text(), "".join(map(Path.read_text, SCRIPTS))
        for path in re.findall(r"(?:assets|weights|docs)/[\w.-]+\w|\b[a-z_]+\.py\b", text):
            assert (HERE / path).exists(), path
        for flag in re.findall(r"(?<![\w-])--(?:no-)?([a-z][a-z-]+)(?!\w)", text):
            assert re.search(rf"--(no-)?{flag}(?![\w-])", code), flag
        for name, count in re.findall(r"^\| `?(\w+\.py)`? \| *(\d+) \|", text, re.MULTILINE):
            lines = (HERE / name).read_text().count("\n")
            assert int(count) == pytest.approx(lines, rel=0.05), name

    @each("script, no", list(zip(SCRIPTS, ["mjd dpa cycle", "data dpa cycle", "data cycle",
                                           "", "", ""])))
    def test_house_rules(self, script, no):
        text = script.read_text()
        imported = re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)
        assert not {*no.split(), "train", "sample", "resource"}.intersection(imported)
        assert max(map(len, text.splitlines())) <= 100
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert ast.get_docstring(node), node.name
